"""Where the figures of a run go: metrics.jsonl, TensorBoard where it is installed, and the terminal."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 15.0


class MetricsLog:
    """Appends a JSON object a line to RUN/metrics.jsonl and the same scalars to RUN/tb.

    Args:
        folder: the run folder.
        first_step: lines of later steps, which a run that stopped after its last checkpoint leaves, are removed.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        path = folder / "metrics.jsonl"
        cut_lines(path, first_step)
        self._file = path.open("a", encoding="utf-8")
        self._board = _tensorboard(folder / "tb", first_step)

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in record.items():
                if name != "step":
                    self._board.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def cut_lines(path: Path, first_step: int) -> None:
    """Removes the lines of a JSONL whose "step" is later, and those that aren't whole."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= first_step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            log.warning("%s: a line that is cut or not ours is removed", path)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(kept), encoding="utf-8")
    os.replace(partial, path)


def _tensorboard(folder: Path, first_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        log.info("TensorBoard is not installed; metrics go to metrics.jsonl alone")
        return None
    return SummaryWriter(str(folder), purge_step=first_step + 1)


class Progress:
    """A bar where stderr is a terminal, a line now and then elsewhere."""

    def __init__(self, first_step: int, num_steps: int) -> None:
        self._num_steps = num_steps
        self._last_line = -_SECONDS_BETWEEN_LINES
        self._bar: Any = None
        if sys.stderr.isatty():
            from rich import progress
            from rich.console import Console

            self._bar = progress.Progress(
                progress.TextColumn("training"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TimeRemainingColumn(),
                progress.TextColumn("{task.fields[figures]}"),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task("training", total=num_steps, completed=first_step, figures="")
            self._bar.start()

    def update(self, record: dict[str, Any]) -> None:
        figures = "loss {loss:.4f}  scale {logit_scale:.1f}  {samples_per_second:.0f} samples/s".format(**record)
        if self._bar is not None:
            self._bar.update(self._task, completed=record["step"], figures=figures)
        elif time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES or record["step"] == self._num_steps:
            self._last_line = time.monotonic()
            log.info("step %d of %d  %s", record["step"], self._num_steps, figures)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
