"""`bclip train replay RUN/dumps/step-XXXXXXXX`: compute the step again at which a run gave up.

    dumps/step-00001000/
      config.toml               resolved configuration of the run
      backends.json             the run's choice of backends
      model.safetensors         the weights before the step, which made no update
      batch-0000.safetensors    the batch of rank 0: N.images (b, S, S, 3) uint8, N.ids (T,) and N.lengths (b,) int64
                                of its micro-batch N. Each rank has such a file. A loss with known positives or a
                                teacher adds N.groups (b,) int64 and N.teacher (b, 2, E) float32.
      state.json                step, loss, gradient norm and share of dropped patches; by rank and micro-batch, the
                                seed of the random numbers and the keys of the samples. Written last.

A dump holds no pickle, so its replay runs no code from the dump's author.
"""

from __future__ import annotations

import atexit
import json
import logging
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from bclip_fast import config as config_files
from bclip_fast import distributed
from bclip_fast.data.batch import Batch
from bclip_fast.errors import UserError
from bclip_fast.io import stand_ins
from bclip_fast.io.atomic import put_in_place, write_text

from . import backends
from .config import TrainConfig
from .engine import build_engine
from .grad_cache import GradCache
from .init_weights import new_model
from .losses import CONSTANTS, build_loss
from .resume_rules import Change
from .spill import SpillBuffer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReplayConfig:
    """Compute the step of a dump again, on as many ranks as wrote it, and log its loss and gradient norm."""

    dump: tyro.conf.Positional[Path]
    """RUN/dumps/step-XXXXXXXX."""


@dataclass
class Dump:
    """A step with its inputs and results.

    config: configuration of the run.
    step: number of the step, from 1.
    loss, grad_norm: results of the run. The norm is before clipping.
    patch_dropout: share of dropped patches.
    batches: micro-batches of this rank, each with the seed of its random numbers.
    model: weights. Only rank 0 needs them.
    changes: changes of the run's settings and libraries at its resumes, see run_folder.py.
    teacher_scale: factor of the teacher's logits. 0 without a teacher, whose features are in the batches.
    """

    config: TrainConfig
    step: int
    loss: float
    grad_norm: float
    patch_dropout: float
    batches: list[tuple[Batch, int]]
    model: dict[str, Tensor]
    changes: list[dict[str, Any]] = field(default_factory=list)
    teacher_scale: float = 0.0


def write_dump(run: Path, dump: Dump) -> Path:
    """Write RUN/dumps/step-XXXXXXXX and return it. It is complete, or as it was before. Collective.

    Raises:
        UserError: on every rank, if one of them cannot write.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    folder, rank, problem = run / "dumps" / f"step-{dump.step:08d}", distributed.rank(), ""
    # All ranks write to this folder. It gets its name when it is complete.
    partial = folder.with_name(f".{folder.name}.partial")
    tensors = {}
    for number, (batch, _) in enumerate(dump.batches):
        parts = {"images": batch.images.cpu().contiguous(), "ids": batch.ids, "lengths": torch.tensor(batch.lengths)}
        parts |= {name: rows.cpu() for name in CONSTANTS if (rows := getattr(batch, name)) is not None}
        tensors.update({f"{number}.{name}": tensor for name, tensor in parts.items()})
    try:
        partial.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial / f"batch-{rank:04d}.safetensors")
        if distributed.is_main():
            write_text(partial / "config.toml", config_files.to_toml(dump.config))
            if (choices := run / backends.FILE).exists():
                shutil.copyfile(choices, partial / backends.FILE)
            save_file({name: tensor.contiguous() for name, tensor in dump.model.items()}, partial / "model.safetensors")
    except (OSError, SafetensorError) as error:
        problem = f"rank {rank}: {error}"
    batches = [{"seed": seed, "epoch": batch.epoch, "keys": batch.keys} for batch, seed in dump.batches]
    all_ranks = distributed.all_gather_object((problem, batches))
    if problems := [text for text, _ in all_ranks if text]:
        if distributed.is_main():
            shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"{folder} cannot be written: {'; '.join(problems)}")
    state = {
        "step": dump.step,
        # JSON has no NaN, so these numbers are text.
        "loss": repr(dump.loss),
        "grad_norm": repr(dump.grad_norm),
        "patch_dropout": dump.patch_dropout,
        "teacher_scale": dump.teacher_scale,
        "changes": dump.changes,
        "ranks": [batches for _, batches in all_ranks],
    }

    def finish() -> None:
        try:
            write_text(partial / "state.json", json.dumps(state, indent=1) + "\n")
            put_in_place(partial, folder)
        except OSError as error:
            raise UserError(f"{folder} cannot be written: {error}") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    distributed.run_on_rank0(finish)
    return folder


def read_dump(folder: Path) -> Dump:
    """Read this rank's part of a dump.

    Raises:
        UserError: the folder is not a complete dump, or another number of ranks wrote it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not (folder / "state.json").is_file() and (dumps := sorted(folder.glob("dumps/step-*"))):
        raise UserError(f"{folder} is a run folder, not a step dump; pass {dumps[-1]}")
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        num_ranks, rank = len(state["ranks"]), distributed.rank()
        if num_ranks != distributed.world_size():
            raise UserError(
                f"{folder} needs {num_ranks} rank(s), but {distributed.world_size()} are running: "
                f"torchrun --nproc-per-node {num_ranks} -m bclip_fast.cli train replay {folder}"
            )
        tensors = load_file(folder / f"batch-{rank:04d}.safetensors")
        batches = []
        for i, facts in enumerate(state["ranks"][rank]):
            images, ids, lengths = (tensors[f"{i}.{name}"] for name in ("images", "ids", "lengths"))
            constants: dict[str, Any] = {name: tensors.get(f"{i}.{name}") for name in CONSTANTS}
            batch = Batch(images, ids, lengths.tolist(), facts["keys"], facts["epoch"], **constants)
            batches.append((batch, facts["seed"]))
        model = load_file(folder / "model.safetensors")
        config = config_files.from_toml(TrainConfig, folder / "config.toml")
        results = float(state["loss"]), float(state["grad_norm"])
        # An earlier version recorded neither the changes nor a teacher.
        rest = state.get("changes", []), state.get("teacher_scale", 0.0)
        return Dump(config, state["step"], *results, state["patch_dropout"], batches, model, *rest)
    except (OSError, SafetensorError, json.JSONDecodeError, KeyError, TypeError, IndexError) as error:
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            stand_ins.refuse(path)
        raise UserError(f"{folder} is not a complete step dump: {error}") from error


def replay(config: ReplayConfig) -> int:
    """Compute a dumped step again, and log its loss and gradient norm. Return 1 if they differ from the run's, else 0.

    On one or two ranks, on the run's type of CPU and with as many threads, they are bitwise equal. On more ranks, sums
    run in another order: the first step of a process sends its gradients in other pieces than later steps. A replay in
    fp16 starts with the initial loss scale.
    """
    distributed.init()
    atexit.register(distributed.shutdown)
    # Warnings about backends help only if the folder is a dump.
    dump = read_dump(config.dump)
    for change in dump.changes:
        log.info("resumed after step %s with other %s", change["step"], Change.from_json(change))
    with backends.of_run(config.dump, resumed=True).in_force():
        return _replay(dump)


def _replay(dump: Dump) -> int:
    model = new_model(dump.config)
    model.load_state_dict(dump.model)
    model.visual.patch_dropout = dump.patch_dropout
    engine = build_engine(model.train(), dump.config.engine, dump.config.optim, dump.config.first_batch_size)
    loss_fn = build_loss(dump.config.loss, dump.teacher_scale, dump.config.model.text.pad_id)
    data = dump.config.data
    spill = SpillBuffer(data.spool_above_mib << 20, data.spool_dir)
    cache = GradCache(engine, loss_fn, [len(batch.lengths) for batch, _ in dump.batches], spill)
    for batch, seed in dump.batches:
        cache.add(batch, seed)
    cache.loss()
    loss = float(cache.backward())
    norm = engine.step(0.0, -1.0).grad_norm
    engine.close()
    pairs = {"loss": (dump.loss, loss), "grad_norm": (dump.grad_norm, norm)}
    for name, (in_run, again) in pairs.items():
        log.info("step %d  %s %r in the run, %r computed again", dump.step, name, in_run, again)
    # Compare text, because NaN is not equal to itself.
    return int(any(repr(in_run) != repr(again) for in_run, again in pairs.values()))
