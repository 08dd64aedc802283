"""The process group: started from the launcher's environment, asked for rank and size, nothing else."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from .errors import UserError


def init(backend: str | None = None, timeout_seconds: float = 1800.0) -> None:
    """Joins the group that torchrun, deepspeed or srun's environment describes; does nothing for a single process.

    `backend` is nccl where CUDA is available and gloo elsewhere. `timeout_seconds` bounds every collective, so a lost
    rank ends the others with an error that names the collective.
    """
    if dist.is_initialized():
        return
    os.environ.update(slurm_variables(os.environ))
    if "RANK" not in os.environ:
        return
    missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(f"RANK={os.environ['RANK']} is set but {', '.join(missing)} is not: launch with torchrun")
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
    backend = backend or ("nccl" if torch.cuda.is_available() else "gloo")
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))


def slurm_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables for a task of srun, from Slurm's; none where RANK is set or srun started one task alone.

    Only srun sets SLURM_STEP_NUM_TASKS: the batch script itself, which has SLURM_PROCID=0 too, is not a rank. Rank 0's
    host is the step's first; MASTER_ADDR and MASTER_PORT may say otherwise. A task to which srun shows one GPU alone
    (--gpus-per-task=1) calls it 0, whatever its number on the node.
    """
    number = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if "RANK" in environment or number == 1:
        return {}
    nodes = environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"]
    # Steps of one job may run at the same time; ports below 32768 are not given out by Linux itself.
    job, step = int(environment["SLURM_JOB_ID"]), int(environment.get("SLURM_STEP_ID", "0"))
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": str(number),
        "LOCAL_RANK": "0" if torch.cuda.device_count() == 1 else environment["SLURM_LOCALID"],
        "MASTER_ADDR": environment.get("MASTER_ADDR") or first_host(nodes),
        "MASTER_PORT": environment.get("MASTER_PORT") or str(12000 + (job * 31 + step) % 20000),
    }


def first_host(nodes: str) -> str:
    """The first of Slurm's compressed list: "gpu[03-07,9]-ib,login1" gives "gpu03-ib"."""
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", re.split(r",(?![^\[]*\])", nodes)[0])


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
