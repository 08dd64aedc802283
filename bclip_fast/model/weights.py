"""Checkpoints in open_clip's key layout: reading files that nobody vouches for, and the key maps both ways."""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from .biomedclip import BiomedClip, BiomedClipConfig

log = logging.getLogger(__name__)

State = dict[str, Tensor]
Keys = dict[str, tuple[str, ...]]

# Hugging Face stored these counters before transformers 4.31; they hold 0, 1, 2, ...
_POSITION_IDS = "text.transformer.embeddings.position_ids"
# The first upload of BiomedCLIP carries BERT's pooler, which its own pooling never runs.
_UNUSED_POOLER = "text.transformer.pooler."


def key_map(config: BiomedClipConfig) -> Keys:
    """Our parameter -> the open_clip parameters which, concatenated along their first axis, are equal to it."""
    keys: Keys = {"logit_scale": ("logit_scale",)}
    if config.init_logit_bias is not None:
        keys["logit_bias"] = ("logit_bias",)
    keys |= _vision_keys(config.vision.layers)
    keys |= _bert_keys(config) if config.text.kind == "bert" else _gpt_keys(config.text.layers)
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


def _bert_keys(config: BiomedClipConfig) -> Keys:
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
    for i in range(config.text.layers):
        layer = f"{bert}encoder.layer.{i}."
        attention = [f"{layer}attention.self.{name}" for name in ("query", "key", "value")]
        keys |= _pairs(f"text.layers.{i}.qkv", *attention)
        for ours, theirs in modules.items():
            keys |= _pairs(f"text.layers.{i}.{ours}", layer + theirs)
    projection = ["proj.0", "proj.2"] if config.text.projection == "mlp" else ["proj"]
    return keys | {f"text.{name}.weight": (f"text.{name}.weight",) for name in projection}


def _gpt_keys(layers: int) -> Keys:
    keys: Keys = {
        "text.token_embedding.weight": ("text.token_embedding.weight",),
        "text.pos_embed": ("text.positional_embedding",),
        "text.projection": ("text.text_projection",),
    }
    keys |= _pairs("text.norm", "text.ln_final")
    modules = dict(norm1="ln_1", proj="attn.out_proj", norm2="ln_2", fc1="mlp.c_fc", fc2="mlp.c_proj")
    for i in range(layers):
        block = f"text.transformer.resblocks.{i}."
        for kind in ("weight", "bias"):
            keys[f"text.layers.{i}.qkv.{kind}"] = (f"{block}attn.in_proj_{kind}",)
        for ours, theirs in modules.items():
            keys |= _pairs(f"text.layers.{i}.{ours}", block + theirs)
    return keys


def _pairs(ours: str, *theirs: str) -> Keys:
    return {f"{ours}.{kind}": tuple(f"{name}.{kind}" for name in theirs) for kind in ("weight", "bias")}


def from_open_clip(state: Mapping[str, Tensor], model: BiomedClip, *, where: str) -> State:
    """The checkpoint's tensors under our names, in float32, for `model.load_state_dict`.

    Nothing is copied but the concatenated projections. `where` names the checkpoint in messages; `model` gives the
    shapes and may lie on the meta device. open_clip's `CLIP` layout of a GPT text tower (no `text.` prefix) is taken
    too; position ids and an unused BERT pooler are dropped.

    Raises:
        UserError: keys are missing or left over, or a tensor has another shape or no floating dtype.
    """
    keys = key_map(model.config)
    state = _without_unused(_with_text_prefix(state), where)
    wanted = {name for theirs in keys.values() for name in theirs}
    problems = []
    if missing := wanted - state.keys():
        problems.append(f"lacks {_some(missing)}")
    if foreign := state.keys() - wanted:
        problems.append(f"has {_some(foreign)}, which this model doesn't")
    if problems:
        raise UserError(f"{where} does not fit its configuration: it {' and it '.join(problems)}")
    result = {}
    for ours, parameter in model.state_dict(keep_vars=True).items():
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
    result = {}
    for ours, theirs in keys.items():
        parts = state[ours].detach().cpu().chunk(len(theirs)) if len(theirs) > 1 else [state[ours].detach().cpu()]
        for name, part in zip(theirs, parts, strict=True):
            result[name] = part.clone(memory_format=torch.contiguous_format)
    return result


def read_checkpoint(path: Path) -> State:
    """The tensors of a `.safetensors` file or of a PyTorch checkpoint, on the CPU. No code of the file is run.

    A PyTorch checkpoint may be the state dict or hold it under "state_dict" (open_clip's training checkpoints), with or
    without the "module." prefix of DistributedDataParallel.

    Raises:
        UserError: the file is missing, broken, of an old or compressed format, or holds anything but plain weights.
    """
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist")
    state: Any = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not state:
        raise UserError(f"checkpoint {path} holds no state dict")
    for name, tensor in state.items():
        plain = isinstance(tensor, Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not isinstance(name, str) or not plain:
            raise UserError(f"checkpoint {path} holds {name!r}, which is no plain tensor; it must hold weights alone")
    if all(name.startswith("module.") for name in state):
        return {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return dict(state)


def _read_safetensors(path: Path) -> State:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, KeyError) as error:
        raise UserError(f"checkpoint {path} is not a whole safetensors file: {error}") from error


def _read_torch(path: Path) -> Any:
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(
            f"checkpoint {path} is broken, or older than PyTorch 1.6 and to be saved again: {error}"
        ) from error
    if packed:
        # torch.save never compresses; a compressed entry could unpack to any size.
        raise UserError(f"checkpoint {path} has compressed entries ({packed[0]}); torch.save writes none")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises UnpicklingError, RuntimeError, EOFError, KeyError, ...
        reason = str(error).partition("\n")[0][:200]
        raise UserError(f"checkpoint {path} is broken or holds more than plain weights: {reason}") from error


def _with_text_prefix(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """open_clip's `CLIP` class keeps the GPT tower's parameters at the top level; `CustomTextCLIP` under `text.`."""
    if "positional_embedding" not in state:
        return state
    ours = ("visual.", "logit_")
    return {name if name.startswith(ours) else f"text.{name}": tensor for name, tensor in state.items()}


def _without_unused(state: Mapping[str, Tensor], where: str) -> State:
    unused = [name for name in state if name == _POSITION_IDS or name.startswith(_UNUSED_POOLER)]
    if unused:
        log.info("%s: dropped %s, which no computation reads", where, ", ".join(unused))
    return {name: tensor for name, tensor in state.items() if name not in unused}


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more keys" if len(names) > 5 else "")
