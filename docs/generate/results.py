"""The rows of benchmarks/results/*.jsonl. Every number of README and of the benchmark pages comes from here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks/results"

Row = dict[str, Any]
# Columns of a row that describe the machine and the software, instead of the measurement.
ENVIRONMENT = ("device", "threads", "torch", "python", "commit", "date")


@dataclass(frozen=True)
class Results:
    """Measurements in the order in which they were recorded."""

    rows: list[Row]

    def select(self, **values: Any) -> Results:
        """Return the rows whose columns have these values. A case may also be a prefix that ends with `*`."""
        return Results([row for row in self.rows if all(_matches(row.get(key), want) for key, want in values.items())])

    def row(self, **values: Any) -> Row:
        """Return the newest row with these values.

        Raises:
            LookupError: no row has them. Record one with `bclip bench --record`.
        """
        rows = self.select(**values).rows
        if not rows:
            raise LookupError(f"benchmarks/results has no row with {values}; record one with bclip bench --record")
        return rows[-1]

    def latest(self) -> Results:
        """Return the newest row of each device, case, contender and number of threads, in the order of the cases."""
        newest: dict[tuple[Any, ...], Row] = {}
        for row in self.rows:
            names = ("device", "operator", "case", "contender", "num_threads")
            newest[tuple(row.get(name) for name in names)] = row
        return Results(list(newest.values()))

    def cases(self) -> Iterator[tuple[str, Results]]:
        """Yield each case with its rows."""
        for case in dict.fromkeys(row["case"] for row in self.rows):
            yield case, self.select(case=case)


def _matches(value: Any, want: Any) -> bool:
    return str(value).startswith(want[:-1]) if isinstance(want, str) and want.endswith("*") else value == want


def load() -> Results:
    """Read all result files."""
    paths = sorted(FOLDER.glob("*.jsonl"))
    return Results([json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").splitlines()])


def megabytes(row: Row) -> str:
    """Return the memory beyond the inputs, such as `46 MB`."""
    return f"{row['extra_bytes'] / 1e6:,.0f} MB"


def seconds(value: float) -> str:
    """Return a time with three digits, such as `1.54 s` or `94.3 ms`."""
    number, unit = (value, "s") if value >= 1 else (value * 1e3, "ms")
    return f"{number:.{max(0, 2 - len(str(int(number))) + 1)}f} {unit}"
