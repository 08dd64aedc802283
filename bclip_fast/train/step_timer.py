"""Timing of the parts of a training step."""

from __future__ import annotations

import itertools
import time
from typing import Any

import torch


class StepTimer:
    """Call `start()`, then `lap(part)` at the end of each part, then `seconds()`.

    `seconds()` returns {"forward_seconds": 0.31, ...}. Laps of the same part are added up. `skip()` ends an interval
    that belongs to no part.

    On a GPU, the laps are events of its stream, and nothing waits for them. There `seconds()` returns the times of the
    step before: its events have passed once the host has read this step's loss. The first step has no times.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._laps: list[tuple[str, Any]] = []
        self._laps_before: list[tuple[str, Any]] = []

    def start(self) -> None:
        """Start a step."""
        self._laps = [("", self._now())]

    def lap(self, part: str) -> None:
        """End a part of the step."""
        self._laps.append((part, self._now()))

    def skip(self) -> None:
        """End an interval that no part includes."""
        self.lap("")

    def seconds(self) -> dict[str, float]:
        """The seconds of each part."""
        laps = self._laps
        if self._on_gpu:
            laps, self._laps_before = self._laps_before, laps
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
