"""`bclip eval compare A B ...`: evaluations on the same samples side by side, each against the first.

Differences are paired: every model saw the same samples, so it counts where they disagree, which tells far smaller
differences apart than two intervals do. p values are exact (McNemar) where a sample is right or wrong, by sign flips
where it has a share (token F1, tied ranks), by bootstrap for AUROC; Holm's correction covers all of a comparison.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from ..errors import UserError
from ..html.page import environment, format_figure
from ..io.atomic import write_text
from . import results as files
from . import statistics

log = logging.getLogger(__name__)

ALPHA = 0.05


@dataclass(frozen=True, kw_only=True)
class CompareCommand:
    """Puts evaluations side by side; writes compare.json, compare.csv and compare.html."""

    results: tyro.conf.Positional[tuple[str, ...]]
    """Folders written by bclip eval; the first is what the others are compared with."""
    out: str = "runs/compare"
    """Folder for the three files."""


def run(command: CompareCommand) -> None:
    found = compare([Path(path) for path in command.results])
    out = Path(command.out)
    write_text(out / "compare.json", json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    columns = ("task", "figure", "model", "value", "difference", "low", "high", "p", "p_holm", "test")
    write_text(out / "compare.csv", files.as_csv(columns, ([row[key] for key in columns] for row in found["rows"])))
    page = environment().get_template("compare.html").render(found=found, alpha=ALPHA)
    write_text(out / "compare.html", page)
    _print(found)
    log.info("comparison in %s", out / "compare.html")


def compare(folders: list[Path]) -> dict[str, Any]:
    """Every figure of every task that all have.

    Returns:
        JSON-ready: `models`, `time`, and `rows` of task, figure, model, value, unit, and, but for the first model,
        difference from the first, its 95 % interval low and high, p, p_holm and the test's name.

    Raises:
        UserError: fewer than two, no task in common, other data or samples under one task's name.
    """
    if len(folders) < 2:
        raise UserError("a comparison needs two evaluations at least: bclip eval compare A B")
    all_results = [files.read(folder) for folder in folders]
    models = _names(all_results, folders)
    names = [name for name in all_results[0]["tasks"] if all(name in results["tasks"] for results in all_results)]
    if not names:
        raise UserError(f"{', '.join(map(str, folders))} have no task in common")
    rows: list[dict[str, Any]] = []
    for name in names:
        tasks = [results["tasks"][name] for results in all_results]
        for folder, task in zip(folders[1:], tasks[1:], strict=True):
            if task["task"]["data"]["fingerprint"] != tasks[0]["task"]["data"]["fingerprint"]:
                raise UserError(f"task {name}: {folder} was measured on other data than {folders[0]}")
            if task["samples"]["key"] != tasks[0]["samples"]["key"]:
                raise UserError(f"task {name}: {folder} has other samples than {folders[0]}")
        for figure in tasks[0]["figures"]:
            rows += _rows(name, figure["name"], tasks, models)
    tested = [row for row in rows if row["p"] is not None]
    for row, p in zip(tested, statistics.holm([row["p"] for row in tested]), strict=True):
        row["p_holm"] = p
    return {"models": models, "rows": rows, "time": datetime.now(timezone.utc).isoformat(timespec="seconds")}


def _rows(task: str, name: str, tasks: list[dict[str, Any]], models: list[str]) -> list[dict[str, Any]]:
    rows = []
    for i, result in enumerate(tasks):
        figure = next((figure for figure in result["figures"] if figure["name"] == name), None)
        if figure is None:
            continue
        row = {"task": task, "figure": name, "model": models[i], "value": figure["value"], "unit": figure["unit"]}
        row |= dict.fromkeys(("difference", "low", "high", "p", "p_holm", "test"))
        rows.append(row | (_difference(name, tasks[0], result) if i else {}))
    return rows


def _difference(name: str, first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """What the samples say of second less first; empty for figures that are no mean over samples."""
    if name == "AUROC":
        positive = first["classes"][1]
        labels = np.array([label == positive for label in first["samples"]["label"]])
        one, two = (np.array(each["samples"][f"score of {positive}"], dtype=np.float64) for each in (first, second))
        found = statistics.auroc_difference(labels, one, two)
        if found is None:
            return {}
        difference, (low, high), p = found
        return {"difference": difference, "low": low, "high": high, "p": p, "test": "bootstrap"}
    # A probe's accuracies of several settings have no samples of their own but the last's.
    kind = (
        name.replace("median rank", "rank").replace("open accuracy", "accuracy").replace("closed accuracy", "accuracy")
    )
    if kind not in first["samples"] or kind not in second["samples"] or name.endswith("median rank"):
        return {}
    one, two = (np.array(each["samples"][kind], dtype=np.float64) for each in (first, second))
    if name != kind:
        rows = np.array(first["samples"]["kind"]) == name.split()[0]
        one, two = one[rows], two[rows]
    low, high = statistics.paired_interval(one, two)
    whole = bool(np.isin(one, (0, 1)).all() and np.isin(two, (0, 1)).all())
    p = statistics.mcnemar(one == 1, two == 1) if whole else statistics.sign_flip(two - one)
    test = "McNemar, exact" if whole else "sign flips"
    return {"difference": float((two - one).mean()), "low": low, "high": high, "p": p, "test": test}


def _names(all_results: list[dict[str, Any]], folders: list[Path]) -> list[str]:
    names = [results["model"]["path"] or results["model"]["class"] for results in all_results]
    if len(set(names)) == len(names):
        return names
    return [f"{name} ({folder})" for name, folder in zip(names, folders, strict=True)]


def _print(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

    table = Table(Column("task", no_wrap=True), "figure", "model", "value", "difference", "95 %", "p (Holm)")
    for row in found["rows"]:
        spread = "" if row["low"] is None else f"{100 * row['low']:+.1f} to {100 * row['high']:+.1f}"
        difference = "" if row["difference"] is None else f"{100 * row['difference']:+.1f}"
        p = "" if row["p_holm"] is None else f"{row['p_holm']:.2g}"
        value = format_figure(row["value"], row["unit"])
        table.add_row(escape(row["task"]), row["figure"], escape(row["model"]), value, difference, spread, p)
    Console().print(table)
