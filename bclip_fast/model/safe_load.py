"""Reading checkpoint files from untrusted sources: no code of the file runs."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bclip_fast.errors import UserError

State = dict[str, Tensor]

# The pickled number with which torch.save's files began before they were zip archives.
_LEGACY_START = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)


def read_checkpoint(path: Path, *, legacy: bool = False) -> State:
    """Read the tensors of a `.safetensors` file or of a PyTorch checkpoint, on the CPU.

    A PyTorch checkpoint may be the state dict itself or hold it under "state_dict", as open_clip's training checkpoints
    do. A "module." prefix of DistributedDataParallel is removed.

    Args:
        legacy: also accept the format that PyTorch wrote before 1.6. Some of the first checkpoints on the hub have it.

    Raises:
        UserError: the file is missing, broken or compressed, has an old format, or holds anything but plain weights.
    """
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist")
    state: Any = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path, legacy)
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not state:
        raise UserError(f"checkpoint {path} doesn't hold a state dict")
    for name, tensor in state.items():
        plain = isinstance(tensor, Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not isinstance(name, str) or not plain:
            raise UserError(f"checkpoint {path} holds {name!r}, which isn't a plain tensor; it must hold only weights")
    if all(name.startswith("module.") for name in state):
        return {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return dict(state)


def _read_safetensors(path: Path) -> State:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, KeyError) as error:
        raise UserError(f"checkpoint {path} isn't a complete safetensors file: {error}") from error


def _read_torch(path: Path, legacy: bool) -> Any:
    compressed: list[str] = []
    try:
        if not (legacy and path.open("rb").read(len(_LEGACY_START)) == _LEGACY_START):
            with zipfile.ZipFile(path) as archive:
                entries = archive.infolist()
                compressed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    except (zipfile.BadZipFile, OSError) as error:
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
