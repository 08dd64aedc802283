"""The means of a suite over the rows that one model or several models have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from bclip_fast.html.page import format_score

from . import medpmc, suites
from .yardstick_metrics import METRICS, KeptScores

TITLES = {"accuracy": "accuracy", "f1": "macro F1", "auc": "AUC"}
"""Names of the metrics in tables."""

Scores = dict[str, tuple[str, KeptScores, np.ndarray]]
"""By row: its domain, its kept scores and its resamples."""


def scores_of(tasks: Mapping[str, Any]) -> Scores:
    """Return the scores of the rows among the results of an evaluation, from their samples alone. Raises UserError."""
    scores = {}
    for result in tasks.values():
        task = result["task"]
        if "medpmc" in result and "row" in task:
            kept = medpmc.from_samples(result)
            scores[task["row"]] = (task["domain"], kept, medpmc.draws_of(kept, task["row"]))
    return scores


def add(results: dict[str, Any], suite: suites.Suite) -> None:
    """Add the entry `suite` to the results of an evaluation: title, number of rows, missing rows, and `rows`."""
    rows = suites.summarise(scores_of(results["tasks"]))
    results["suite"] = {
        "name": suite.name,
        "title": suite.title,
        "source": suite.source,
        "num_rows": len(suite.tasks),
        "missing": {task.row: reason for task in suite.tasks if (reason := results["missing"].get(task.name))},
        "rows": [row.as_json() for row in rows],
    }


def print_means(suite: Mapping[str, Any]) -> None:
    """Print the means of a suite, and the rows that are missing."""
    from rich.console import Console
    from rich.table import Column, Table

    columns = (Column(TITLES[name], justify="right") for name in METRICS)
    table = Table(Column("mean over", no_wrap=True), "rows", *columns, title=suite["title"])
    for row in suite["rows"]:
        if row["kind"] == "row":
            continue
        cells = [_cell(row, name) for name in METRICS]
        of_all = f" of {suite['num_rows']}" if row["kind"] == "overall" else ""
        table.add_row(row["name"], f"{row['num_rows']}{of_all}", *cells, end_section=False)
    console = Console()
    console.print(table)
    if suite["missing"]:
        console.print(f"missing rows, which the means leave out: {', '.join(suite['missing'])}", markup=False)


def _cell(row: Mapping[str, Any], name: str) -> str:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    ends = "" if low is None else f"\n{100 * low:.1f} to {100 * high:.1f}"
    return f"{format_score(row[name], 'share')}{ends}"
