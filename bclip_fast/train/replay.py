"""The step at which a run gave up, whole enough to be computed again: `bclip train replay RUN/dumps/step-XXXXXXXX`.

    dumps/step-00001000/
      config.toml               of the run, resolved
      backends.json             the run's choice of backends
      model.safetensors         the weights before the step, which made no update
      batch-0000.safetensors    what rank 0 was given: N.images (b, S, S, 3) uint8, N.ids (T,) and N.lengths (b,) int64
                                of its micro-batch N; a file a rank
      state.json                the step, its loss and gradient norm, the share of patches dropped; by rank and
                                micro-batch the seed of its random numbers and its keys; written last

It holds no pickle, so computing one again runs no code of its maker's.
"""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor

from bclip_fast import config as config_files
from bclip_fast import distributed
from bclip_fast.data.loader import Batch
from bclip_fast.errors import UserError

from . import backends
from .config import TrainConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReplayConfig:
    """Computes the step of a dump again, on as many ranks as made it, and logs its loss and gradient norm."""

    dump: tyro.conf.Positional[Path]
    """RUN/dumps/step-XXXXXXXX."""


@dataclass
class Dump:
    """config: the run's. step: its number from 1. loss, grad_norm: what the run found; the norm is before clipping.

    batches: this rank's micro-batches, each with the seed of its random numbers. model: the weights, on rank 0.
    """

    config: TrainConfig
    step: int
    loss: float
    grad_norm: float
    patch_dropout: float
    batches: list[tuple[Batch, int]]
    model: dict[str, Tensor]


def write(run: Path, dump: Dump) -> Path:
    """Writes RUN/dumps/step-XXXXXXXX and returns it. Collective; the weights are needed on rank 0 alone.

    Raises:
        UserError: on every rank, where one can't write.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    folder, rank, problem = run / "dumps" / f"step-{dump.step:08d}", distributed.rank(), ""
    tensors = {}
    for number, (batch, _) in enumerate(dump.batches):
        parts = {"images": batch.images.contiguous(), "ids": batch.ids, "lengths": torch.tensor(batch.lengths)}
        tensors.update({f"{number}.{name}": tensor for name, tensor in parts.items()})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / f"batch-{rank:04d}.safetensors")
        if distributed.is_main():
            (folder / "config.toml").write_text(config_files.to_toml(dump.config), encoding="utf-8")
            if (chosen := run / backends.FILE).exists():
                shutil.copyfile(chosen, folder / backends.FILE)
            save_file({name: tensor.contiguous() for name, tensor in dump.model.items()}, folder / "model.safetensors")
    except (OSError, SafetensorError) as error:
        problem = f"rank {rank}: {error}"
    batches = [{"seed": seed, "epoch": batch.epoch, "keys": batch.keys} for batch, seed in dump.batches]
    told = distributed.all_gather_object((problem, batches))
    if problems := [text for text, _ in told if text]:
        raise UserError(f"{folder}: cannot be written: {'; '.join(problems)}")
    state = {
        "step": dump.step,
        # As text, for JSON has no NaN.
        "loss": repr(dump.loss),
        "grad_norm": repr(dump.grad_norm),
        "patch_dropout": dump.patch_dropout,
        "ranks": [batches for _, batches in told],
    }
    if distributed.is_main():
        (folder / "state.json").write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
    return folder


def read(folder: Path) -> Dump:
    """This rank's part of a dump.

    Raises:
        UserError: no dump, or one of another number of ranks.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        num_ranks, rank = len(state["ranks"]), distributed.rank()
        if num_ranks != distributed.world_size():
            raise UserError(
                f"{folder} was made by {num_ranks} rank(s), here are {distributed.world_size()}: "
                f"torchrun --nproc-per-node {num_ranks} -m bclip_fast.cli train replay {folder}"
            )
        tensors = load_file(folder / f"batch-{rank:04d}.safetensors")
        batches = []
        for i, told in enumerate(state["ranks"][rank]):
            images, ids, lengths = (tensors[f"{i}.{name}"] for name in ("images", "ids", "lengths"))
            batches.append((Batch(images, ids, lengths.tolist(), told["keys"], told["epoch"]), told["seed"]))
        model = load_file(folder / "model.safetensors")
        config = config_files.from_toml(TrainConfig, folder / "config.toml")
        found = float(state["loss"]), float(state["grad_norm"])
        return Dump(config, state["step"], *found, state["patch_dropout"], batches, model)
    except (OSError, SafetensorError, json.JSONDecodeError, KeyError) as error:
        raise UserError(f"{folder} is no whole dump of a step: {error}") from error
