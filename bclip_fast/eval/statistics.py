"""Figures with their intervals: AUROC, ROC points, bootstrap, paired tests.

A figure is a JSON-ready dict: name, value, chance, chance_is, unit, higher_is_better, num_samples and `interval`, the
95 % interval over which samples happened to be in the test set; it says nothing of other seeds or data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from bclip_fast.errors import UserError

LEVEL = 0.95
NUM_RESAMPLES = 1000
_MAX_RESAMPLED = 100_000_000


def figure(
    name: str,
    value: float | None,
    chance: float,
    chance_is: str,
    num_samples: int,
    *,
    unit: str = "share",
    interval: tuple[float, float] | None = None,
    **more: Any,
) -> dict[str, Any]:
    return {
        "name": name,
        "value": value,
        "chance": chance,
        "chance_is": chance_is,
        "unit": unit,
        "higher_is_better": unit == "share",
        "num_samples": num_samples,
        "interval": None if interval is None else [float(interval[0]), float(interval[1])],
        **more,
    }


def auroc(labels: np.ndarray, scores: np.ndarray) -> float | None:
    """Area under the ROC curve: P(a positive scores above a negative), ties half. None where one class is absent.

    labels: (N,) bool. scores: (N,) float, higher means positive. Source: Mann and Whitney, 1947.
    """
    labels, scores = _binary(labels, scores)
    order, starts = _ranked(scores)
    return _weighted_auroc(labels[order], np.ones(len(labels)), starts)


def roc_points(labels: np.ndarray, scores: np.ndarray, *, at_most: int = 400) -> list[tuple[float, float]]:
    """(false, true positive rate) from (0, 0) to (1, 1), a corner a distinct score; thinned for a plot."""
    labels, scores = _binary(labels, scores)
    if labels.all() or not labels.any():
        return []
    order, starts = _ranked(scores)
    # From the highest score down, a run of equal scores ends where it starts in rising order.
    ends = np.flatnonzero(starts[::-1])
    true, false = np.cumsum(labels[order][::-1]), np.cumsum(~labels[order][::-1])
    points = np.stack([np.r_[0, false[ends]] / false[-1], np.r_[0, true[ends]] / true[-1]], axis=1)
    if len(points) > at_most:
        points = points[np.unique(np.linspace(0, len(points) - 1, at_most).round().astype(int))]
    return [(float(x), float(y)) for x, y in points]


def auroc_interval(labels: np.ndarray, scores: np.ndarray, seed: int = 0) -> tuple[float, float] | None:
    """95 % percentile bootstrap, positives and negatives drawn apart, so that no resample lacks a class."""
    labels, scores = _binary(labels, scores)
    if labels.all() or not labels.any():
        return None
    order, starts = _ranked(scores)
    labels = labels[order]
    generator = np.random.default_rng(seed)
    values = []
    for _ in range(_num_resamples(len(labels))):
        weights = np.empty(len(labels))
        for kind in (False, True):
            rows = np.flatnonzero(labels == kind)
            weights[rows] = np.bincount(generator.integers(0, len(rows), len(rows)), minlength=len(rows))
        values.append(_weighted_auroc(labels, weights, starts))
    return _percentiles(np.array(values))


def macro_auroc_interval(truth: np.ndarray, scores: np.ndarray, seed: int = 0) -> tuple[float, float] | None:
    """95 % percentile bootstrap of the mean AUROC over classes, samples drawn whole.

    truth: (N, C) bool; scores: (N, C). Of a resample, as of the data, the mean is over the classes that some samples
    have and some don't. None where there is no such class.
    """
    classes = [i for i in range(truth.shape[1]) if truth[:, i].any() and not truth[:, i].all()]
    if not classes:
        return None
    ranked = [(truth[:, i], *_ranked(_finite(scores[:, i], "scores"))) for i in classes]
    generator, num = np.random.default_rng(seed), len(truth)
    means = []
    for _ in range(_num_resamples(num * len(classes))):
        weights = np.bincount(generator.integers(0, num, num), minlength=num).astype(np.float64)
        areas = [_weighted_auroc(own[order], weights[order], starts) for own, order, starts in ranked]
        known = [area for area in areas if area is not None]
        if known:
            means.append(sum(known) / len(known))
    return _percentiles(np.array(means))


def mean_interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap of a mean.

    Samples of equal value are exchangeable: drawing how often each distinct value occurs, a multinomial, is the
    bootstrap exactly, and takes no more memory for 726,000 samples than for ten.
    """
    distinct, counts = np.unique(_finite(values, "values"), return_counts=True)
    generator = np.random.default_rng(seed)
    draws = generator.multinomial(len(values), counts / len(values), size=_num_resamples(len(distinct)))
    return _percentiles(draws @ distinct / len(values))


def median_interval(values: np.ndarray) -> tuple[float, float]:
    """95 % interval of the median by order statistics: how many samples lie below the true median is binomial(N, 1/2).

    Source: Conover, Practical Nonparametric Statistics, section 3.2; its ends are the bootstrap's in the limit.
    """
    ordered = np.sort(_finite(values, "values"))
    half = 1.959963984540054 * math.sqrt(len(ordered)) / 2
    low, high = math.floor(len(ordered) / 2 - half), math.ceil(len(ordered) / 2 + half)
    return float(ordered[max(0, low)]), float(ordered[min(len(ordered) - 1, high)])


def balanced_interval(confusion: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap of the mean recall, samples drawn within their class. confusion: (C, C) counts."""
    generator = np.random.default_rng(seed)
    support = confusion.sum(1)
    rows = [i for i in range(len(confusion)) if support[i]]
    draws = [generator.binomial(support[i], confusion[i, i] / support[i], NUM_RESAMPLES) / support[i] for i in rows]
    return _percentiles(np.mean(draws, axis=0))


def mcnemar(first: np.ndarray, second: np.ndarray) -> float:
    """Two-sided exact p of "both are right equally often", from right or wrong of the same samples, (N,) bool each.

    Source: McNemar 1947 in its exact form: of the samples where just one is right, half should be the first's.
    """
    only_first, only_second = int((first & ~second).sum()), int((~first & second).sum())
    num = only_first + only_second
    if not num:
        return 1.0
    # log space: num may be in the thousands.
    logs = [
        math.lgamma(num + 1) - math.lgamma(k + 1) - math.lgamma(num - k + 1)
        for k in range(min(only_first, only_second) + 1)
    ]
    top = max(logs)
    tail = math.exp(top - num * math.log(2)) * math.fsum(math.exp(value - top) for value in logs)
    return min(1.0, 2 * tail)


def sign_flip(differences: np.ndarray, seed: int = 0, num: int = 10_000) -> float:
    """Two-sided p of "the signs of these paired differences are chance" (Fisher's randomisation test), by `num` draws.

    Equal sizes are exchangeable, so their signs are drawn together, as a binomial.
    """
    sizes, counts = np.unique(np.abs(_finite(differences, "differences")), return_counts=True)
    draws = np.random.default_rng(seed).binomial(counts, 0.5, size=(num, len(sizes)))
    sums = np.abs((2 * draws - counts) @ sizes)
    return float((1 + (sums >= abs(differences.sum()) - 1e-9).sum()) / (num + 1))


def auroc_difference(
    labels: np.ndarray, first: np.ndarray, second: np.ndarray, seed: int = 0
) -> tuple[float, tuple[float, float], float] | None:
    """AUROC of `second` less that of `first` on the same samples: value, 95 % interval, two-sided p, by bootstrap.

    Positives and negatives are drawn apart and the same for both. None where a class is absent.
    """
    values = [auroc(labels, scores) for scores in (first, second)]
    if values[0] is None or values[1] is None:
        return None
    labels = np.asarray(labels, dtype=bool)
    ranked = [_ranked(np.asarray(scores, dtype=np.float64)) for scores in (first, second)]
    generator, rows = np.random.default_rng(seed), [np.flatnonzero(labels == kind) for kind in (False, True)]
    found = []
    for _ in range(_num_resamples(2 * len(labels))):
        weights = np.zeros(len(labels))
        for own in rows:
            weights[own] = np.bincount(generator.integers(0, len(own), len(own)), minlength=len(own))
        one, two = (_weighted_auroc(labels[order], weights[order], starts) for order, starts in ranked)
        assert one is not None and two is not None
        found.append(two - one)
    differences = np.array(found)
    tail = min((differences <= 0).mean(), (differences >= 0).mean())
    p = min(1.0, 2 * max(float(tail), 1 / len(found)))
    return values[1] - values[0], _percentiles(differences), p


def paired_interval(first: np.ndarray, second: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap of mean(second - first), the same samples drawn for both."""
    return mean_interval(np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64), seed)


def holm(values: Sequence[float]) -> list[float]:
    """p values corrected for how many there are (Holm 1979), in the order given."""
    corrected, running = [0.0] * len(values), 0.0
    for place, i in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        running = max(running, min(1.0, (len(values) - place) * values[i]))
        corrected[i] = running
    return corrected


def _binary(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    labels, scores = np.asarray(labels, dtype=bool), _finite(scores, "scores")
    if len(labels) != len(scores) or not len(labels):
        raise UserError(f"an AUROC needs as many scores as labels, and one at least: {len(scores)}, {len(labels)}")
    return labels, scores


def _finite(values: Any, name: str) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if not len(values) or not np.isfinite(values).all():
        raise UserError(
            f"{name} must be there and finite; {int((~np.isfinite(values)).sum())} of {len(values)} are not"
        )
    return values


def _ranked(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rising order, and where in it a run of equal scores starts, as (N,) bool."""
    order = np.argsort(scores, kind="stable")
    ordered = scores[order]
    return order, np.r_[True, ordered[1:] != ordered[:-1]]


def _weighted_auroc(labels: np.ndarray, weights: np.ndarray, starts: np.ndarray) -> float | None:
    """Of samples in rising order of score; `starts` marks runs of equal scores."""
    runs = np.flatnonzero(starts)
    positive = np.add.reduceat(weights * labels, runs)
    negative = np.add.reduceat(weights * ~labels, runs)
    pairs = positive.sum() * negative.sum()
    if not pairs:
        return None
    below = np.cumsum(negative) - negative
    return float((positive * (below + negative / 2)).sum() / pairs)


def _num_resamples(num: int) -> int:
    return max(200, min(NUM_RESAMPLES, _MAX_RESAMPLED // max(1, num)))


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
