"""Checkpoints in open_clip's key layout: reading files that nobody vouches for, and the key maps both ways."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ..errors import UserError
from .biomedclip import BiomedClip, BiomedClipConfig
from .resnet import blocks
from .safe_load import State
from .text import BertTower, TextConfig
from .vision import VisionConfig, VisionTower, resize_positions

log = logging.getLogger(__name__)

Keys = dict[str, tuple[str, ...]]

# Hugging Face stored these counters before transformers 4.31; they hold 0, 1, 2, ...
_POSITION_IDS = "text.transformer.embeddings.position_ids"
# The first upload of BiomedCLIP carries BERT's pooler, which its own pooling never runs.
_UNUSED_POOLER = "text.transformer.pooler."
# Sizes that OpenAI's archives hold as numbers.
_SIZES = tuple(f"text.{name}" for name in ("input_resolution", "context_length", "vocab_size"))


def key_map(config: BiomedClipConfig) -> Keys:
    """Our parameter -> the open_clip parameters which, concatenated along their first axis, are equal to it."""
    keys: Keys = {"logit_scale": ("logit_scale",)}
    if config.init_logit_bias is not None:
        keys["logit_bias"] = ("logit_bias",)
    if config.vision.kind == "resnet":
        keys |= _resnet_keys(config.vision)
    else:
        keys |= (_clip_vision_keys if config.vision.kind == "clip" else _vision_keys)(config.vision.layers)
    keys |= _bert_keys(config.text) if config.text.kind == "bert" else _gpt_keys(config.text.layers)
    return keys


def _vision_keys(layers: int) -> Keys:
    trunk = "visual.trunk."
    keys: Keys = {f"visual.{name}": (trunk + name,) for name in ("cls_token", "pos_embed")}
    keys |= _pairs("visual.patch_embed", trunk + "patch_embed.proj")
    keys |= _pairs("visual.norm", trunk + "norm")
    keys["visual.head.weight"] = ("visual.head.proj.weight",)
    modules = dict(norm1="norm1", qkv="attn.qkv", proj="attn.proj", norm2="norm2", fc1="mlp.fc1", fc2="mlp.fc2")
    for i in range(layers):
        for ours, theirs in modules.items():
            keys |= _pairs(f"visual.layers.{i}.{ours}", f"{trunk}blocks.{i}.{theirs}")
    return keys


def _clip_vision_keys(layers: int) -> Keys:
    keys: Keys = {
        "visual.cls_token": ("visual.class_embedding",),
        "visual.pos_embed": ("visual.positional_embedding",),
        "visual.patch_embed.weight": ("visual.conv1.weight",),
        "visual.head.weight": ("visual.proj",),
    }
    keys |= _pairs("visual.pre_norm", "visual.ln_pre") | _pairs("visual.norm", "visual.ln_post")
    return keys | _resblocks("visual.layers.", "visual.transformer.resblocks.", layers)


def _resnet_keys(config: VisionConfig) -> Keys:
    keys: Keys = {"visual.pool.pos_embed": ("visual.attnpool.positional_embedding",)}
    keys |= _pairs("visual.pool.qkv", *(f"visual.attnpool.{name}_proj" for name in "qkv"))
    keys |= _pairs("visual.head", "visual.attnpool.c_proj")
    norms = [("visual.stem.", "visual.")]
    for number, block in enumerate(blocks(config)):
        ours, theirs = f"visual.layers.{number}.", f"visual.layer{block.stage + 1}.{block.place}."
        norms.append((ours, theirs))
        if block.place == 0:
            keys |= _conv_norm(f"{ours}short.", f"{theirs}downsample.0.", f"{theirs}downsample.1.")
    for ours, theirs in norms:
        for i in (1, 2, 3):
            keys |= _conv_norm(f"{ours}conv{i}.", f"{theirs}conv{i}.", f"{theirs}bn{i}.")
    return keys


def _conv_norm(ours: str, conv: str, norm: str) -> Keys:
    kinds = ("weight", "bias", "running_mean", "running_var")
    keys: Keys = {f"{ours}conv.weight": (f"{conv}weight",)}
    return keys | {f"{ours}norm.{kind}": (f"{norm}{kind}",) for kind in kinds}


def _resblocks(ours: str, theirs: str, layers: int) -> Keys:
    """The layers of open_clip's own transformer."""
    keys: Keys = {}
    modules = dict(norm1="ln_1", proj="attn.out_proj", norm2="ln_2", fc1="mlp.c_fc", fc2="mlp.c_proj")
    for i in range(layers):
        for kind in ("weight", "bias"):
            keys[f"{ours}{i}.qkv.{kind}"] = (f"{theirs}{i}.attn.in_proj_{kind}",)
        for name, other in modules.items():
            keys |= _pairs(f"{ours}{i}.{name}", f"{theirs}{i}.{other}")
    return keys


def _clip_shapes(state: Mapping[str, Tensor], *, back: bool = False) -> State:
    """open_clip's own image towers keep these without the leading axes of ours, and the ViT's projection transposed.

    Its batch norms count batches, which no computation reads and torch fills in where it is missing.
    """
    state = {name: tensor for name, tensor in state.items() if not name.endswith(".num_batches_tracked")}
    leading = {"visual.class_embedding": 2, "visual.positional_embedding": 1, "visual.attnpool.positional_embedding": 1}
    for name, num_axes in leading.items():
        if name in state:
            tensor = state[name]
            state[name] = tensor.reshape(tensor.shape[num_axes:] if back else (1,) * num_axes + tensor.shape)
    if "visual.proj" in state and state["visual.proj"].dim() == 2:
        state["visual.proj"] = state["visual.proj"].T.contiguous()
    return state


def _bert_keys(config: TextConfig) -> Keys:
    bert = "text.transformer."
    keys: Keys = {
        f"text.{name}.weight": (f"{bert}embeddings.{name}.weight",)
        for name in ("word_embeddings", "position_embeddings", "token_type_embeddings")
    }
    keys |= _pairs("text.embedding_norm", bert + "embeddings.LayerNorm")
    modules = dict(
        proj="attention.output.dense",
        norm1="attention.output.LayerNorm",
        fc1="intermediate.dense",
        fc2="output.dense",
        norm2="output.LayerNorm",
    )
    for i in range(config.layers):
        layer = f"{bert}encoder.layer.{i}."
        attention = [f"{layer}attention.self.{name}" for name in ("query", "key", "value")]
        keys |= _pairs(f"text.layers.{i}.qkv", *attention)
        for ours, theirs in modules.items():
            keys |= _pairs(f"text.layers.{i}.{ours}", layer + theirs)
    projection = ["proj.0", "proj.2"] if config.projection == "mlp" else ["proj"]
    return keys | {f"text.{name}.weight": (f"text.{name}.weight",) for name in projection}


def _gpt_keys(layers: int) -> Keys:
    keys: Keys = {
        "text.token_embedding.weight": ("text.token_embedding.weight",),
        "text.pos_embed": ("text.positional_embedding",),
        "text.projection": ("text.text_projection",),
    }
    keys |= _pairs("text.norm", "text.ln_final")
    return keys | _resblocks("text.layers.", "text.transformer.resblocks.", layers)


def _pairs(ours: str, *theirs: str) -> Keys:
    return {f"{ours}.{kind}": tuple(f"{name}.{kind}" for name in theirs) for kind in ("weight", "bias")}


def from_open_clip(state: Mapping[str, Tensor], model: BiomedClip, *, where: str) -> State:
    """The checkpoint's tensors under our names, in float32, for `model.load_state_dict`.

    Nothing is copied but the concatenated projections. `where` names the checkpoint in messages; `model` gives the
    shapes and may lie on the meta device. open_clip's `CLIP` layout of a GPT text tower (no `text.` prefix) is taken
    too, OpenAI's among them; position ids and an unused BERT pooler are dropped.

    Raises:
        UserError: keys are missing or left over, or a tensor has another shape or no floating dtype.
    """
    keys = key_map(model.config)
    state = _without(_with_text_prefix(state), where, (_POSITION_IDS, _UNUSED_POOLER, *_SIZES), "no computation reads")
    if model.config.vision.kind != "vit":
        state = _clip_shapes(state)
    return _assemble(state, keys, model.state_dict(keep_vars=True), where)


def from_vit(state: Mapping[str, Tensor], tower: VisionTower, *, where: str) -> State:
    """A plain ViT in timm's layout or transformers' as parameters of `tower`, its projection left out.

    The classification head is dropped, position embeddings are resized to the tower's patches, the class token stays.
    Norms take the tower's epsilon, 1e-6 as in timm; google's ViTs were trained with that too, whatever their
    transformers configuration says. Raises UserError as `from_open_clip` does.
    """
    keys = {ours.removeprefix("visual."): theirs for ours, theirs in _vision_keys(len(tower.layers)).items()}
    del keys["head.weight"]
    if any(".patch_embeddings." in name for name in state):
        state = {name.removeprefix("vit."): tensor for name, tensor in state.items()}
        keys = _transformers_vit_keys(len(tower.layers))
        heads: tuple[str, ...] = ("classifier.", "pooler.")
    else:
        keys = {ours: tuple(name.removeprefix("visual.trunk.") for name in theirs) for ours, theirs in keys.items()}
        heads = ("head.",)
    state = _without(state, where, heads, "is the head of another task")
    name = keys["pos_embed"][0]
    positions = state.get(name)
    rows = positions.shape[1] - 1 if positions is not None and positions.dim() == 3 else -1
    if positions is not None and rows > 0 and math.isqrt(rows) ** 2 == rows:
        state[name] = resize_positions(positions, tower.config.num_patches)
        if rows != tower.config.num_patches:
            log.info("%s: %s resized from %d patches to %d", where, name, rows, tower.config.num_patches)
    own = {name: tensor for name, tensor in tower.state_dict(keep_vars=True).items() if name != "head.weight"}
    return _assemble(state, keys, own, where)


def from_bert(state: Mapping[str, Tensor], tower: BertTower, *, where: str) -> State:
    """A BERT in transformers' layout as parameters of `tower`, its projection left out.

    The heads of pretraining (`cls.`) and the pooler are dropped; norms may have TensorFlow's names, gamma and beta.
    Raises UserError as `from_open_clip` does.
    """
    keys = {
        ours.removeprefix("text."): tuple(name.removeprefix("text.transformer.") for name in theirs)
        for ours, theirs in _bert_keys(tower.config).items()
        if theirs[0].startswith("text.transformer.")
    }
    renamed = {}
    for name, tensor in state.items():
        name = name.removeprefix("bert.")
        for old, new in (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")):
            name = name.removesuffix(old) + new if name.endswith(old) else name
        renamed[name] = tensor
    unread = ("cls.", "classifier.", "pooler.", "embeddings.position_ids")
    own = {name: tensor for name, tensor in tower.state_dict(keep_vars=True).items() if not name.startswith("proj.")}
    return _assemble(_without(renamed, where, unread, "the text tower doesn't read"), keys, own, where)


def _transformers_vit_keys(layers: int) -> Keys:
    keys: Keys = {"cls_token": ("embeddings.cls_token",), "pos_embed": ("embeddings.position_embeddings",)}
    keys |= _pairs("patch_embed", "embeddings.patch_embeddings.projection") | _pairs("norm", "layernorm")
    modules = dict(
        norm1="layernorm_before",
        proj="attention.output.dense",
        norm2="layernorm_after",
        fc1="intermediate.dense",
        fc2="output.dense",
    )
    for i in range(layers):
        layer = f"encoder.layer.{i}."
        keys |= _pairs(f"layers.{i}.qkv", *(f"{layer}attention.attention.{name}" for name in ("query", "key", "value")))
        for ours, theirs in modules.items():
            keys |= _pairs(f"layers.{i}.{ours}", layer + theirs)
    return keys


def _assemble(state: Mapping[str, Tensor], keys: Keys, parameters: Mapping[str, Tensor], where: str) -> State:
    """The tensors of `state` under our names, in the shapes of `parameters`, all of which it must hold, and no more."""
    wanted = {name for theirs in keys.values() for name in theirs}
    problems = []
    if missing := wanted - state.keys():
        problems.append(f"lacks {_some(missing)}")
    if foreign := state.keys() - wanted:
        problems.append(f"has {_some(foreign)}, which this model doesn't")
    if problems:
        raise UserError(f"{where} does not fit its configuration: it {' and it '.join(problems)}")
    result = {}
    for ours, parameter in parameters.items():
        names = keys[ours]
        shape = parameter.shape if len(names) == 1 else (len(parameter) // len(names), *parameter.shape[1:])
        for name in names:
            tensor = state[name]
            # Some training scripts store the two scalars as vectors of one.
            fits = tensor.shape == shape or (parameter.dim() == 0 and tensor.shape == (1,))
            if not fits or not tensor.is_floating_point():
                raise UserError(
                    f"{where}: {name} is {tensor.dtype} {tuple(tensor.shape)}, "
                    f"but the configuration makes it float {tuple(shape)}"
                )
        parts = [state[name].to(torch.float32).contiguous() for name in names]
        result[ours] = (parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(parameter.shape)
    return result


def to_open_clip(state: Mapping[str, Tensor], config: BiomedClipConfig) -> State:
    """The inverse of `from_open_clip`: contiguous copies on the CPU that share no memory, dtypes kept."""
    keys = key_map(config)
    if state.keys() != keys.keys():
        raise UserError(f"state dict does not fit its configuration: {_some(state.keys() ^ keys.keys())}")
    result = _divide(state, keys)
    return _clip_shapes(result, back=True) if config.vision.kind != "vit" else result


def to_transformers(state: Mapping[str, Tensor], config: BiomedClipConfig) -> tuple[State, State, State]:
    """The parameters of transformers' ViTModel, of its BertModel or CLIPTextModelWithProjection, and what neither has.

    The ViT's pooler, without activation, is the image projection. Neither has BERT's projection, `text_projection.`
    and open_clip's names, and the logit scale and bias. Copies as of `to_open_clip`.

    Raises:
        UserError: the image tower is OpenAI's.
    """
    if config.vision.kind != "vit":
        lack = "norm before its layers" if config.vision.kind == "clip" else "convolutions"
        raise UserError(
            f"transformers' ViTModel has no {lack}, as vision.kind {config.vision.kind} has: use open_clip's"
        )
    vision = {f"visual.{ours}": theirs for ours, theirs in _transformers_vit_keys(config.vision.layers).items()}
    image = _divide(state, vision | {"visual.head.weight": ("pooler.dense.weight",)})
    image["pooler.dense.bias"] = torch.zeros(config.embed_dim, dtype=image["pooler.dense.weight"].dtype)
    rest: Keys = {name: (name,) for name in ("logit_scale", "logit_bias") if name in state}
    if config.text.kind == "gpt":
        text = _divide(state, _transformers_clip_text_keys(config.text.layers))
        text["text_projection.weight"] = text["text_projection.weight"].T.contiguous()
        return image, text, _divide(state, rest)
    keys = _bert_keys(config.text)
    bert = {
        ours: tuple(name.removeprefix("text.transformer.") for name in theirs)
        for ours, theirs in keys.items()
        if theirs[0].startswith("text.transformer.")
    }
    rest |= {ours: (f"text_projection{ours.removeprefix('text.proj')}",) for ours in keys if ours not in bert}
    return image, _divide(state, bert), _divide(state, rest)


def _transformers_clip_text_keys(layers: int) -> Keys:
    model = "text_model."
    keys: Keys = {
        "text.token_embedding.weight": (f"{model}embeddings.token_embedding.weight",),
        "text.pos_embed": (f"{model}embeddings.position_embedding.weight",),
        "text.projection": ("text_projection.weight",),
    }
    keys |= _pairs("text.norm", model + "final_layer_norm")
    modules = dict(norm1="layer_norm1", proj="self_attn.out_proj", norm2="layer_norm2", fc1="mlp.fc1", fc2="mlp.fc2")
    for i in range(layers):
        layer = f"{model}encoder.layers.{i}."
        keys |= _pairs(f"text.layers.{i}.qkv", *(f"{layer}self_attn.{name}_proj" for name in "qkv"))
        for ours, theirs in modules.items():
            keys |= _pairs(f"text.layers.{i}.{ours}", layer + theirs)
    return keys


def _divide(state: Mapping[str, Tensor], keys: Keys) -> State:
    result = {}
    for ours, theirs in keys.items():
        parts = state[ours].detach().cpu().chunk(len(theirs)) if len(theirs) > 1 else [state[ours].detach().cpu()]
        for name, part in zip(theirs, parts, strict=True):
            result[name] = part.clone(memory_format=torch.contiguous_format)
    return result


def _with_text_prefix(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """open_clip's `CLIP` class keeps the GPT tower's parameters at the top level; `CustomTextCLIP` under `text.`."""
    if "positional_embedding" not in state:
        return state
    ours = ("visual.", "logit_")
    return {name if name.startswith(ours) else f"text.{name}": tensor for name, tensor in state.items()}


def _without(state: Mapping[str, Tensor], where: str, names: tuple[str, ...], why: str) -> State:
    """Drops the `names`, and what begins with those of them that end in a dot."""
    prefixes = tuple(name for name in names if name.endswith("."))
    unused = sorted(name for name in state if name in names or name.startswith(prefixes))
    if unused:
        log.info("%s: dropped %s, which %s", where, ", ".join(unused), why)
    return {name: tensor for name, tensor in state.items() if name not in unused}


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more keys" if len(names) > 5 else "")
