"""Checkpoints that are whole or absent: written aside, hashed, renamed; read only where every hash agrees.

    checkpoints/step-00001000/
      model.safetensors       the fp32 parameters and buffers, under the model's names
      optimizer.safetensors   AdamW's moments, `exp_avg.NAME` and `exp_avg_sq.NAME`
      ema.safetensors         the average of the trained parameters, where the run keeps one
      state.json              step, position in the data, updates made, loss scale, model configuration, what else the
                              trainer's rules remember (the last losses, the best validation)
      manifest.json           size and SHA-256 of the others; written last

They hold no pickle, so reading one runs no code, and nothing of the engine or the number of ranks: what DeepSpeed's
universal checkpoints are made for, by a conversion after the run, is so from the start; those hold pickles, and the
trainer's state of DeepSpeed instead of ours, so they are neither read nor written. Random states need no place here:
the trainer seeds each step from (seed, step, rank).
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from bclip_fast.errors import UserError
from bclip_fast.io.atomic import replacing_folder
from bclip_fast.io.hashing import sha256_of_file

from .engine.optimizer import OptimizerState

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
_NAME = re.compile(r"step-\d{8,}")
_FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
_AVERAGE = "ema.safetensors"


@dataclass
class Checkpoint:
    """What a run continues from. `data` is ShardSampler.state_dict(), `model_config` the configuration as JSON."""

    step: int
    model: dict[str, Tensor]
    optimizer: OptimizerState
    data: dict[str, Any]
    model_config: dict[str, Any]
    rest: dict[str, Any] = field(default_factory=dict)
    ema: dict[str, Tensor] = field(default_factory=dict)


def save(
    folder: Path, checkpoint: Checkpoint, *, keep: int = 0, keep_every_steps: int = 0, best: int | None = None
) -> Path:
    """Writes `folder`/step-XXXXXXXX, then removes all but the `keep` newest (0: none are removed), those of every
    `keep_every_steps` steps, and that of step `best`.

    Called by one process. Raises UserError where it cannot be written; older checkpoints are then untouched.
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
    }
    with written(target, "; older checkpoints are untouched"):
        # Processes that were killed leave partial folders behind.
        for stale in folder.glob(".step-*.partial"):
            shutil.rmtree(stale, ignore_errors=True)
        # A folder of this name exists only if it is broken and the run resumed from an older checkpoint.
        with replacing_folder(target) as partial:
            save_file({name: tensor.contiguous() for name, tensor in checkpoint.model.items()}, partial / _FILES[0])
            save_file({name: tensor.contiguous() for name, tensor in moments.items()}, partial / _FILES[1])
            if checkpoint.ema:
                save_file({name: tensor.contiguous() for name, tensor in checkpoint.ema.items()}, partial / _AVERAGE)
            _write_json(partial / _FILES[2], state)
            _write_json(partial / "manifest.json", {path.name: _describe(path) for path in partial.iterdir()})
    for old in steps(folder)[keep:] if keep else []:
        step = int(old.name[5:])
        if step != best and not (keep_every_steps and step % keep_every_steps == 0):
            shutil.rmtree(old)
    return target


@contextlib.contextmanager
def written(target: Path, note: str = "") -> Iterator[None]:
    """Turn a failure to write `target` into a UserError whose message ends with `note`."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"{target}: cannot be written: {error}{note}") from error


class Writer:
    """Has checkpoints written one at a time, by a thread where `background` is true, by the caller elsewhere.

    A write that fails with UserError is logged as a warning and forgotten when the next succeeds: a disk that is full
    for a while doesn't end a run.
    """

    def __init__(self, background: bool) -> None:
        self._background = background
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def submit(self, write: Callable[[], object]) -> None:
        """Starts `write()`, once the one before has ended."""
        self.wait()
        # A daemon: what is killed while it writes leaves no whole checkpoint, and need not be waited for.
        self._thread = threading.Thread(target=self._run, args=(write,), name="bclip-checkpoint", daemon=True)
        self._thread.start()
        if not self._background:
            self.wait()

    def wait(self) -> None:
        """Returns when nothing is being written. Raises what is no UserError."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None and not isinstance(self._error, UserError):
            raise self._error

    def finish(self) -> None:
        """Waits for the last checkpoint. Raises the UserError with which it failed."""
        self.wait()
        if self._error is not None:
            raise self._error

    def _run(self, write: Callable[[], object]) -> None:
        try:
            write()
            self._error = None
        except UserError as error:
            log.warning("%s; training goes on, the next checkpoint is tried when it is due", error)
            self._error = error
        except Exception as error:
            self._error = error


def load_latest(folder: Path) -> Checkpoint:
    """The newest checkpoint that is whole; a broken one is passed over with a warning that says what is wrong.

    Raises:
        UserError: there is none.
    """
    names = steps(folder)
    for path in names:
        if problem := verify(path):
            log.warning("%s is not used: %s", path, problem)
            continue
        return read(path)
    found = f"none of its {len(names)} is whole" if names else "it holds none"
    raise UserError(f"{folder}: no checkpoint to resume from, {found}; begin in another folder")


def verify(path: Path) -> str | None:
    """What is wrong with a checkpoint, None where every file has the size and the hash of the manifest."""
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
        for name in {*_FILES, *manifest}:
            file = path / name
            size = file.stat().st_size
            if size != manifest[name]["size"]:
                return f"{name} has {size} bytes, should have {manifest[name]['size']}"
            if _describe(file) != manifest[name]:
                return f"{name} is corrupt, its SHA-256 is not that of the manifest"
    except OSError as error:
        return f"{Path(str(error.filename)).name} cannot be read: {error.strerror}"
    except (ValueError, KeyError, TypeError) as error:
        return f"manifest.json is corrupt: {error!r}"
    return None


def read(path: Path) -> Checkpoint:
    """Reads a checkpoint that `verify` passed. Raises UserError where its format is another."""
    from safetensors.torch import load_file

    state = json.loads((path / "state.json").read_bytes())
    if state.get("version") != FORMAT_VERSION:
        raise UserError(f"{path}: format version {state.get('version')}, this release reads {FORMAT_VERSION}")
    moments: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(path / "optimizer.safetensors").items():
        moment, name = key.split(".", 1)
        moments.setdefault(name, {})[moment] = tensor
    optimizer = OptimizerState(state["optimizer"]["num_steps"], moments, state["optimizer"]["loss_scale"])
    model = load_file(path / "model.safetensors")
    ema = load_file(path / _AVERAGE) if (path / _AVERAGE).is_file() else {}
    rest = state.get("rest", {})
    return Checkpoint(state["step"], model, optimizer, state["data"], state["model_config"], rest, ema)


def first_difference(saved: Mapping[str, Any], own: Mapping[str, Any], prefix: str = "model") -> str | None:
    """`model.text.width is 128 there and 256 here` for the first key in which two configurations differ."""
    for name in sorted({*saved, *own}):
        there, here = saved.get(name), own.get(name)
        if isinstance(there, Mapping) and isinstance(here, Mapping):
            if difference := first_difference(there, here, f"{prefix}.{name}"):
                return difference
        elif there != here:
            return f"{prefix}.{name} is {there} there and {here} here"
    return None


def steps(folder: Path) -> list[Path]:
    """The checkpoints, newest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)


def _describe(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": sha256_of_file(path)}


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
