"""Tables of the plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Any:
    """A table for the terminal, with the first column to the left."""
    from rich.table import Table

    result = Table(title=title, title_justify="left")
    for number, head in enumerate(heads):
        result.add_column(head, justify="right" if number else "left")
    for row in rows:
        result.add_row(*row)
    return result
