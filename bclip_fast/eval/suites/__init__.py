"""The suites: one file `NAME.toml` each, here or anywhere, with a title, a source and the names of its tasks.

All tasks of a suite have the protocol medpmc, a row and a domain. The means of a suite are those of medpmc-clip-eval:
OVERALL is the mean over rows, and OVERALL_SPECIALTY_MACRO the mean over the means of the domains. Their intervals come
from the resamples of the rows, which are drawn independently.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bclip_fast.config import read_toml
from bclip_fast.errors import UserError, choices
from bclip_fast.eval import tasks, yardstick_metrics
from bclip_fast.eval.yardstick_metrics import METRICS, KeptScores

FOLDER = Path(__file__).parent
OVERALL, OVERALL_DOMAINS = "OVERALL", "OVERALL_SPECIALTY_MACRO"


@dataclass(frozen=True)
class Suite:
    """A suite. Its tasks are in the order of its file."""

    name: str
    title: str
    source: str
    tasks: tuple[tasks.Task, ...]


@dataclass(frozen=True)
class Row:
    """A row of a suite's table: a task, the mean of a domain, or a mean over all.

    values, intervals: by the names in `METRICS`. num_samples: samples or questions.
    """

    kind: str
    name: str
    domain: str
    num_rows: int
    num_samples: int
    values: dict[str, float]
    intervals: dict[str, tuple[float, float] | None]

    def as_json(self) -> dict[str, Any]:
        """Return the row for results.json and for CSV files."""
        ends = {
            f"{name}_{end}": None if interval is None else interval[i]
            for name, interval in self.intervals.items()
            for i, end in enumerate(("low", "high"))
        }
        facts = {"kind": self.kind, "name": self.name, "domain": self.domain, "num_rows": self.num_rows}
        return facts | {"num_samples": self.num_samples} | self.values | ends


def names() -> list[str]:
    """Return the names of the package's suites."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load(name: str) -> Suite:
    """Load a suite by its name, or the path of a .toml file.

    Raises:
        UserError: an unknown name, an unreadable file, or a task without protocol medpmc, row and domain.
    """
    if not name.endswith(".toml") and name not in names():
        raise UserError(f"unknown suite {name!r}{choices(name, names())}")
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    table = read_toml(path, "suite file")
    entries = table.get("tasks")
    texts = [table.get("title"), table.get("source"), *(entries if isinstance(entries, list) and entries else [None])]
    if set(table) != {"title", "source", "tasks"} or not all(isinstance(text, str) for text in texts):
        raise UserError(f"suite file {path} must hold title, source and a list of tasks, no other key")
    members = tuple(tasks.load(task) for task in table["tasks"])
    for task in members:
        if task.protocol != "medpmc" or not task.row or not task.domain:
            raise UserError(f"suite file {path}: task {task.name} needs protocol medpmc, a row and a domain")
    if len({task.row for task in members}) < len(members):
        raise UserError(f"suite file {path} has two tasks with the same row; rename one")
    return Suite(path.stem, table["title"], table["source"], members)


def summarise(
    scores: Mapping[str, tuple[str, KeptScores, np.ndarray]], num_samples: Mapping[str, int] | None = None
) -> list[Row]:
    """Return the rows of a model, its domains in alphabetical order, and the two means over all.

    Args:
        scores: by row: its domain, its kept scores and its resamples (n, 3).
        num_samples: samples by row. None: the rows of scores.

    Raises:
        UserError: no row.
    """
    if not scores:
        raise UserError("a suite needs at least one row")
    points = {row: np.array(list(yardstick_metrics.measure(kept).values())) for row, (_, kept, _) in scores.items()}
    draws = {row: each for row, (_, _, each) in scores.items()}
    sizes = {row: (num_samples or {}).get(row, len(kept.scores)) for row, (_, kept, _) in scores.items()}
    domains: dict[str, list[str]] = {}
    for row, (domain, _, _) in scores.items():
        domains.setdefault(domain, []).append(row)
    rows = [_row("row", row, scores[row][0], 1, sizes[row], points[row], draws[row]) for row in scores]
    domain_points, domain_draws = [], []
    for domain in sorted(domains):
        members = domains[domain]
        domain_points.append(np.mean([points[row] for row in members], axis=0))
        domain_draws.append(np.mean([draws[row] for row in members], axis=0))
        size = sum(sizes[row] for row in members)
        rows.append(_row("domain", domain, domain, len(members), size, domain_points[-1], domain_draws[-1]))
    total = sum(sizes.values())
    for name, all_points, all_draws in (
        (OVERALL, list(points.values()), list(draws.values())),
        (OVERALL_DOMAINS, domain_points, domain_draws),
    ):
        mean, mean_draws = np.mean(all_points, axis=0), np.mean(all_draws, axis=0)
        rows.append(_row("overall", name, "", len(scores), total, mean, mean_draws))
    return rows


def _row(
    kind: str, name: str, domain: str, num_rows: int, num_samples: int, points: np.ndarray, draws: np.ndarray
) -> Row:
    intervals = {metric: yardstick_metrics.interval(draws[:, i]) for i, metric in enumerate(METRICS)}
    return Row(kind, name, domain, num_rows, num_samples, dict(zip(METRICS, points.tolist(), strict=True)), intervals)
