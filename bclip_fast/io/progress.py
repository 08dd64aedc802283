"""Progress bars on stderr, or lines of the log where stderr is not a terminal."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, Protocol

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 15.0
"""Seconds between the lines of a log."""


class Advance(Protocol):
    """The function that moves a progress bar."""

    def __call__(self, num: int = 1, what: str | None = None) -> None:
        """Count `num` more items. Rename the bar if `what` is given."""
        ...


@contextlib.contextmanager
def track(
    what: str,
    total: int | None = None,
    *,
    show: bool = True,
    transient: bool = False,
    elapsed: bool = False,
) -> Iterator[Advance]:
    """Show the progress of a block: number, rate and remaining time. Yield the function that counts items.

    A terminal gets a bar. Any other stderr gets lines of the log: at the start, and then every 15 seconds.

    Args:
        what: name of the items.
        total: number of items. None: show the number of finished items in place of a bar.
        show: whether to show anything.
        transient: remove the bar when the block ends.
        elapsed: show the time since the start, in place of the time to the end.
    """
    if not show:
        yield lambda num=1, what=None: None
        return
    if not sys.stderr.isatty():
        yield _Lines(what, total)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class RateColumn(ProgressColumn):
        def render(self, task: Any) -> Text:
            speed = task.finished_speed or task.speed
            return Text("" if speed is None else f"{_rate(speed)}/s")

    columns: list[ProgressColumn]
    if total is None:
        columns = [TextColumn("{task.completed} {task.description}"), RateColumn(), TimeElapsedColumn()]
    else:
        clock = TimeElapsedColumn() if elapsed else TimeRemainingColumn()
        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), RateColumn(), clock]
    with Progress(*columns, transient=transient, console=Console(stderr=True)) as progress:
        task = progress.add_task(what, total=total)

        def advance(num: int = 1, what: str | None = None) -> None:
            progress.update(task, advance=num, description=what)

        yield advance


class _Lines:
    """An `Advance` that logs a line at intervals."""

    def __init__(self, what: str, total: int | None) -> None:
        self._what, self._total, self._done = what, total, 0
        self._start = self._last_line = time.monotonic()
        if what and total:
            log.info("%s: %d", what, total)

    def __call__(self, num: int = 1, what: str | None = None) -> None:
        self._done += num
        self._what = self._what if what is None else what
        now = time.monotonic()
        if now - self._last_line < SECONDS_BETWEEN_LINES:
            return
        self._last_line = now
        rate = self._done / (now - self._start)
        if self._total is None:
            log.info("%s: %d, %s/s", self._what, self._done, _rate(rate))
            return
        left = timedelta(seconds=round((self._total - self._done) / rate)) if rate else "unknown time"
        log.info("%s: %d of %d, %s/s, %s left", self._what, self._done, self._total, _rate(rate), left)


def _rate(speed: float) -> str:
    return f"{speed:,.0f}" if speed >= 10 else f"{speed:.2g}"
