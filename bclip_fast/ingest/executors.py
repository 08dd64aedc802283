"""Run a function over many tasks, in processes of this machine or on a Ray cluster. Only this module imports ray."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from bclip_fast.io import system

_TASKS_PER_WORKER = 3


@dataclass(frozen=True)
class Crash:
    """The result of a task whose process died, for example in a decoder or for lack of memory."""


def run(
    engine: str,
    function: Callable[[Any], Any],
    tasks: Iterable[Any],
    workers: int,
    *,
    preload: Sequence[str] = (),
    gpus: float = 0.0,
) -> Iterator[tuple[Any, Any | Crash]]:
    """Yield (task, result) of every task as it ends. Only a few tasks are in memory at a time.

    If `function` raises, the run stops. If its process dies, only that task is lost and yields `Crash`.

    Args:
        workers: number of processes. 0: one for each core (of the cluster under ray). 1 under `local`: this process.
        preload: modules that the fork server of `local` imports once for all worker processes.
        gpus: share of a GPU that a task of ray takes.
    """
    if engine == "ray":
        yield from _run_on_ray(function, tasks, workers, gpus)
        return
    workers = workers or system.num_cores()
    if workers == 1:
        for task in tasks:
            yield task, function(task)
        return
    waiting = iter(tasks)
    running: dict[Future[Any], Any] = {}
    pool = _pool(workers, preload)
    try:
        while True:
            suspects = []
            for task in islice(waiting, _TASKS_PER_WORKER * workers - len(running)):
                if (submitted := _submit(pool, function, task)) is not None:
                    running[submitted] = task
                else:
                    suspects.append(task)
            if not running and not suspects:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                task = running.pop(future)
                try:
                    result = future.result()
                except BrokenProcessPool:
                    suspects.append(task)
                else:
                    yield task, result
            if suspects:
                # A dead process breaks the whole pool. Run each unfinished task in a new pool to find the one at fault.
                suspects += running.values()
                running.clear()
                for task in suspects:
                    yield task, _run_in_new_pool(function, task, preload)
                pool = _pool(workers, preload)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """Yield a temporary folder for the unfinished files of a task."""
    folder = Path(tempfile.mkdtemp(dir=parent, prefix="."))
    try:
        yield folder
    finally:
        # TemporaryDirectory would raise RecursionError without permission to delete.
        shutil.rmtree(folder, ignore_errors=True)


def _pool(workers: int, preload: Sequence[str]) -> ProcessPoolExecutor:
    # A plain fork would copy locks that threads of this process hold. The fork server has no such threads.
    # Windows has none, and its processes import what they need.
    has_fork_server = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if has_fork_server else "spawn")
    if has_fork_server:
        context.set_forkserver_preload(list(preload))
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_exit_with_parent)


def _submit(pool: ProcessPoolExecutor, function: Callable[[Any], Any], task: Any) -> Future[Any] | None:
    """Submit a task. Return None if the pool is broken."""
    try:
        return pool.submit(function, task)
    except BrokenProcessPool:
        return None


def _exit_with_parent() -> None:
    """End this worker when the main process dies, so that a killed run leaves no process behind.

    Waiting for the fork server to end would be a deadlock: the fork server waits for its workers.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _run_in_new_pool(function: Callable[[Any], Any], task: Any, preload: Sequence[str]) -> Any | Crash:
    with _pool(1, preload) as pool:
        try:
            return pool.submit(function, task).result()
        except BrokenProcessPool:
            return Crash()


def num_gpus(engine: str) -> int:
    """Return the number of GPUs of this machine, or of the cluster under ray."""
    if engine == "ray" and os.environ.get("RAY_ADDRESS"):
        import ray

        starts_ray = _start_ray(0)
        count = int(ray.cluster_resources().get("GPU", 0))
        if starts_ray:
            ray.shutdown()
        return count
    import torch

    return torch.cuda.device_count()


def _start_ray(workers: int) -> bool:
    """Connect to the cluster of RAY_ADDRESS, or start one on this machine. Return False if ray runs already."""
    import ray

    if ray.is_initialized():
        return False
    address = os.environ.get("RAY_ADDRESS")
    options = {"address": address} if address else {"num_cpus": workers or None, "include_dashboard": False}
    ray.init(log_to_driver=False, **options)
    return True


def _run_on_ray(
    function: Callable[[Any], Any], tasks: Iterable[Any], workers: int, gpus: float
) -> Iterator[tuple[Any, Any | Crash]]:
    """Run on the cluster of RAY_ADDRESS, else on a new one on this machine. All nodes must share the folders."""
    import ray

    starts_ray = _start_ray(workers)
    remote = ray.remote(max_retries=0, num_gpus=gpus)(function)
    workers = workers or int(ray.cluster_resources().get("CPU", 1))
    waiting = iter(tasks)
    running: dict[Any, Any] = {}
    try:
        while True:
            for task in islice(waiting, _TASKS_PER_WORKER * workers - len(running)):
                running[remote.remote(task)] = task
            if not running:
                return
            (reference,), _ = ray.wait(list(running), num_returns=1)
            try:
                result = ray.get(reference)
            except ray.exceptions.WorkerCrashedError:
                result = Crash()
            yield running.pop(reference), result
    finally:
        if starts_ray:
            ray.shutdown()
