"""The process group: started from the launcher's environment, asked for rank and size, nothing else."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from .errors import UserError, first_line

T = TypeVar("T")

# How long a rank that met a failed collective waits to hear from the others; rank 0, where the store may live, longer.
_GRACE_S = 5.0
_COLLECTIVE = re.compile(r"gloo|NCCL|Connection (closed|reset)|CollectiveError")
_KEY = "bclip/{}/{}"


def init(backend: str | None = None, timeout_seconds: float = 1800.0) -> None:
    """Joins the group that torchrun, deepspeed or srun's environment describes; does nothing for a single process.

    `backend` is nccl where CUDA is available and gloo elsewhere. `timeout_seconds` bounds every collective and this
    call, so a lost rank ends the others: gloo's in `explain_lost_ranks`; NCCL's watchdog ends the process by itself,
    with a log that names the collective.

    Raises:
        UserError: the environment lacks a variable, or the ranks don't come together in time.
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
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))
    except RuntimeError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(
            f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} on {socket.gethostname()}: the ranks didn't meet "
            f"at {where} within {timeout_seconds:g} s: {_reason(error)}"
        ) from error
    _store().set(_KEY.format("host", rank()), f"{socket.gethostname()}, process {os.getpid()}")


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


def device() -> torch.device:
    """Where this rank computes: its own GPU, or the CPU where there is none."""
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


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


def run_on_rank0(function: Callable[[], T]) -> T:
    """What `function` returns on rank 0, on every rank; its UserError is raised on every rank too."""
    result: tuple[Any, str | None] = (None, None)
    if is_main():
        try:
            result = function(), None
        except UserError as error:
            result = None, str(error)
    value, problem = broadcast_object(result)
    if problem is not None:
        raise UserError(problem)
    return value


def shutdown() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def explain_lost_ranks() -> Iterator[None]:
    """Around what all ranks run: where a collective fails because a rank is gone or silent, the error says which one.

    A rank that ends by an error of its own tells it to the others here. Those that meet a failed collective wait a few
    seconds to hear who else does; a rank that isn't heard of is the likely cause.

    Raises:
        UserError: in place of a collective's error.
    """
    try:
        yield
    except Exception as error:
        if world_size() == 1:
            raise
        failed = isinstance(error, RuntimeError) and _COLLECTIVE.search(f"{type(error).__name__} {error}") is not None
        with contextlib.suppress(RuntimeError):
            _store().set(_KEY.format("ended", rank()), "" if failed else f"{type(error).__name__}: {_reason(error)}")
        if not failed:
            raise
        raise UserError(
            f"rank {rank()}: {_collective_of(error)} failed: {_reason(error)}. {_likely_cause()}. "
            "The same command with --resume goes on from the newest checkpoint"
        ) from error


def _likely_cause() -> str:
    """What the other ranks say, or which of them are silent."""
    others = [number for number in range(world_size()) if number != rank()]
    deadline = time.monotonic() + _GRACE_S
    try:
        while silent := [number for number in others if not _store().check([_KEY.format("ended", number)])]:
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        causes = [f"rank {n} ({_told('host', n)}) is lost or stuck" for n in silent]
        causes += [f"rank {n} ended by {told}" for n in others if n not in silent and (told := _told("ended", n))]
    except RuntimeError:
        return "The ranks' store is gone, so the machine or process of rank 0 is lost"
    if is_main():
        # The others may still be reading.
        time.sleep(1.0)
    return "; ".join(causes) or "All ranks met it: the network between them"


def _told(kind: str, number: int) -> str:
    key = _KEY.format(kind, number)
    return _store().get(key).decode() if _store().check([key]) else "unknown host"


def _collective_of(error: BaseException) -> str:
    """The torch.distributed function that raised, and ours that called it."""
    frames = traceback.extract_tb(error.__traceback__)
    names = [frame.name for frame in frames if frame.filename.endswith("distributed_c10d.py")]
    ours = [frame.name for frame in frames if f"{os.sep}bclip_fast{os.sep}" in frame.filename]
    what = next((name for name in names if name != "wrapper"), frames[-1].name)
    return f"{what} in {ours[-1]}" if ours else what


def _reason(error: BaseException) -> str:
    """gloo's messages begin with a line of its source and end with advice."""
    text = first_line(error).partition(" This is typically")[0]
    return re.sub(r"^\[[^\]]*\] ", "", text).rstrip(".")


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()
