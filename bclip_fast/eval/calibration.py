"""Calibration of class probabilities: the expected calibration error (ECE) and the reliability table behind it.

    ECE = sum over bins of (samples in the bin / N) |mean probability - share of correct samples|,

with 15 bins of equal width that include their upper end (Guo et al. 2017, arXiv 1706.04599, equation 5). For classes,
the probability is that of the predicted class. With two classes, there is a second table, of the second class and its
probability. With several labels a sample, each label has a table, and the ECE is their mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bclip_fast.errors import UserError

from . import statistics

NUM_BINS = 15
_EDGES = np.linspace(0, 1, NUM_BINS + 1)
_CHANCE = "the same predictions, each with probability 0 or 1"


def add(result: dict[str, Any], targets: np.ndarray, probabilities: np.ndarray, class_names: Sequence[str]) -> None:
    """Add the metric ECE to a result's `figures`, and the reliability tables as `calibration`.

    Args:
        targets: class numbers int64 (N,), or bool (N, C) for several labels a sample.
        probabilities: float (N, C).

    Raises:
        UserError: values outside [0, 1], or NaN.
    """
    probabilities = np.asarray(probabilities, dtype=np.float64)
    if not len(probabilities) or not bool(((probabilities >= 0) & (probabilities <= 1 + 1e-6)).all()):
        raise UserError("calibration needs at least one sample, and probabilities from 0 to 1")
    probabilities = probabilities.clip(0, 1)
    if targets.ndim == 2:
        columns = [(name, probabilities[:, i], targets[:, i]) for i, name in enumerate(class_names)]
        name = "ECE, mean over labels"
    else:
        predicted = probabilities.argmax(1)
        confidence = np.take_along_axis(probabilities, predicted[:, None], 1)[:, 0]
        columns = [("the predicted class", confidence, predicted == targets)]
        name = "ECE"
    result["figures"].append(_metric(name, [column[1:] for column in columns]))
    if targets.ndim == 1 and len(class_names) == 2:
        columns.append((class_names[1], probabilities[:, 1], targets == 1))
        result["figures"].append(_metric(f"ECE of {class_names[1]}", [columns[1][1:]]))
    result["calibration"] = [
        {"of": of, "ece": error(values, is_right), "bins": reliability(values, is_right)}
        for of, values, is_right in columns
    ]


def error(probabilities: np.ndarray, is_right: np.ndarray) -> float:
    """Return the ECE of probabilities (N,) of events that did or did not happen, bool (N,)."""
    gaps = np.bincount(_bins(probabilities), probabilities - is_right, minlength=NUM_BINS)
    return float(np.abs(gaps).sum() / len(probabilities))


def reliability(probabilities: np.ndarray, is_right: np.ndarray) -> list[dict[str, Any]]:
    """Return the bins with samples: low, high, num_samples, mean_probability, and the share of events."""
    bins = _bins(probabilities)
    counts = np.bincount(bins, minlength=NUM_BINS)
    sums, hits = (np.bincount(bins, values, minlength=NUM_BINS) for values in (probabilities, is_right))
    return [
        {
            "low": float(_EDGES[i]),
            "high": float(_EDGES[i + 1]),
            "num_samples": int(counts[i]),
            "mean_probability": float(sums[i] / counts[i]),
            "share": float(hits[i] / counts[i]),
        }
        for i in np.flatnonzero(counts)
    ]


def _bins(probabilities: np.ndarray) -> np.ndarray:
    return np.searchsorted(_EDGES, probabilities, side="left").clip(1) - 1


def _metric(name: str, columns: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    value = float(np.mean([error(*column) for column in columns]))
    chance = float(np.mean([error((values >= 0.5) * 1.0, is_right) for values, is_right in columns]))
    if name == "ECE":  # the predicted class may have less than 1/2
        chance = float(1 - columns[0][1].mean())
    return statistics.metric(
        name, value, chance, _CHANCE, len(columns[0][0]), interval=_interval(columns), higher_is_better=False
    )


def _interval(columns: list[tuple[np.ndarray, np.ndarray]]) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of the mean ECE. A resample draws samples with all their labels."""
    num, generator = len(columns[0][0]), np.random.default_rng(0)
    # The same bin of different columns must not mix.
    bins = [_bins(values) + NUM_BINS * i for i, (values, _) in enumerate(columns)]
    gaps = [values - is_right for values, is_right in columns]
    errors = []
    for _ in range(statistics.num_resamples(num * len(columns))):
        weights = np.bincount(generator.integers(0, num, num), minlength=num)
        errors.append(
            sum(np.abs(np.bincount(b, weights * g)).sum() for b, g in zip(bins, gaps, strict=True)) / num / len(bins)
        )
    return statistics.percentiles(np.array(errors))
