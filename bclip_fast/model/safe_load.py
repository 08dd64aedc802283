"""Reading checkpoint files from untrusted sources: no code of the file runs."""

from __future__ import annotations

import logging
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bclip_fast.errors import UserError
from bclip_fast.io import stand_ins

log = logging.getLogger(__name__)

State = dict[str, Tensor]

# Entries under which training programs keep the weights: open_clip, Lightning, timm, DeepSpeed.
_NESTS = ("state_dict", "model_state_dict", "model", "module")
# Components that torch.compile, DDP, FSDP, checkpoint_wrapper and Lightning Fabric insert into names at any depth.
_WRAPPERS = frozenset(
    ("_orig_mod", "module", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module", "_forward_module")
)
# A Lightning module keeps the model in an attribute, usually of this name.
_ATTRIBUTE = "model."

# The pickled number with which torch.save's files began before they were zip archives.
_LEGACY_START = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)


def read_checkpoint(path: Path, *, legacy: bool = False) -> State:
    """Read the tensors of a `.safetensors` file or of a PyTorch checkpoint, on the CPU.

    A PyTorch checkpoint may be the state dict itself or hold it under one of the names that training programs use, such
    as "state_dict". `plain_names` removes what wrappers insert into the names.

    Args:
        legacy: also accept the format that PyTorch wrote before 1.6. Some of the first checkpoints on the hub have it.

    Raises:
        UserError: the file is missing, broken or compressed, has an old format, or holds anything but plain weights.
    """
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist")
    state: Any = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path, legacy)
    state = _unnested(state, path)
    if not isinstance(state, Mapping) or not state:
        raise UserError(f"checkpoint {path} doesn't hold a state dict")
    for name, tensor in state.items():
        plain = isinstance(tensor, Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not isinstance(name, str) or not plain:
            raise UserError(f"checkpoint {path} holds {name!r}, which isn't a plain tensor; it must hold only weights")
    return plain_names(state, str(path))


def read_tensor(path: Path) -> Tensor:
    """Read a file of one floating tensor that torch.save wrote, on the CPU. Raises UserError."""
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist")
    tensor = _read_torch(path, True)
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.layout != torch.strided:
        raise UserError(f"checkpoint {path} must hold one tensor of floating-point numbers")
    return tensor.detach()


def plain_names(state: Mapping[str, Tensor], source: str) -> State:
    """Return the tensors under the names that they have in the model itself.

    The components that wrappers insert, such as `_orig_mod` of torch.compile, are removed at any depth. So is `model.`
    in front, if every name has it, as in Lightning's checkpoints.

    Raises:
        UserError: two names become one. The message names `source` and both.
    """
    originals: dict[str, str] = {}
    for name in state:
        plain = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
        if plain in originals:
            raise UserError(
                f"{source} holds {originals[plain]} and {name}, which are both {plain} without the parts that wrappers "
                "add; save the state dict of one of the two models"
            )
        originals[plain] = name
    prefix = ""
    while originals and all(name.startswith(prefix + _ATTRIBUTE) for name in originals):
        prefix += _ATTRIBUTE
    result = {plain.removeprefix(prefix): state[name] for plain, name in originals.items()}
    if result.keys() != state.keys():
        log.info("%s: removed from its names what wrappers add", source)
    return result


def _unnested(state: Any, path: Path) -> Any:
    """The state dict inside a checkpoint, which may lie in several entries of `_NESTS`, one in the other."""
    for _ in _NESTS:  # a pickle can hold itself
        if not isinstance(state, Mapping):
            break
        nests = [name for name in _NESTS if isinstance(state.get(name), Mapping)]
        if len(nests) > 1:
            raise UserError(
                f"checkpoint {path} holds weights under {' and '.join(nests)}; save only the state dict that you mean"
            )
        if not nests:
            break
        state = state[nests[0]]
    return state


def _read_safetensors(path: Path) -> State:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, KeyError) as error:
        stand_ins.refuse(path)
        raise UserError(
            f"checkpoint {path} isn't a complete safetensors file; download or copy it again: {error}"
        ) from error


def _read_torch(path: Path, legacy: bool) -> Any:
    compressed: list[str] = []
    try:
        if not (legacy and path.open("rb").read(len(_LEGACY_START)) == _LEGACY_START):
            with zipfile.ZipFile(path) as archive:
                entries = archive.infolist()
                compressed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    except (zipfile.BadZipFile, OSError) as error:
        stand_ins.refuse(path)
        raise UserError(
            f"checkpoint {path} is broken, or was saved by PyTorch before 1.6 and must be saved again: {error}"
        ) from error
    if compressed:
        # torch.save never compresses, and a compressed entry could unpack to any size.
        raise UserError(f"checkpoint {path} has compressed entries ({compressed[0]}); torch.save doesn't write any")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises UnpicklingError, RuntimeError, EOFError, KeyError, ...
        reason = str(error).partition("\n")[0][:200]
        raise UserError(f"checkpoint {path} is broken or holds more than plain weights: {reason}") from error
