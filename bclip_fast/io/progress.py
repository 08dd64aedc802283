"""Progress bars on stderr."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol


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
    """Show a progress bar while the block runs. Yield the function that moves it.

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

    columns: list[ProgressColumn]
    if total is None:
        columns = [TextColumn("{task.completed} {task.description}"), TimeElapsedColumn()]
    else:
        clock = TimeElapsedColumn() if elapsed else TimeRemainingColumn()
        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), clock]
    with Progress(*columns, transient=transient, console=Console(stderr=True)) as progress:
        task = progress.add_task(what, total=total)

        def advance(num: int = 1, what: str | None = None) -> None:
            progress.update(task, advance=num, description=what)

        yield advance
