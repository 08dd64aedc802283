"""Converting weights of checkpoints: from the layouts of open_clip, timm and transformers, and back."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from bclip_fast.errors import UserError

from .biomedclip import BiomedClip, BiomedClipConfig
from .safe_load import State
from .text import BertTower
from .vision import VisionTower, resize_positions
from .weight_names import (
    Keys,
    bert_keys,
    key_map,
    timm_vit_keys,
    transformers_bert_keys,
    transformers_clip_text_keys,
    transformers_joint_keys,
    transformers_vit_keys,
)

log = logging.getLogger(__name__)

# Hugging Face stored these counters before transformers 4.31. They hold 0, 1, 2, ...
_POSITION_IDS = "text.transformer.embeddings.position_ids"
# The first upload of BiomedCLIP carries BERT's pooler, which its own pooling never runs.
_UNUSED_POOLER = "text.transformer.pooler."
# Sizes that OpenAI's archives hold as numbers.
_SIZES = tuple(f"text.{name}" for name in ("input_resolution", "context_length", "vocab_size"))


def from_open_clip(state: Mapping[str, Tensor], model: BiomedClip, *, source: str) -> State:
    """Return a checkpoint's tensors under our names, in float32, for `model.load_state_dict`.

    Only concatenated projections are copied. open_clip's `CLIP` layout of a GPT text tower (no `text.` prefix) is
    accepted too, and so are OpenAI's archives. Position ids and an unused BERT pooler are dropped.

    Args:
        model: gives the shapes. It may lie on the meta device.
        source: names the checkpoint in messages.

    Raises:
        UserError: keys are missing or left over, or a tensor has another shape or isn't of a floating dtype.
    """
    keys = key_map(model.config)
    unread = (_POSITION_IDS, _UNUSED_POOLER, *_SIZES)
    state = _dropped(_with_text_prefix(state), source, unread, "no computation reads")
    if model.config.vision.kind in ("clip", "resnet"):
        state = _clip_shapes(state)
    return _renamed(state, keys, model.state_dict(keep_vars=True), source)


def from_transformers(state: Mapping[str, Tensor], model: BiomedClip, *, source: str) -> State:
    """Return the tensors of transformers' CLIPModel or SiglipModel as `from_open_clip` does, with the same errors."""
    unread = tuple(f"{tower}_model.embeddings.position_ids" for tower in ("text", "vision"))
    state = _joint_shapes(_dropped(state, source, unread, "no computation reads"), model.config)
    return _renamed(state, transformers_joint_keys(model.config), model.state_dict(keep_vars=True), source)


def to_transformers_joint(state: Mapping[str, Tensor], config: BiomedClipConfig) -> State:
    """Invert `from_transformers`. The tensors are copies, as of `to_open_clip`."""
    return _joint_shapes(_divided(state, transformers_joint_keys(config)), config, back=True)


def _joint_shapes(state: Mapping[str, Tensor], config: BiomedClipConfig, *, back: bool = False) -> State:
    """Convert shapes of transformers' joint models: ours have leading axes, CLIP's text projection is transposed, and
    the packed projection of SigLIP's pool is divided into its query, and its keys and values.
    """
    state, vision = dict(state), "vision_model."
    leading = {f"{vision}embeddings.class_embedding": 2, f"{vision}embeddings.position_embedding.weight": 1}
    for name, num_axes in leading.items():
        if name in state:
            tensor = state[name]
            state[name] = tensor.reshape(tensor.shape[num_axes:] if back else (1,) * num_axes + tensor.shape)
    transposed = "text_projection.weight"
    if config.vision.kind == "clip" and transposed in state and state[transposed].dim() == 2:
        state[transposed] = state[transposed].T.contiguous()
    if config.vision.kind == "siglip" and back:
        # transformers has vectors of one element.
        state |= {name: state[name].reshape(1) for name in ("logit_scale", "logit_bias") if name in state}
    for kind in ("weight", "bias") if config.vision.kind == "siglip" else ():
        packed = f"{vision}head.attention.in_proj_{kind}"
        query, key_value = (f"{vision}head.{name}.{kind}" for name in ("query", "key_value"))
        if back:
            state[packed] = torch.cat([state.pop(query), state.pop(key_value)])
        elif packed in state:
            tensor = state.pop(packed)
            state[query], state[key_value] = tensor[: len(tensor) // 3], tensor[len(tensor) // 3 :]
    return state


def from_vit(state: Mapping[str, Tensor], tower: VisionTower, *, source: str) -> State:
    """Return a plain ViT in timm's or transformers' layout as parameters of `tower`, except its projection.

    The classification head is dropped. Position embeddings are resized to the tower's patches, and the class token is
    kept. Norms use the tower's epsilon, 1e-6 as in timm. google's ViTs were trained with it too, although their
    transformers configuration says otherwise. Raises UserError as `from_open_clip` does.
    """
    if any(".patch_embeddings." in name for name in state):
        state = {name.removeprefix("vit."): tensor for name, tensor in state.items()}
        keys = transformers_vit_keys(len(tower.layers))
        heads: tuple[str, ...] = ("classifier.", "pooler.")
    else:
        keys = {
            ours.removeprefix("visual."): tuple(name.removeprefix("visual.trunk.") for name in theirs)
            for ours, theirs in timm_vit_keys(len(tower.layers)).items()
        }
        del keys["head.weight"]
        heads = ("head.",)
    state = _dropped(state, source, heads, "is the head of another task")
    name = keys["pos_embed"][0]
    positions = state.get(name)
    rows = positions.shape[1] - 1 if positions is not None and positions.dim() == 3 else -1
    if positions is not None and rows > 0 and math.isqrt(rows) ** 2 == rows:
        state[name] = resize_positions(positions, tower.config.num_patches)
        if rows != tower.config.num_patches:
            log.info("%s: %s resized from %d patches to %d", source, name, rows, tower.config.num_patches)
    parameters = {name: value for name, value in tower.state_dict(keep_vars=True).items() if name != "head.weight"}
    return _renamed(state, keys, parameters, source)


def from_bert(state: Mapping[str, Tensor], tower: BertTower, *, source: str) -> State:
    """Return a BERT in transformers' layout as parameters of `tower`, except its projection.

    The heads of pretraining (`cls.`) and the pooler are dropped. Norms may have TensorFlow's names, gamma and beta.
    Raises UserError as `from_open_clip` does.
    """
    keys = {ours.removeprefix("text."): theirs for ours, theirs in transformers_bert_keys(tower.config).items()}
    plain_names = {}
    for name, tensor in state.items():
        name = name.removeprefix("bert.")
        for old, new in (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")):
            name = name.removesuffix(old) + new if name.endswith(old) else name
        plain_names[name] = tensor
    unread = ("cls.", "classifier.", "pooler.", "embeddings.position_ids")
    parameters = {
        name: value for name, value in tower.state_dict(keep_vars=True).items() if not name.startswith("proj.")
    }
    return _renamed(_dropped(plain_names, source, unread, "the text tower doesn't read"), keys, parameters, source)


def _renamed(state: Mapping[str, Tensor], keys: Keys, parameters: Mapping[str, Tensor], source: str) -> State:
    """Return the tensors under our names in the parameters' shapes. `state` must hold exactly these parameters."""
    expected_keys = {name for theirs in keys.values() for name in theirs}
    problems = []
    if missing := expected_keys - state.keys():
        problems.append(f"lacks {_first_names(missing)}")
    if foreign := state.keys() - expected_keys:
        problems.append(f"has {_first_names(foreign)}, which this model doesn't have")
    if problems:
        raise UserError(f"{source} doesn't fit its configuration: it {' and it '.join(problems)}")
    result = {}
    for ours, parameter in parameters.items():
        names = keys[ours]
        shape = parameter.shape if len(names) == 1 else (len(parameter) // len(names), *parameter.shape[1:])
        for name in names:
            tensor = state[name]
            # Some training scripts store the two scalars as vectors of one element.
            fits = tensor.shape == shape or (parameter.dim() == 0 and tensor.shape == (1,))
            if not fits or not tensor.is_floating_point():
                raise UserError(
                    f"{source}: {name} is {tensor.dtype} {tuple(tensor.shape)}, "
                    f"but the configuration requires float {tuple(shape)}"
                )
        parts = [state[name].to(torch.float32).contiguous() for name in names]
        result[ours] = (parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(parameter.shape)
    return result


def to_open_clip(state: Mapping[str, Tensor], config: BiomedClipConfig) -> State:
    """Invert `from_open_clip`: contiguous copies on the CPU that don't share memory, with unchanged dtypes."""
    keys = key_map(config)
    if state.keys() != keys.keys():
        raise UserError(f"state dict doesn't fit its configuration: {_first_names(state.keys() ^ keys.keys())}")
    result = _divided(state, keys)
    return _clip_shapes(result, back=True) if config.vision.kind in ("clip", "resnet") else result


def to_transformers(state: Mapping[str, Tensor], config: BiomedClipConfig) -> tuple[State, State, State]:
    """Return the parameters of transformers' image model, of its text model, and of neither.

    The image model is a ViTModel. Its pooler, without activation, is the image projection. The text model is a
    BertModel or a CLIPTextModelWithProjection. Neither model has BERT's projection (`text_projection.` and open_clip's
    names), the logit scale or the bias. All tensors are copies, as of `to_open_clip`.

    Raises:
        UserError: the image tower isn't a plain ViT, or the text tower attends to padding.
    """
    if config.vision.kind != "vit":
        lacks = {"clip": "norm before its layers", "resnet": "convolutions", "siglip": "attention pool"}
        raise UserError(
            f"transformers' ViTModel has no {lacks[config.vision.kind]}, as vision.kind {config.vision.kind} has: use "
            "open_clip's layout"
        )
    if config.text.computes_padding:
        raise UserError(
            "transformers has no class for text towers that attend to padding, except with vision.kind siglip: use "
            "open_clip's layout"
        )
    vision = {f"visual.{ours}": theirs for ours, theirs in transformers_vit_keys(config.vision.layers).items()}
    image = _divided(state, vision | {"visual.head.weight": ("pooler.dense.weight",)})
    image["pooler.dense.bias"] = torch.zeros(config.embed_dim, dtype=image["pooler.dense.weight"].dtype)
    rest: Keys = {name: (name,) for name in ("logit_scale", "logit_bias") if name in state}
    if config.text.kind == "gpt":
        text = _divided(state, transformers_clip_text_keys(config.text.layers))
        text["text_projection.weight"] = text["text_projection.weight"].T.contiguous()
        return image, text, _divided(state, rest)
    bert = transformers_bert_keys(config.text)
    projection = [ours for ours in bert_keys(config.text) if ours not in bert]
    rest |= {ours: (f"text_projection{ours.removeprefix('text.proj')}",) for ours in projection}
    return image, _divided(state, bert), _divided(state, rest)


def _divided(state: Mapping[str, Tensor], keys: Keys) -> State:
    """Copy our tensors to the names of `keys`. A tensor with several names is divided along its first axis."""
    result = {}
    for ours, theirs in keys.items():
        parts = state[ours].detach().cpu().chunk(len(theirs)) if len(theirs) > 1 else [state[ours].detach().cpu()]
        for name, part in zip(theirs, parts, strict=True):
            result[name] = part.clone(memory_format=torch.contiguous_format)
    return result


def _clip_shapes(state: Mapping[str, Tensor], *, back: bool = False) -> State:
    """Convert shapes of open_clip's own image towers: ours have leading axes there, and the ViT's projection is
    transposed.

    Batch counts of its batch norms are dropped. No computation reads them, and torch fills them in when they are
    missing.
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


def _with_text_prefix(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """open_clip's `CLIP` class keeps the GPT tower's parameters at the top level; `CustomTextCLIP` under `text.`."""
    if "positional_embedding" not in state:
        return state
    top_level = ("visual.", "logit_")
    return {name if name.startswith(top_level) else f"text.{name}": tensor for name, tensor in state.items()}


def _dropped(state: Mapping[str, Tensor], source: str, names: tuple[str, ...], reason: str) -> State:
    """Drop `names` and, for those that end in a dot, everything that starts with them. Log their names."""
    prefixes = tuple(name for name in names if name.endswith("."))
    unused = sorted(name for name in state if name in names or name.startswith(prefixes))
    if unused:
        log.info("%s: dropped %s, which %s", source, ", ".join(unused), reason)
    return {name: tensor for name, tensor in state.items() if name not in unused}


def _first_names(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more keys" if len(names) > 5 else "")
