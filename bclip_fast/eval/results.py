"""The files of an evaluation: results.json, figures.csv, per-class.csv, suite.csv and samples/TASK.csv.

reliability.csv and decision-curves.csv have the tables of the tasks with probabilities, and subgroups.csv and gaps.csv
those of `--by`.

results.json holds what `evaluate` returns, except for two entries of a task. `samples_file` names the CSV file of the
`samples`. Beyond `MAX_DENSE_CLASSES` classes, `confusion` is a dict: `shape` is [C, C], and `entries` lists [class,
prediction, number of samples] for each number above 0. `roc` then has only the curves of the report, those of the
largest areas. `per_class` has the areas of all classes.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bclip_fast.errors import UserError
from bclip_fast.html.chart import MAX_CURVES
from bclip_fast.io import stand_ins
from bclip_fast.io.atomic import replacing_files, settle, write_text
from bclip_fast.io.file_names import file_names

CURVE_COLUMNS = ("threshold", "net_benefit", "low", "high", "treat_all", "treat_none")
MAX_DENSE_CLASSES = 40
"""Largest number of classes whose confusion matrix results.json holds in full."""


def write(folder: Path, results: dict[str, Any]) -> None:
    """Write the files, all or none. Raises UserError if they cannot be written."""
    names = file_names(results["tasks"])
    files = {}
    tasks = {}
    for name, result in results["tasks"].items():
        samples = result["samples"]
        file = f"samples/{names[name]}.csv"
        files[file] = as_csv(list(samples), zip(*samples.values(), strict=True))
        tasks[name] = _compact({key: value for key, value in result.items() if key != "samples"})
        tasks[name]["samples_file"] = file
    files["results.json"] = as_json(results | {"tasks": tasks})
    columns = ("task", "figure", "value", "low", "high", "deviation", "chance", "chance_is", "unit", "num_samples")
    rows = [
        (name, m["name"], m["value"], *(m["interval"] or (None, None)), m.get("deviation"), m["chance"], m["chance_is"],
         m["unit"], m["num_samples"])
        for name, result in results["tasks"].items()
        for m in result["figures"]
    ]  # fmt: skip
    files["figures.csv"] = as_csv(columns, rows)
    classes = [(name, row) for name, result in results["tasks"].items() for row in result.get("per_class", [])]
    fields = ("class", "num_samples", "num_predicted", "recall", "precision", "auroc", "average_precision")
    lines = ((name, *(row.get(field) for field in fields)) for name, row in classes)
    if "suite" in results:
        means = results["suite"]["rows"]
        files["suite.csv"] = as_csv(list(means[0]), (list(row.values()) for row in means))
    tables: tuple[tuple[str, tuple[str, ...], Callable[[Mapping[str, Any]], Iterable[Sequence[Any]]]], ...] = (
        ("reliability.csv", ("of", "low", "high", "num_samples", "mean_probability", "share"), reliability_rows),
        ("decision-curves.csv", ("class", *CURVE_COLUMNS), curve_rows),
        ("subgroups.csv", ("by", "group", "num_samples", "is_small", "figure", "value", "low", "high"), subgroup_rows),
        ("gaps.csv", ("by", "figure", "value", "low", "high", "best", "worst"), gap_rows),
    )
    for file, header, table in tables:
        lines_of = [(name, *row) for name, result in results["tasks"].items() for row in table(result)]
        if lines_of:
            files[file] = as_csv(("task", *header), lines_of)
    files["per-class.csv"] = as_csv(("task", *fields), lines)
    write_files(folder, files)


def reliability_rows(result: Mapping[str, Any]) -> Iterable[Sequence[Any]]:
    """Yield the rows of reliability.csv of a result."""
    for table in result.get("calibration", []):
        for row in table["bins"]:
            yield table["of"], *row.values()


def curve_rows(result: Mapping[str, Any]) -> Iterable[Sequence[Any]]:
    """Yield the rows of decision-curves.csv of a result."""
    if "decision_curve" in result:
        for point in result["decision_curve"]["points"]:
            yield result["decision_curve"]["class"], *point.values()


def subgroup_rows(result: Mapping[str, Any]) -> Iterable[Sequence[Any]]:
    """Yield the rows of subgroups.csv of a result."""
    for row in result.get("subgroups", []):
        for figure in row["figures"]:
            start = row["by"], row["group"], row["num_samples"], int(row["is_small"])
            yield *start, figure["name"], figure["value"], *(figure["interval"] or (None, None))


def gap_rows(result: Mapping[str, Any]) -> Iterable[Sequence[Any]]:
    """Yield the rows of gaps.csv of a result."""
    for row in result.get("gaps", []):
        yield row["by"], row["name"], row["value"], *row["interval"], row["best"], row["worst"]


def write_files(folder: Path, texts: Mapping[str, str]) -> None:
    """Write files below `folder`, all or none.

    texts: content by path. Raises UserError if a file cannot be written.
    """
    try:
        with replacing_files(folder) as partial:
            for file, text in texts.items():
                write_text(partial / file, text)
    except OSError as error:
        reason = error.strerror or str(error)
        names = ", ".join(texts)
        raise UserError(
            f"cannot write {names} to {folder}: {reason}; free space there or pass another --out"
        ) from error


def read(folder: Path) -> dict[str, Any]:
    """Read results.json, and put the samples and full confusion matrices back.

    Raises UserError if a file is missing or damaged.
    """
    path = folder / "results.json" if folder.is_dir() else folder
    root = path.parent
    settle(root)
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        if shared := [
            file for file, n in Counter(r["samples_file"] for r in results["tasks"].values()).items() if n > 1
        ]:
            raise ValueError(f"several tasks have the samples {shared[0]}, so those of one are lost; evaluate again")
        for result in results["tasks"].values():
            if isinstance(confusion := result.get("confusion"), dict):
                result["confusion"] = _dense(confusion, len(result["classes"]))
            path = root / result["samples_file"]
            if path.resolve().parent != (root / "samples").resolve():
                raise ValueError(f"samples_file={result['samples_file']!r} is not in its folder samples/")
            with path.open(newline="", encoding="utf-8") as lines:
                names, *rows = csv.reader(lines, strict=True)
            result["samples"] = dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))
            path = path.parents[1] / "results.json"
    except (OSError, ValueError, LookupError, TypeError, csv.Error) as error:
        stand_ins.refuse(path)
        raise UserError(f"{path} is not a file of bclip eval ({error}); pass the folder of an evaluation") from error
    return results


def _compact(result: dict[str, Any]) -> dict[str, Any]:
    if "classes" not in result or len(result["classes"]) <= MAX_DENSE_CLASSES:
        return result
    result = {**result, "roc": sorted(result.get("roc", []), key=lambda curve: -curve["auroc"])[:MAX_CURVES]}
    if "confusion" in result:
        confusion = result["confusion"]
        entries = [[i, j, count] for i, row in enumerate(confusion) for j, count in enumerate(row) if count]
        result["confusion"] = {"shape": [len(confusion)] * 2, "entries": entries}
    return result


def _dense(confusion: dict[str, Any], num_classes: int) -> list[list[int]]:
    matrix = [[0] * num_classes for _ in range(num_classes)]
    for i, j, count in confusion["entries"]:
        matrix[i][j] = count
    return matrix


def as_json(value: Any) -> str:
    """Return JSON with a line for each entry, and one line for each list or dict inside a list."""
    return _lines(value, 0) + "\n"


def _lines(value: Any, depth: int) -> str:
    if isinstance(value, dict) and value:
        items = [f"{_line(str(key))}: {_lines(item, depth + 1)}" for key, item in value.items()]
        start, end = "{}"
    elif isinstance(value, list | tuple) and any(isinstance(item, dict | list | tuple) and item for item in value):
        items = list(map(_line, value))
        start, end = "[]"
    else:
        return _line(value)
    indent = "\n" + " " * (depth + 1)
    return f"{start}{indent}{f',{indent}'.join(items)}\n{' ' * depth}{end}"


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def as_csv(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a CSV text with a header."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return out.getvalue()
