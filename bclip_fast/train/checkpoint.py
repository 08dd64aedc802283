"""Checkpoints that are complete or absent: written to a partial folder, hashed, renamed, and read if every hash agrees.

    checkpoints/step-00001000/
      model.safetensors       fp32 parameters and buffers, under the model's names
      optimizer.safetensors   states of the optimiser, such as AdamW's `exp_avg.NAME` and `exp_avg_sq.NAME`
      ema.safetensors         EMA of the trainable parameters, if the run has one
      state.json              step, position in the data, number of updates, loss scale, model configuration, names of
                              the files, state of the trainer's rules (the last losses, the best validation), and the
                              record of the run (command, configuration, libraries, changes at resumes)
      manifest.json           size and SHA-256 of the other files. Written last.

A checkpoint holds no pickle, so reading one runs no code. It does not depend on the engine or on the number of ranks,
so it needs no conversion such as that of DeepSpeed's universal checkpoints. Those hold pickles and DeepSpeed's own
trainer state, and this module neither reads nor writes them. Random states are not stored, because the trainer seeds
each step from (seed, step, rank).
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from bclip_fast import config as config_files
from bclip_fast.errors import UserError
from bclip_fast.io import stand_ins
from bclip_fast.io.atomic import replacing_folder
from bclip_fast.io.hashing import sha256_of_file
from bclip_fast.model.biomedclip import BiomedClipConfig

from .engine.optimizer import OptimizerState

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
_NAME = re.compile(r"step-\d{8,}")
_FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
_EMA = "ema.safetensors"


@dataclass
class Checkpoint:
    """The state from which a run continues.

    data: state of the sampler.
    model_config: configuration of the model, as JSON.
    rest: state of the trainer's rules.
    run: record of the run, see run_folder.py. Empty in checkpoints of earlier versions.
    """

    step: int
    model: dict[str, Tensor]
    optimizer: OptimizerState
    data: dict[str, Any]
    model_config: dict[str, Any]
    rest: dict[str, Any] = field(default_factory=dict)
    ema: dict[str, Tensor] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)


def save(
    folder: Path, checkpoint: Checkpoint, *, keep: int = 0, keep_every_steps: int = 0, best: int | None = None
) -> Path:
    """Write `folder`/step-XXXXXXXX, then remove old checkpoints. Only one process may call it.

    Args:
        keep: number of newest checkpoints to keep. 0 removes none.
        keep_every_steps: keep the checkpoints of all multiples of this number of steps.
        best: step of another checkpoint to keep.

    Raises:
        UserError: the checkpoint cannot be written. Older checkpoints are then untouched.
    """
    from safetensors.torch import save_file

    target = folder / f"step-{checkpoint.step:08d}"
    moments = {
        f"{key}.{name}": tensor
        for name, tensors in checkpoint.optimizer.moments.items()
        for key, tensor in tensors.items()
    }
    state = {
        "version": FORMAT_VERSION,
        "step": checkpoint.step,
        "data": checkpoint.data,
        "optimizer": {"num_steps": checkpoint.optimizer.num_steps, "loss_scale": checkpoint.optimizer.loss_scale},
        "model_config": checkpoint.model_config,
        "rest": checkpoint.rest,
        "run": checkpoint.run,
        "files": [*_FILES, *([_EMA] if checkpoint.ema else [])],
    }
    with explain_write_errors(target, "; older checkpoints are untouched"):
        # Killed processes leave partial folders behind.
        for stale in folder.glob(".step-*.partial"):
            shutil.rmtree(stale, ignore_errors=True)
        # If the target exists, it is damaged, and the run was resumed from an older checkpoint.
        with replacing_folder(target) as partial:
            save_file({name: tensor.contiguous() for name, tensor in checkpoint.model.items()}, partial / _FILES[0])
            save_file({name: tensor.contiguous() for name, tensor in moments.items()}, partial / _FILES[1])
            if checkpoint.ema:
                save_file({name: tensor.contiguous() for name, tensor in checkpoint.ema.items()}, partial / _EMA)
            _write_json(partial / _FILES[2], state)
            _write_json(partial / "manifest.json", {path.name: _describe(path) for path in partial.iterdir()})
    for path in list_checkpoints(folder)[keep:] if keep else []:
        step = step_of(path)
        if step != best and not (keep_every_steps and step % keep_every_steps == 0):
            _remove(path)
    return target


def _remove(path: Path) -> None:
    """Delete an old checkpoint. A killed process leaves no half of it under its name."""
    try:
        shutil.rmtree(path.rename(path.with_name(f".{path.name}.partial")))
    except OSError as error:
        log.warning("the old checkpoint %s cannot be deleted: %s", path, error.strerror)


@contextlib.contextmanager
def explain_write_errors(target: Path, note: str = "") -> Iterator[None]:
    """Turn a failure to write `target` into a UserError whose message ends with `note`."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"{target} cannot be written: {error}{note}") from error


def load_latest(folder: Path) -> Checkpoint:
    """Read the newest intact checkpoint. Raises UserError as `latest` does."""
    return read(latest(folder))


def latest(folder: Path) -> Path:
    """The newest intact checkpoint. Skip a damaged one with a warning that names the damage.

    Raises:
        UserError: the folder holds no intact checkpoint.
    """
    paths = list_checkpoints(folder)
    for path in paths:
        if problem := verify(path):
            log.warning("%s is not used: %s", path, problem)
            continue
        return path
    problem = f"all {len(paths)} checkpoints are damaged" if paths else "the folder holds no checkpoint"
    raise UserError(f"{folder}: cannot resume, because {problem}; start in another folder")


def verify(path: Path) -> str | None:
    """The damage of a checkpoint. None if every file has the size and the hash in the manifest."""
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
        for name in {*_FILES, *manifest}:
            file = path / name
            size = file.stat().st_size
            if size != manifest[name]["size"]:
                if reason := stand_ins.of_file(file):
                    return f"{name} {reason}"
                return f"{name} has {size} bytes, should have {manifest[name]['size']}"
            if _describe(file) != manifest[name]:
                return f"{name} is corrupt: its SHA-256 differs from the manifest"
        # An earlier version did not name its files.
        for name in read_state(path).get("files", []):
            if name not in manifest:
                return f"{name} is not in the manifest"
    except OSError as error:
        return f"{Path(str(error.filename)).name} cannot be read: {error.strerror}"
    except (ValueError, KeyError, TypeError) as error:
        if reason := stand_ins.of_file(path / "manifest.json"):
            return f"manifest.json {reason}"
        return f"manifest.json is corrupt: {error!r}"
    return None


def read(path: Path) -> Checkpoint:
    """Read a checkpoint that passed `verify`.

    Raises:
        UserError: its format has another version.
    """
    from safetensors.torch import load_file

    state = read_state(path)
    if state.get("version") != FORMAT_VERSION:
        raise UserError(f"{path}: format version {state.get('version')}, this release reads {FORMAT_VERSION}")
    moments: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(path / "optimizer.safetensors").items():
        moment, name = key.split(".", 1)
        moments.setdefault(name, {})[moment] = tensor
    optimizer = OptimizerState(state["optimizer"]["num_steps"], moments, state["optimizer"]["loss_scale"])
    model = load_file(path / "model.safetensors")
    ema = load_file(path / _EMA) if _EMA in state.get("files", [_EMA]) and (path / _EMA).is_file() else {}
    rest, run = state.get("rest", {}), state.get("run", {})
    # An earlier version had not all of today's fields. They had the values that are now their defaults.
    model_config = _merged(config_files.plain(BiomedClipConfig()), state["model_config"])
    return Checkpoint(state["step"], model, optimizer, state["data"], model_config, rest, ema, run)


def _merged(defaults: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """The saved values, and the defaults of the fields that were not saved."""
    tables = {name: value for name, value in defaults.items() if isinstance(value, Mapping)}
    return {
        **defaults,
        **{name: _merged(tables[name], value) if name in tables else value for name, value in saved.items()},
    }


def read_state(path: Path) -> dict[str, Any]:
    """The content of state.json of a checkpoint that passed `verify`."""
    state: dict[str, Any] = json.loads((path / "state.json").read_bytes())
    return state


def misfit(saved: Mapping[str, Tensor], model: Mapping[str, Tensor]) -> str | None:
    """`visual.proj is of shape (32, 24), but the model has (64, 24)`, for the first tensor. None if all fit."""
    for name in dict.fromkeys([*model, *saved]):
        if name not in saved:
            return f"it has no tensor {name}"
        if name not in model:
            return f"its tensor {name} is not in the model"
        if saved[name].shape != model[name].shape:
            return f"its {name} is of shape {tuple(saved[name].shape)}, but the model has {tuple(model[name].shape)}"
    return None


def first_difference(saved: Mapping[str, Any], config: Mapping[str, Any], prefix: str = "model") -> str | None:
    """`model.text.width is 128, but this run has 256`, for the first key with different values. None if all agree."""
    for name in sorted({*saved, *config}):
        saved_value, value = saved.get(name), config.get(name)
        if isinstance(saved_value, Mapping) and isinstance(value, Mapping):
            if difference := first_difference(saved_value, value, f"{prefix}.{name}"):
                return difference
        elif saved_value != value:
            return f"{prefix}.{name} is {saved_value}, but this run has {value}"
    return None


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, newest first."""
    if not folder.is_dir():
        return []
    paths = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(paths, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """The step of a checkpoint, from its name."""
    return int(path.name.removeprefix("step-"))


def _describe(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": sha256_of_file(path)}


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
