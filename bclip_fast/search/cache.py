"""A cache in memory with a bound on its contents, for threads."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Generic, TypeVar

Value = TypeVar("Value")


class BoundedCache(Generic[Value]):
    """Keeps the values that were used last. Threads that need the same missing value wait for one computation."""

    def __init__(self, max_weight: int, weigh: Callable[[Value], int]) -> None:
        """max_weight: bound on the sum of weights. weigh: returns the weight of a value, such as its bytes."""
        self._max_weight, self._weigh = max_weight, weigh
        self._entries: OrderedDict[Hashable, tuple[Value, int]] = OrderedDict()
        self._running: dict[Hashable, Future[Value]] = {}
        self._lock = threading.Lock()
        self.weight = 0

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """Return the value of `key`: the kept one, or that of `make`. An error of `make` is raised and not kept."""
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
                return self._entries[key][0]
            other = self._running.get(key)
            if other is None:
                future: Future[Value] = Future()
                self._running[key] = future
        if other is not None:
            return other.result()
        try:
            value = make()
        except BaseException as error:
            with self._lock:
                del self._running[key]
            future.set_exception(error)
            raise
        with self._lock:
            del self._running[key]
            self._keep(key, value)
        future.set_result(value)
        return value

    def _keep(self, key: Hashable, value: Value) -> None:
        weight = self._weigh(value)
        if weight > self._max_weight:
            return
        self._entries[key] = value, weight
        self.weight += weight
        while self.weight > self._max_weight:
            self.weight -= self._entries.popitem(last=False)[1][1]
