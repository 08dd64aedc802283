"""How long the parts of a step take."""

from __future__ import annotations

import itertools
import time
from typing import Any

import torch


class StepClock:
    """`start()`, then `mark(part)` where a part ends, then `seconds()`: {"forward_seconds": 0.31, ...}.

    On a GPU the marks are events of its stream, which nothing waits for: `seconds()` are those of the step before,
    whose events have passed by the time that the host has read this step's loss; the first step has none. A part that
    is marked more than once is added up; `leave_out()` ends what belongs to none.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []
        self._before: list[tuple[str, Any]] = []

    def start(self) -> None:
        self._marks = [("", self._now())]

    def mark(self, part: str) -> None:
        self._marks.append((part, self._now()))

    def leave_out(self) -> None:
        self.mark("")

    def seconds(self) -> dict[str, float]:
        marks = self._marks
        if self._on_gpu:
            marks, self._before = self._before, marks
        found: dict[str, float] = {}
        for (_, start), (part, end) in itertools.pairwise(marks):
            if not part:
                continue
            took = start.elapsed_time(end) / 1e3 if self._on_gpu else end - start
            found[f"{part}_seconds"] = found.get(f"{part}_seconds", 0.0) + took
        return found

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
