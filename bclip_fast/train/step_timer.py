"""Timing of the parts of a training step."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch


class StepTimer:
    """Call `start()`, then `lap(part)` at the end of each part, then `finish()`.

    Laps of the same part are added up. `skip()` ends an interval that belongs to no part.

    On a GPU, the laps are events of its stream, and nothing waits for them.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._laps: list[tuple[str, Any]] = []

    def start(self) -> None:
        """Start a step."""
        self._laps = [("", self._now())]

    def lap(self, part: str) -> None:
        """End a part of the step."""
        self._laps.append((part, self._now()))

    def skip(self) -> None:
        """End an interval that no part includes."""
        self.lap("")

    def finish(self) -> Callable[[], dict[str, float]]:
        """Return a function that returns the seconds of each part of this step: {"forward_seconds": 0.31, ...}.

        On a GPU, call it after the host has read a result that was queued after the last lap.
        """
        return partial(self._seconds, self._laps)

    def _seconds(self, laps: list[tuple[str, Any]]) -> dict[str, float]:
        seconds: dict[str, float] = {}
        for (_, start), (part, end) in itertools.pairwise(laps):
            if not part:
                continue
            elapsed = start.elapsed_time(end) / 1e3 if self._on_gpu else end - start
            seconds[f"{part}_seconds"] = seconds.get(f"{part}_seconds", 0.0) + elapsed
        return seconds

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
