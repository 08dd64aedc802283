"""`bclip eval compare A B ...`: compare evaluations of the same samples, each with the first one.

Differences are paired: every model saw the same samples, and only disagreements count. A paired test detects much
smaller differences than two separate intervals do. The p value is exact (McNemar) for correct-or-wrong samples. For
fractional scores (token F1, tied ranks) it comes from random sign flips, and for AUROC from the bootstrap. Holm's
correction covers all p values of a comparison.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from bclip_fast.errors import UserError
from bclip_fast.html.page import environment, format_score

from . import results, statistics

log = logging.getLogger(__name__)

ALPHA = 0.05


@dataclass(frozen=True, kw_only=True)
class CompareCommand:
    """Compare evaluations, and write compare.json, compare.csv and compare.html."""

    results: tyro.conf.Positional[tuple[str, ...]]
    """Folders that bclip eval wrote. The others are compared with the first."""
    out: str = "runs/compare"
    """Folder for the three files."""


def run(command: CompareCommand) -> None:
    """Compare the evaluations, write the three files and print the table."""
    comparison = compare([Path(path) for path in command.results])
    _print(comparison)
    out = Path(command.out)
    columns = ("task", "figure", "model", "value", "difference", "low", "high", "p", "p_holm", "test")
    rows = ([row[key] for key in columns] for row in comparison["rows"])
    page = environment().get_template("compare.html").render(comparison=comparison, alpha=ALPHA)
    texts = {"compare.json": results.as_json(comparison), "compare.csv": results.as_csv(columns, rows)}
    results.write_files(out, texts | {"compare.html": page})
    log.info("comparison in %s", out / "compare.html")


def compare(folders: list[Path]) -> dict[str, Any]:
    """Compare every metric of every task that all evaluations have in common.

    Returns:
        JSON-ready dict of `models`, `time` and `rows`. Each row has task, figure (the metric's name), model, value and
        unit. Rows of the other models also have the difference from the first model, and the ends `low` and `high` of
        its 95 % interval. They have p, p_holm and the test's name, too.

    Raises:
        UserError: fewer than two evaluations, no common task, or different data or samples in one task.
    """
    if len(folders) < 2:
        raise UserError("a comparison needs at least two evaluations: bclip eval compare A B")
    evaluations = [results.read(folder) for folder in folders]
    models = _model_names(evaluations, folders)
    common = [
        name for name in evaluations[0]["tasks"] if all(name in evaluation["tasks"] for evaluation in evaluations)
    ]
    if not common:
        raise UserError(f"{', '.join(map(str, folders))} have no task in common")
    rows: list[dict[str, Any]] = []
    for name in common:
        tasks = [evaluation["tasks"][name] for evaluation in evaluations]
        for folder, task in zip(folders[1:], tasks[1:], strict=True):
            if task["task"]["data"]["fingerprint"] != tasks[0]["task"]["data"]["fingerprint"]:
                raise UserError(f"task {name}: {folder} was measured on other data than {folders[0]}")
            if task["samples"]["key"] != tasks[0]["samples"]["key"]:
                raise UserError(f"task {name}: {folder} has other samples than {folders[0]}")
        for metric in tasks[0]["figures"]:
            rows += _rows(name, metric["name"], tasks, models)
    tested = [row for row in rows if row["p"] is not None]
    for row, p in zip(tested, statistics.holm([row["p"] for row in tested]), strict=True):
        row["p_holm"] = p
    return {"models": models, "rows": rows, "time": datetime.now(timezone.utc).isoformat(timespec="seconds")}


def _rows(task: str, name: str, tasks: list[dict[str, Any]], models: list[str]) -> list[dict[str, Any]]:
    rows = []
    for i, result in enumerate(tasks):
        metric = next((metric for metric in result["figures"] if metric["name"] == name), None)
        if metric is None:
            continue
        row = {"task": task, "figure": name, "model": models[i], "value": metric["value"], "unit": metric["unit"]}
        row |= dict.fromkeys(("difference", "low", "high", "p", "p_holm", "test"))
        rows.append(row | (_difference(name, tasks[0], result) if i else {}))
    return rows


def _difference(name: str, first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Test the difference second - first of a metric. Returns {} for metrics that are not means over samples."""
    if name == "AUROC":
        positive = first["classes"][1]
        labels = np.array([label == positive for label in first["samples"]["label"]])
        if any(f"score of {positive}" not in result["samples"] for result in (first, second)):
            raise UserError(f"the samples have no column 'score of {positive}'; evaluate again")
        first_scores, second_scores = (
            np.array(result["samples"][f"score of {positive}"], dtype=np.float64) for result in (first, second)
        )
        comparison = statistics.auroc_difference(labels, first_scores, second_scores)
        if comparison is None:
            return {}
        difference, (low, high), p = comparison
        return {"difference": difference, "low": low, "high": high, "p": p, "test": "bootstrap"}
    # The metrics of a probe are named by their setting and have no column of samples.
    column = (
        name.replace("median rank", "rank").replace("open accuracy", "accuracy").replace("closed accuracy", "accuracy")
    )
    if column not in first["samples"] or column not in second["samples"] or name.endswith("median rank"):
        return {}
    first_values, second_values = (np.array(result["samples"][column], dtype=np.float64) for result in (first, second))
    if name != column:
        rows = np.array(first["samples"]["kind"]) == name.split()[0]
        first_values, second_values = first_values[rows], second_values[rows]
    low, high = statistics.paired_interval(first_values, second_values)
    if np.isin(first_values, (0, 1)).all() and np.isin(second_values, (0, 1)).all():
        p, test = statistics.mcnemar(first_values == 1, second_values == 1), "McNemar, exact"
    else:
        p, test = statistics.sign_flip(second_values - first_values), "sign flips"
    difference = float((second_values - first_values).mean())
    return {"difference": difference, "low": low, "high": high, "p": p, "test": test}


def _model_names(evaluations: list[dict[str, Any]], folders: list[Path]) -> list[str]:
    names = [evaluation["model"]["path"] or evaluation["model"]["class"] for evaluation in evaluations]
    if len(set(names)) == len(names):
        return names
    return [f"{name} ({folder})" for name, folder in zip(names, folders, strict=True)]


def _print(comparison: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

    table = Table(Column("task", no_wrap=True), "metric", "model", "score", "difference", "95 %", "p (Holm)")
    for row in comparison["rows"]:
        spread = "" if row["low"] is None else f"{100 * row['low']:+.1f} to {100 * row['high']:+.1f}"
        difference = "" if row["difference"] is None else f"{100 * row['difference']:+.1f}"
        p = "" if row["p_holm"] is None else f"{row['p_holm']:.2g}"
        score = format_score(row["value"], row["unit"])
        table.add_row(escape(row["task"]), row["figure"], escape(row["model"]), score, difference, spread, p)
    Console().print(table)
