"""The process group: joining it, rank and size, collectives of Python objects, and errors that name lost ranks."""

from __future__ import annotations

import contextlib
import itertools
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

from bclip_fast.errors import UserError, first_line

T = TypeVar("T")

# How long a rank whose collective failed waits for news of the others. Rank 0 waits longer: it may hold the store.
_GRACE_S = 5.0
_COLLECTIVE = re.compile(r"gloo|NCCL|Connection (closed|reset)|CollectiveError")
_KEY = "bclip/{}/{}"
_uses = itertools.count()


def init(backend: str | None = None, timeout_seconds: float = 1800.0) -> None:
    """Join the group that the environment of torchrun, deepspeed or srun describes. Without one, do nothing.

    Args:
        backend: default `default_backend()`.
        timeout_seconds: limit of this call and of every collective, after which a lost rank ends the others. With
            gloo they end in `explain_lost_ranks`. NCCL's watchdog ends the process, and its log names the collective.

    Raises:
        UserError: the environment lacks a variable, or the ranks don't meet in time.
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
    try:
        dist.init_process_group(timeout=timedelta(seconds=timeout_seconds), **group_options(backend))
    except RuntimeError as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(
            f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} on {socket.gethostname()}: the ranks didn't meet "
            f"at {address} within {timeout_seconds:g} s: {_reason(error)}"
        ) from error
    _store().set(_KEY.format("host", rank()), f"{socket.gethostname()}, process {os.getpid()}")


def default_backend() -> str:
    """The backends of the group. If CUDA is available: NCCL for tensors on GPUs, and gloo for messages of the hosts.

    A message through NCCL makes the host wait for all work that its GPU has queued. gloo does not touch the GPU.
    """
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def group_options(backend: str | None = None) -> dict[str, Any]:
    """Keywords of `init_process_group`: the backend, by default `default_backend()`, and for NCCL this rank's GPU.

    Without the GPU, torch guesses one in `barrier()`, and connects NCCL only in the first collective.
    """
    backend = backend or default_backend()
    return {"backend": backend} | ({"device_id": device()} if "nccl" in backend else {})


def slurm_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Translate Slurm's variables of a task of srun to torchrun's. Empty if RANK is set or srun started only one task.

    Only srun sets SLURM_STEP_NUM_TASKS. The batch script itself isn't a rank, although it has SLURM_PROCID=0, too.
    Rank 0 runs on the step's first host. MASTER_ADDR and MASTER_PORT override its address. If srun shows a task only
    one GPU (--gpus-per-task=1), that GPU has number 0 in the task.
    """
    num_tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if "RANK" in environment or num_tasks == 1:
        return {}
    nodes = environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"]
    # Steps of one job may run at the same time. Linux doesn't assign ports below 32768 by itself.
    job, step = int(environment["SLURM_JOB_ID"]), int(environment.get("SLURM_STEP_ID", "0"))
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": str(num_tasks),
        "LOCAL_RANK": "0" if torch.cuda.device_count() == 1 else environment["SLURM_LOCALID"],
        "MASTER_ADDR": environment.get("MASTER_ADDR") or first_host(nodes),
        "MASTER_PORT": environment.get("MASTER_PORT") or str(12000 + (job * 31 + step) % 20000),
    }


def first_host(nodes: str) -> str:
    """Return the first host of Slurm's compressed list: "gpu[03-07,9]-ib,login1" -> "gpu03-ib"."""
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", re.split(r",(?![^\[]*\])", nodes)[0])


def rank() -> int:
    """This process's rank, 0 without a group."""
    return dist.get_rank() if dist.is_initialized() else 0


def local_rank() -> int:
    """This process's rank on its machine, 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def device() -> torch.device:
    """The device of this rank: a GPU if CUDA is available, else the CPU."""
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def world_size() -> int:
    """Number of ranks, 1 without a group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is rank 0."""
    return rank() == 0


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def message_device(otherwise: torch.device, group: dist.ProcessGroup | None = None) -> torch.device:
    """The device of the tensors in which hosts send each other numbers.

    Args:
        otherwise: GPU of this rank. It is the result only if the group has no backend for tensors on the CPU. Then
            the host waits for the GPU at each message.
        group: default: the group of all ranks.
    """
    return torch.device("cpu") if "cpu:" in dist.get_backend_config(group) else otherwise


def total(number: int) -> int:
    """Return the sum of a number over all ranks."""
    if world_size() == 1:
        return number
    value = torch.tensor(number, device=message_device(device()))
    dist.all_reduce(value)
    return int(value)


def totals(numbers: torch.Tensor) -> torch.Tensor:
    """Return the sums of a tensor's elements over all ranks, on the CPU."""
    if world_size() == 1:
        return numbers
    sums = numbers.to(message_device(device()), copy=True)
    dist.all_reduce(sums)
    return sums.cpu()


def all_gather_object(value: Any) -> list[Any]:
    """Return every rank's `value`, in rank order. Values are pickled, so all ranks must be trusted."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def num_equal(numbers: torch.Tensor) -> torch.Tensor:
    """Count the numbers (n,) that occur more than once on all ranks: an int64 scalar, without a wait for the device."""
    if world_size() > 1:
        # Like the losses, learn how many numbers each rank has without the GPU.
        sizes = torch.zeros(world_size(), dtype=torch.int64, device=message_device(numbers.device))
        sizes[rank()] = len(numbers)
        dist.all_reduce(sizes)
        counts = sizes.tolist()
        padded = numbers.new_zeros(max(counts))
        padded[: len(numbers)] = numbers
        every = numbers.new_empty(world_size() * max(counts))
        dist.all_gather_into_tensor(every, padded)
        parts = every.view(world_size(), -1)
        numbers = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
    ordered = numbers.sort().values
    equal = ordered[1:] == ordered[:-1]
    single = equal.new_zeros(1)
    return (torch.cat([equal, single]) | torch.cat([single, equal])).sum()


def broadcast_object(value: Any) -> Any:
    """Return rank 0's `value` on every rank."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def run_on_rank0(function: Callable[[], T]) -> T:
    """Call `function` on rank 0 and return its result on every rank. Every rank raises its UserError, too."""
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


def turns(num: int) -> Iterator[int]:
    """Yield the numbers 0 to `num` - 1 in ascending order, each on one rank only. A faster rank gets more of them.

    All ranks must call it, in the same order of calls and with the same `num`.
    """
    key = _KEY.format("turns", next(_uses))
    local = itertools.count()
    while (turn := _store().add(key, 1) - 1 if world_size() > 1 else next(local)) < num:
        yield turn


def shutdown() -> None:
    """Leave the group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def explain_lost_ranks(
    remedy: str = "The same command with --resume goes on from the newest checkpoint",
) -> Iterator[None]:
    """Context around the work of all ranks. If a collective fails, its error names the rank that is lost or stuck.

    A rank that ends by another error reports it to the others here. A rank whose collective failed waits a few seconds
    for reports. A rank that doesn't report is the likely cause.

    Args:
        remedy: last sentence of the error.

    Raises:
        UserError: replaces a collective's error.
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
            f"rank {rank()}: {_collective_of(error)} failed: {_reason(error)}. {_likely_cause()}. {remedy}"
        ) from error


def _likely_cause() -> str:
    """Describe the errors that the other ranks reported, and the ranks that are silent."""
    others = [number for number in range(world_size()) if number != rank()]
    deadline = time.monotonic() + _GRACE_S
    try:
        while silent := [number for number in others if not _store().check([_KEY.format("ended", number)])]:
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        causes = [f"rank {n} ({_reported('host', n)}) is lost or stuck" for n in silent]
        reports = {n: _reported("ended", n) for n in others if n not in silent}
        causes += [f"rank {n} ended by {report}" for n, report in reports.items() if report]
    except RuntimeError:
        return "The ranks' store is gone, so the machine or process of rank 0 is lost"
    if is_main():
        # The other ranks may still read the store.
        time.sleep(1.0)
    return "; ".join(causes) or "It failed on all ranks, so the likely cause is the network between them"


def _reported(kind: str, number: int) -> str:
    key = _KEY.format(kind, number)
    return _store().get(key).decode() if _store().check([key]) else "unknown host"


def _collective_of(error: BaseException) -> str:
    """Return the names of the torch.distributed function that raised, and of our function that called it."""
    frames = traceback.extract_tb(error.__traceback__)
    names = [frame.name for frame in frames if frame.filename.endswith("distributed_c10d.py")]
    ours = [frame.name for frame in frames if f"{os.sep}bclip_fast{os.sep}" in frame.filename]
    collective = next((name for name in names if name != "wrapper"), frames[-1].name)
    return f"{collective} in {ours[-1]}" if ours else collective


def _reason(error: BaseException) -> str:
    """Shorten an error's message. gloo's messages begin with a line of its source and end with advice."""
    text = first_line(error).partition(" This is typically")[0]
    return re.sub(r"^\[[^\]]*\] ", "", text).rstrip(".")


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()
