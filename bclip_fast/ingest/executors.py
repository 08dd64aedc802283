"""Run a function over many tasks: in processes of this machine, or on a Ray cluster. The only import of ray."""

from __future__ import annotations

import multiprocessing
import os
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

ENGINES = ("local", "ray")
_AHEAD_PER_WORKER = 3


@dataclass(frozen=True)
class Crash:
    """What a task gave that ended its process (a decoder crashed, memory ran out)."""


def run(
    engine: str, function: Callable[[Any], Any], tasks: Iterable[Any], workers: int, *, preload: Sequence[str] = ()
) -> Iterator[tuple[Any, Any | Crash]]:
    """(task, result) of every task, in the order in which they end; few tasks are held at a time.

    If `function` raises, the run stops. If its process dies, only that task is lost and yields `Crash`.

    Args:
        workers: number of processes. 0: one for each core (of the cluster under ray). 1 under `local`: this process.
        preload: modules that the fork server of `local` imports once for all worker processes.
    """
    if engine == "ray":
        yield from _ray(function, tasks, workers)
        return
    workers = workers or num_cores()
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
            for task in islice(waiting, _AHEAD_PER_WORKER * workers - len(running)):
                try:
                    running[pool.submit(function, task)] = task
                except BrokenProcessPool:
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
                # A process took the pool along; whose it was is found by giving each task a pool of its own.
                suspects += running.values()
                running.clear()
                for task in suspects:
                    yield task, _alone(function, task, preload)
                pool = _pool(workers, preload)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def num_cores() -> int:
    return len(os.sched_getaffinity(0))


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """A folder for the files of a task, from where it moves them when they are whole."""
    with tempfile.TemporaryDirectory(dir=parent, prefix=".") as folder:
        yield Path(folder)


def _pool(workers: int, preload: Sequence[str]) -> ProcessPoolExecutor:
    # A fork server has no threads of ours, whose locks a plain fork would copy; it imports the work once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_the_parent)


def _end_with_the_parent() -> None:
    """A worker whose run was killed must not live on. Nor may it wait for its fork server's end, which waits for it."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _alone(function: Callable[[Any], Any], task: Any, preload: Sequence[str]) -> Any | Crash:
    with _pool(1, preload) as pool:
        try:
            return pool.submit(function, task).result()
        except BrokenProcessPool:
            return Crash()


def _ray(function: Callable[[Any], Any], tasks: Iterable[Any], workers: int) -> Iterator[tuple[Any, Any | Crash]]:
    """On the cluster that RAY_ADDRESS names, else one of this machine's. All nodes must see the same folders."""
    import ray

    started = not ray.is_initialized()
    if started:
        address = os.environ.get("RAY_ADDRESS")
        where = {"address": address} if address else {"num_cpus": workers or None, "include_dashboard": False}
        ray.init(log_to_driver=False, **where)
    remote = ray.remote(max_retries=0)(function)
    workers = workers or int(ray.cluster_resources().get("CPU", 1))
    waiting = iter(tasks)
    running: dict[Any, Any] = {}
    try:
        while True:
            for task in islice(waiting, _AHEAD_PER_WORKER * workers - len(running)):
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
        if started:
            ray.shutdown()
