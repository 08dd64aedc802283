"""The table at the end of `make gpu`: each step's outcome, and each operator's figures beside its rivals'."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bclip_fast.ops.backend_names import SDPA

from .runner import Outcome, in_words

# Contenders of the step whose layers are torch's. They count as rivals, like other libraries.
PLAIN = "plain PyTorch"


def is_ours(row: dict[str, Any]) -> bool:
    """Return whether a row measures our kernels. The backends "torch", "reference" and those of SDPA run torch's."""
    name = row["contender"]
    if row["operator"] == "step":
        return "open_clip" not in name and PLAIN not in name
    return name.startswith("ours:") and name.removeprefix("ours:") not in ("torch", *SDPA, "reference")


def figures(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return a row of cells for each case: ours, its time, the fastest rival, the ratio, and the share of the matmul.

    The ratio is the rival's time over ours. The share is our rate over the measured rate of torch's matmul. Our rate is
    the least number of operations of the case over our time.
    """
    cells = []
    for case in dict.fromkeys((row["operator"], row["case"]) for row in rows):
        group = [row for row in rows if (row["operator"], row["case"]) == case]
        ours = min(filter(is_ours, group), key=lambda row: row["seconds"], default=None)
        rival = min((row for row in group if not is_ours(row)), key=lambda row: row["seconds"], default=None)
        share = ""
        if ours and ours.get("flops"):
            share = f"{ours['flops'] / ours['seconds'] / ours['matmul_flops_per_second']:.0%}"
        cells.append(
            [
                "-".join(case),
                ours["contender"].removeprefix("ours:") if ours else "",
                f"{ours['seconds'] * 1e3:.3f}" if ours else "",
                rival["contender"].removeprefix("ours:") if rival else "",
                f"{rival['seconds'] / ours['seconds']:.2f}" if ours and rival else "",
                share,
                f"{ours['error']:.0e}" if ours else "",
            ]
        )
    return cells


def file_sizes(folder: Path) -> dict[Path, int]:
    """Return the sizes in bytes of all <device>.jsonl in a folder."""
    return {path: path.stat().st_size for path in sorted(folder.glob("*.jsonl"))}


def read_rows(folder: Path, offsets: Mapping[Path, int] | None = None) -> list[dict[str, Any]]:
    """Return the rows of all <device>.jsonl in a folder. A line that a killed process left unfinished is ignored.

    offsets: byte from which to read a file, as `file_sizes` returned it earlier. By default, read all of it.
    """
    rows = []
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_bytes()[(offsets or {}).get(path, 0) :].decode(errors="replace").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return rows


def table(outcomes: Iterable[Outcome], rows: Sequence[dict[str, Any]]) -> str:
    """Return the table as text."""
    steps = [
        [one.name, one.word, f"{one.seconds:.0f}", "" if one.tests is None else in_words(one.tests), one.what]
        for one in outcomes
    ]
    lines = aligned([["step", "outcome", "s", "tests", "what"], *steps])
    if rows:
        headings = ["case", "ours", "ms", "fastest rival", "rival / ours", "of matmul", "error"]
        lines += ["", *aligned([headings, *figures(rows)])]
    return "\n".join(lines)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return lines with columns of equal width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
