"""Runs a function on n gloo ranks of this machine and brings back each rank's result."""

from __future__ import annotations

import multiprocessing.context
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes


def fork_server() -> multiprocessing.context.ForkServerContext:
    """For processes that find torch imported, and its compiler, which comes with the first optimiser: once for all of a
    process of tests, in the environment it had then."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch._dynamo"])
    return context


def on_ranks(num_ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """`function(rank, *args)` must be importable (a module's function); its results must be what torch.save takes."""
    with tempfile.TemporaryDirectory() as folder:
        method = fork_server().get_start_method()
        start_processes(_run, (num_ranks, folder, function, args), nprocs=num_ranks, start_method=method)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(num_ranks)]


def _run(rank: int, num_ranks: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=num_ranks)
    try:
        torch.save(function(rank, *args), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()
