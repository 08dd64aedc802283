"""Tables of results on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence


def print_table(
    title: str, headings: Sequence[str], rows: Iterable[Sequence[str] | None], num_left_aligned: int = 1
) -> None:
    """Print a table, 120 characters wide if the output is not a terminal.

    rows: cells of each row. None draws a line across the table.
    num_left_aligned: number of columns, counted from the left, that hold words. The others hold numbers.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column, heading in enumerate(headings):
        table.add_column(heading, justify="left" if column < num_left_aligned else "right", no_wrap=True)
    for row in rows:
        if row is None:
            table.add_section()
        else:
            table.add_row(*row)
    console = Console() if sys.stdout.isatty() else Console(width=120)
    console.print(table)
