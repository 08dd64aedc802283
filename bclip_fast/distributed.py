"""The process group: started from the launcher's environment, asked for rank and size, nothing else."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from .errors import UserError


def init(backend: str | None = None, timeout_seconds: float = 1800.0) -> None:
    """Joins the group that torchrun, deepspeed or Slurm's environment describes; does nothing for a single process.

    `backend` is nccl where CUDA is available and gloo elsewhere. `timeout_seconds` bounds every collective, so a lost
    rank ends the others with an error that names the collective.
    """
    if dist.is_initialized() or "RANK" not in os.environ:
        return
    missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(f"RANK={os.environ['RANK']} is set but {', '.join(missing)} is not: launch with torchrun")
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
    backend = backend or ("nccl" if torch.cuda.is_available() else "gloo")
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def total(number: int) -> int:
    """The sum over all ranks."""
    if world_size() == 1:
        return number
    device = torch.device("cuda", local_rank()) if dist.get_backend() == "nccl" else torch.device("cpu")
    value = torch.tensor(number, device=device)
    dist.all_reduce(value)
    return int(value)


def all_gather_object(value: Any) -> list[Any]:
    """Every rank's `value`, in rank order. The values are pickled: use it between trusted ranks only."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_object(value: Any) -> Any:
    """Rank 0's `value` on every rank."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def shutdown() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
