"""Progress of a run on the terminal."""

from __future__ import annotations

import logging
import sys
import time
from datetime import timedelta
from typing import Any

from bclip_fast.io.progress import SECONDS_BETWEEN_LINES

log = logging.getLogger(__name__)


class Progress:
    """A progress bar if stderr is a terminal, and a log line every 15 seconds otherwise.

    The remaining time follows from the samples, because the batch size may grow.

    Args:
        num_steps: number of steps of the run.
        first_sample: samples consumed before this process started.
        num_samples: samples consumed at the end of the run.
    """

    def __init__(self, num_steps: int, first_sample: int, num_samples: int) -> None:
        self._num_steps, self._first_sample, self._num_samples = num_steps, first_sample, num_samples
        self._start = time.monotonic()
        self._last_line = -SECONDS_BETWEEN_LINES
        self._bar: Any = None
        if sys.stderr.isatty():
            from rich import progress
            from rich.console import Console

            self._bar = progress.Progress(
                progress.TextColumn("training"),
                progress.BarColumn(bar_width=None),
                progress.TimeRemainingColumn(),
                progress.TextColumn("{task.fields[metrics]}"),
                console=Console(stderr=True),
                expand=True,
            )
            self._task = self._bar.add_task("training", total=num_samples, completed=first_sample, metrics="")
            self._bar.start()

    def update(self, record: dict[str, Any]) -> None:
        """Show a line of metrics.jsonl."""
        step, metrics = record["step"], describe(record)
        if self._bar is not None:
            self._bar.update(self._task, completed=record["samples"], metrics=f"{step}/{self._num_steps}  {metrics}")
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES or step == self._num_steps:
            self._last_line = time.monotonic()
            rate = (record["samples"] - self._first_sample) / (self._last_line - self._start)
            remaining = timedelta(seconds=round((self._num_samples - record["samples"]) / rate))
            log.info("step %d of %d  %s  %s left", step, self._num_steps, metrics, remaining)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.stop()


def describe(record: dict[str, Any]) -> str:
    """The metrics of a step in one line."""
    scale = "  scale {logit_scale:.1f}".format(**record) if "logit_scale" in record else ""
    parts = [
        "loss {loss:.4f}{scale}  gradient {grad_norm:.3g}".format(**record, scale=scale),
        "{samples_per_second:,.0f} samples/s  {tokens_per_second:,.0f} tokens/s".format(**record),
    ]
    if "mfu" in record:
        parts.append("MFU {mfu:.0%}".format(**record))
    parts.append(f"waited {record['data_wait_seconds'] / record['step_seconds']:.0%}")
    return "  ".join(parts)
