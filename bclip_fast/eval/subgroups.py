"""Metrics of subgroups of the samples, such as sex and age, and the gaps between them.

A subgroup's metrics come from the columns of its samples: the mean of each column of scores, and the AUROC if the
samples have a score for each class. Numbers with more than `MAX_DISTINCT` values become bins: age in years by
`AGE_EDGES`, and other columns by quartiles. The gap of a metric is the difference between the best and the worst
subgroup. Subgroups of fewer than `MIN_SAMPLES` samples are marked, and no gap counts them.
"""

from __future__ import annotations

import itertools
import logging
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bclip_fast.errors import UserError

from . import statistics
from .datasets import EvalDataset

log = logging.getLogger(__name__)

MIN_SAMPLES = 30
MAX_DISTINCT = 10
AGE_EDGES = (18.0, 40.0, 60.0, 80.0)
UNKNOWN = "unknown"
_AGE = re.compile(r"0*(\d+(?:\.\d+)?)\s*([YMWD]?)", re.IGNORECASE)
_YEARS = {"": 1.0, "Y": 1.0, "M": 1 / 12, "W": 7 / 365.25, "D": 1 / 365.25}


def add(result: dict[str, Any], data: EvalDataset, columns: Sequence[str]) -> None:
    """Add `subgroups` and `gaps` to a result.

    `subgroups` has a row for each column and subgroup: by, group, num_samples, is_small and figures (name, value,
    interval). `gaps` has a row for each column and metric: by, name, value, interval, best, worst.

    Raises:
        UserError: a column that the data lack, or with too many subgroups.
    """
    samples = result["samples"]
    rows_of_keys = {data.key(i): i for i in range(len(data))}
    if len(rows_of_keys) != len(data) or not all(key in rows_of_keys for key in samples["key"]):
        raise UserError(
            f"--by {','.join(columns)} needs one sample with its own key for each image of {data.path}; leave --by out"
        )
    rows = np.array([rows_of_keys[key] for key in samples["key"]])
    result["subgroups"], result["gaps"] = [], []
    for column in columns:
        labels = labels_of(data, column)
        groups = np.array(bins([labels[row] for row in rows], column))
        names = sorted(set(groups.tolist()), key=_order)
        if len(names) > max(50, MAX_DISTINCT):
            raise UserError(
                f"--by {column}: it has {len(names)} subgroups, such as {names[0]!r}; choose a column with fewer values"
            )
        subgroups, gaps = measure(result, groups, names)
        result["subgroups"] += [{"by": column, **row} for row in subgroups]
        result["gaps"] += [{"by": column, **row} for row in gaps]


def columns(by: str) -> list[str]:
    """Return the names of the columns of `--by sex,age`, without repetitions."""
    return list(dict.fromkeys(name.strip() for name in by.split(",") if name.strip()))


def labels_of(data: EvalDataset, column: str) -> list[str | None]:
    """Return a column of the data. Raises UserError for data that lack it."""
    if column not in data.label_kinds:
        raise UserError(
            f"--by {column}: {data.path} has no such column; it has {', '.join(data.label_kinds) or 'no columns'}"
        )
    return data.labels(column)


def _order(name: str) -> tuple[bool, float, str]:
    """Sort by the first number of a name, and unknown samples last."""
    match = re.search(r"\d+(?:\.\d+)?", name)
    number = -1.0 if name.startswith("under") else float(match[0]) if match else math.inf
    return name == UNKNOWN, number, name


def bins(values: Sequence[str | None], column: str) -> list[str]:
    """Return the subgroup of each value. A missing value is `UNKNOWN`.

    Ages may be written as in DICOM: 045Y, 018M, 003W, 010D.
    """
    is_age = column.lower().replace("_", " ").split()[-1:] == ["age"] or column.lower().startswith(
        ("age", "patientage")
    )
    numbers = [None if value is None else _number(value, is_age) for value in values]
    known = [number for number in numbers if number is not None]
    if len(known) != sum(value is not None for value in values) or len(set(known)) <= MAX_DISTINCT:
        return [UNKNOWN if value is None else value for value in values]
    edges = np.array(AGE_EDGES) if is_age else np.unique(np.quantile(known, [0.25, 0.5, 0.75]))
    texts = [f"{edge:g}" for edge in edges]
    names = [f"under {texts[0]}", *(f"{low} to under {high}" for low, high in itertools.pairwise(texts))]
    names.append(f"{texts[-1]} and over")
    places = [None if number is None else int(np.searchsorted(edges, number, side="right")) for number in numbers]
    return [UNKNOWN if place is None else names[place] for place in places]


def _number(value: str, is_age: bool) -> float | None:
    if is_age and (match := _AGE.fullmatch(value.strip())):
        return float(match[1]) * _YEARS[match[2].upper()]
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def measure(
    result: dict[str, Any], groups: np.ndarray, names: Sequence[str], seed: int = 0
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the rows of `subgroups` and of `gaps` for one column, without `by`.

    Args:
        groups: name of the subgroup of each of the result's samples, str (N,).
        names: names of the subgroups, in order.
    """
    rows: list[dict[str, Any]] = []
    draws: dict[str, dict[str, tuple[float, np.ndarray]]] = {}
    metrics = _metrics(result["samples"], result.get("classes", []))
    for number, name in enumerate(names):
        members = np.flatnonzero(groups == name)
        is_small = len(members) < MIN_SAMPLES
        figures = []
        for metric, compute in metrics.items():
            # The draws of subgroups are independent, and those of a subgroup's metrics are the same.
            computed = compute(members, np.random.default_rng([seed, number]))
            value, resampled = computed if computed is not None else (None, None)
            interval = None if resampled is None else statistics.percentiles(resampled)
            figures.append({"name": metric, "value": value, "interval": interval and list(interval)})
            if computed is not None and not is_small:
                draws.setdefault(metric, {})[name] = computed
        rows.append({"group": name, "num_samples": len(members), "is_small": is_small, "figures": figures})
    return rows, [_gap(metric, by_name) for metric, by_name in draws.items() if len(by_name) > 1]


def _gap(metric: str, by_name: dict[str, tuple[float, np.ndarray]]) -> dict[str, Any]:
    """Return the difference between the best and the worst subgroup. Each resample has its own best and worst.

    So the interval does not end at 0, even for subgroups that are alike. It says how large the gap may be.
    """
    best, worst = (pick(by_name, key=lambda name: by_name[name][0]) for pick in (max, min))
    size = min(len(resampled) for _, resampled in by_name.values())
    table = np.stack([resampled[:size] for _, resampled in by_name.values()])
    value = by_name[best][0] - by_name[worst][0]
    interval = list(statistics.percentiles(table.max(0) - table.min(0)))
    return {"name": metric, "value": value, "interval": interval, "best": best, "worst": worst}


Compute = Callable[[np.ndarray, np.random.Generator], "tuple[float, np.ndarray] | None"]
"""Returns a metric of some rows, and its resamples. None: the metric is undefined for them."""


def _metrics(samples: dict[str, list[Any]], classes: Sequence[str]) -> dict[str, Compute]:
    """Return the metrics that the columns of the samples allow."""
    metrics: dict[str, Compute] = {}
    scores = [f"score of {name}" for name in classes]
    for name, column in samples.items():
        if name not in scores and name not in ("group", "answer") and all(
            isinstance(value, int | float) for value in column
        ) and not name.endswith(" rank"):  # fmt: skip
            metrics[name] = _mean_of(np.array(column, dtype=np.float64))
    if scores and all(name in samples for name in scores) and "label" in samples:
        values = np.array([samples[name] for name in scores], dtype=np.float64).T
        label_sets = [set(label.split("|")) if "prediction" not in samples else {label} for label in samples["label"]]
        targets = np.array([[name in label_set for name in classes] for label_set in label_sets])
        if len(classes) == 2 and "prediction" in samples:
            metrics["AUROC"] = _auroc_of(targets[:, 1:], values[:, 1:] - values[:, :1])
        else:
            metrics["AUROC, macro"] = _auroc_of(targets, values)
    return metrics


def _mean_of(values: np.ndarray) -> Compute:
    def compute(rows: np.ndarray, generator: np.random.Generator) -> tuple[float, np.ndarray]:
        return float(values[rows].mean()), statistics.mean_draws(values[rows], generator, statistics.NUM_RESAMPLES)

    return compute


def _auroc_of(targets: np.ndarray, scores: np.ndarray) -> Compute:
    """Return the mean AUROC of the columns that have both kinds. Resamples draw the rows of a subgroup."""

    def compute(rows: np.ndarray, generator: np.random.Generator) -> tuple[float, np.ndarray] | None:
        part = targets[rows]
        kept = np.flatnonzero(part.any(0) & ~part.all(0))
        if not len(kept):
            return None
        value = float(np.mean([statistics.auroc(part[:, i], scores[rows, i]) for i in kept]))
        return value, statistics.auroc_draws(part[:, kept], scores[np.ix_(rows, kept)], generator)

    return compute
