"""A pool of daemon threads. They don't block the interpreter's exit, even if one is stuck in a read."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class DaemonPool:
    """A pool with the `submit` of ThreadPoolExecutor. Unlike that class, it never delays the interpreter's exit."""

    def __init__(self, num_threads: int, name: str) -> None:
        self._tasks: queue.SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]] | None] = (
            queue.SimpleQueue()
        )
        self._threads = [
            threading.Thread(target=_run_tasks, args=(self._tasks,), name=f"{name}-{i}", daemon=True)
            for i in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, function: Callable[..., T], *args: Any) -> Future[T]:
        """Schedule a call of `function`."""
        future: Future[T] = Future()
        self._tasks.put((future, function, args))
        return future

    def close(self, wait_s: float) -> bool:
        """End the threads after the submitted calls. Return False if a thread still runs after `wait_s` seconds."""
        for _ in self._threads:
            self._tasks.put(None)
        deadline = time.monotonic() + wait_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)


def _run_tasks(tasks: queue.SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]] | None]) -> None:
    while (task := tasks.get()) is not None:
        future, function, args = task
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(function(*args))
            except BaseException as error:
                future.set_exception(error)
        # Don't keep the objects of this task alive while waiting for the next one.
        del task, future, function, args
