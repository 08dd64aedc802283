"""Functions on several gloo ranks of this machine."""

from __future__ import annotations

import multiprocessing.context
import multiprocessing.forkserver
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes

# DeepSpeed's ZeRO loads torch's compiler (2 CPU seconds), and training loads DeepSpeed and TensorBoard.
PRELOADED = [
    "torch", "torch._inductor.compile_fx", "deepspeed", "torch.utils.tensorboard", "bclip_fast.train.trainer",
]  # fmt: skip


def fork_server() -> multiprocessing.context.ForkServerContext:
    """Return a context whose processes start with the modules of PRELOADED. Its server imports them once.

    conftest.py starts the server before the tests, because its children inherit the server's environment.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    multiprocessing.forkserver.ensure_running()
    return context


def on_ranks(num_ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Return the result of `function(rank, *args)` of each rank.

    function: function at the top level of a module. Its result must be something that torch.save accepts.
    """
    with tempfile.TemporaryDirectory() as folder:
        method = fork_server().get_start_method()
        start_processes(_run, (num_ranks, folder, function, args), nprocs=num_ranks, start_method=method)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(num_ranks)]


def _run(rank: int, num_ranks: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=num_ranks)
    # A function may leave the group at once. A rank that still connects would then fail: "Connection closed by peer".
    dist.barrier()
    try:
        torch.save(function(rank, *args), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()
