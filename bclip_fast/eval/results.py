"""The files of an evaluation: results.json, figures.csv, per-class.csv and samples/TASK.csv."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bclip_fast.errors import UserError
from bclip_fast.io import stand_ins
from bclip_fast.io.atomic import write_text


def write(folder: Path, results: dict[str, Any]) -> None:
    """Write the files. The `samples` of a task go to its CSV file, and results.json names that file."""
    tasks = {}
    for name, result in results["tasks"].items():
        samples = result["samples"]
        file = f"samples/{slug(name)}.csv"
        write_text(folder / file, as_csv(list(samples), zip(*samples.values(), strict=True)))
        tasks[name] = {key: value for key, value in result.items() if key != "samples"} | {"samples_file": file}
    content = results | {"tasks": tasks}
    write_text(folder / "results.json", json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    columns = ("task", "figure", "value", "low", "high", "deviation", "chance", "chance_is", "unit", "num_samples")
    rows = [
        (name, m["name"], m["value"], *(m["interval"] or (None, None)), m.get("deviation"), m["chance"], m["chance_is"],
         m["unit"], m["num_samples"])
        for name, result in results["tasks"].items()
        for m in result["figures"]
    ]  # fmt: skip
    write_text(folder / "figures.csv", as_csv(columns, rows))
    classes = [(name, row) for name, result in results["tasks"].items() for row in result.get("per_class", [])]
    fields = ("class", "num_samples", "num_predicted", "recall", "precision", "auroc")
    lines = ((name, *(row.get(field) for field in fields)) for name, row in classes)
    write_text(folder / "per-class.csv", as_csv(("task", *fields), lines))


def read(folder: Path) -> dict[str, Any]:
    """Read results.json and put the samples back. Raises UserError if a file is missing or damaged."""
    path = folder / "results.json" if folder.is_dir() else folder
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        for result in results["tasks"].values():
            path = path.parent / result["samples_file"]
            with path.open(newline="", encoding="utf-8") as lines:
                names, *rows = csv.reader(lines, strict=True)
            result["samples"] = dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))
            path = path.parents[1] / "results.json"
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        stand_ins.refuse(path)
        raise UserError(f"{path} is not a file of bclip eval ({error}); pass the folder of an evaluation") from error
    return results


def slug(name: str) -> str:
    """Return a file name for a task: all other characters than letters, digits, `.`, `_` and `-` become `-`."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "task"


def as_csv(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a CSV text with a header."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return out.getvalue()
