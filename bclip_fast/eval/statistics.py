"""Metrics with intervals: AUROC, ROC points, bootstrap and paired tests.

A metric is a JSON-ready dict with name, value, chance, chance_is, unit, higher_is_better, num_samples and interval. The
95 % interval covers the random choice of test samples. It does not cover other seeds or other data.
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
_MAX_COUNTS = 1 << 22
"""Counts of a resample's samples that are in memory at once."""


def metric(
    name: str,
    value: float | None,
    chance: float,
    chance_baseline: str,
    num_samples: int,
    *,
    unit: str = "share",
    interval: tuple[float, float] | None = None,
    **extra: Any,
) -> dict[str, Any]:
    """Return a metric as a dict.

    Args:
        chance: score of the baseline that `chance_baseline` describes.
        unit: `share` (0 to 1, higher is better) or `rank` (from 1, lower is better).
        extra: further entries.
    """
    return {
        "name": name,
        "value": value,
        "chance": chance,
        "chance_is": chance_baseline,
        "unit": unit,
        "higher_is_better": unit == "share",
        "num_samples": num_samples,
        "interval": None if interval is None else [float(interval[0]), float(interval[1])],
        **extra,
    }


def auroc(labels: np.ndarray, scores: np.ndarray) -> float | None:
    """Compute the area under the ROC curve: P(a positive scores above a negative), where a tie counts half.

    Source: Mann and Whitney, 1947.

    Args:
        labels: (N,) bool.
        scores: (N,) float. Higher scores mean positive.

    Returns:
        The area, or None if one class is absent.
    """
    labels, scores = _binary(labels, scores)
    order, starts = _ranked(scores)
    return _weighted_auroc(labels[order], np.ones(len(labels)), starts)


def roc_points(labels: np.ndarray, scores: np.ndarray, *, at_most: int = 400) -> list[tuple[float, float]]:
    """Return points (false positive rate, true positive rate) from (0, 0) to (1, 1), one per distinct score.

    at_most: number of points to which a longer curve is thinned, for a plot.
    """
    labels, scores = _binary(labels, scores)
    if labels.all() or not labels.any():
        return []
    order, starts = _ranked(scores)
    # In descending order, a run of equal scores ends at the position where it starts in ascending order.
    ends = np.flatnonzero(starts[::-1])
    true, false = np.cumsum(labels[order][::-1]), np.cumsum(~labels[order][::-1])
    points = np.stack([np.r_[0, false[ends]] / false[-1], np.r_[0, true[ends]] / true[-1]], axis=1)
    if len(points) > at_most:
        points = points[np.unique(np.linspace(0, len(points) - 1, at_most).round().astype(int))]
    return [(float(x), float(y)) for x, y in points]


def auroc_interval(labels: np.ndarray, scores: np.ndarray, seed: int = 0) -> tuple[float, float] | None:
    """Return the 95 % percentile bootstrap interval of the AUROC.

    Positives and negatives are drawn separately, so that both classes are in every resample. None if one is absent.
    """
    labels, scores = _binary(labels, scores)
    if labels.all() or not labels.any():
        return None
    order, starts = _ranked(scores)
    labels = labels[order]
    generator = np.random.default_rng(seed)
    rows = _class_rows(labels)
    values = [
        _weighted_auroc(labels, _resample_weights(generator, rows), starts) for _ in range(num_resamples(len(labels)))
    ]
    return percentiles(np.array(values))


def macro_auroc_interval(targets: np.ndarray, scores: np.ndarray, seed: int = 0) -> tuple[float, float] | None:
    """Return the 95 % percentile bootstrap interval of the mean AUROC over classes.

    A resample draws samples with all their classes. The mean covers the classes that have both positive and negative
    samples.

    Args:
        targets: (N, C) bool.
        scores: (N, C).

    Returns:
        The interval, or None if no class has both.
    """
    classes = [i for i in range(targets.shape[1]) if targets[:, i].any() and not targets[:, i].all()]
    if not classes:
        return None
    return percentiles(auroc_draws(targets[:, classes], scores[:, classes], np.random.default_rng(seed)))


def auroc_draws(targets: np.ndarray, scores: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Return the mean AUROC over classes of resamples, float64 (R,). A class without both kinds in one is left out.

    targets, scores: (N, C). Each column has both positive and negative samples.
    """
    columns = zip(targets.T, scores.T, strict=True)
    ranked = [(labels, *_ranked(_finite(values, "scores"))) for labels, values in columns]
    num, means = len(targets), []
    for _ in range(num_resamples(num * len(ranked))):
        weights = np.bincount(generator.integers(0, num, num), minlength=num).astype(np.float64)
        aurocs = [_weighted_auroc(labels[order], weights[order], starts) for labels, order, starts in ranked]
        defined = [value for value in aurocs if value is not None]
        if defined:
            means.append(sum(defined) / len(defined))
    return np.array(means)


def mean_interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of a mean.

    Samples of equal value are interchangeable, so a resample only needs the count of each distinct value. The counts
    are multinomial. This is the exact bootstrap, and its memory does not grow with the number of samples.
    """
    return percentiles(mean_draws(values, np.random.default_rng(seed)))


def class_mean_interval(values: np.ndarray, classes: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of the mean over classes. Samples are drawn within their class.

    values, classes: (N,), class numbers int64.
    """
    order = np.argsort(classes, kind="stable")
    groups = np.split(values[order], np.flatnonzero(np.diff(classes[order])) + 1)
    generator = np.random.default_rng(seed)
    total = np.zeros(NUM_RESAMPLES)
    for group in groups:
        total += mean_draws(group, generator, NUM_RESAMPLES)
    return percentiles(total / len(groups))


def mean_draws(values: np.ndarray, generator: np.random.Generator, num: int | None = None) -> np.ndarray:
    """Return the means of `num` resamples, float64 (num,). None: as many as `mean_interval` takes."""
    distinct, counts = np.unique(_finite(values, "values"), return_counts=True)
    num = num_resamples(len(distinct)) if num is None else num
    step = max(1, _MAX_COUNTS // len(distinct))
    sizes = [min(step, num - start) for start in range(0, num, step)]
    draws = (generator.multinomial(len(values), counts / len(values), size=size) @ distinct for size in sizes)
    return np.concatenate(list(draws)) / len(values)


def median_interval(values: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval of the median by order statistics.

    The number of samples below the true median is binomial(N, 1/2). In the limit, the ends are those of the bootstrap.
    Source: Conover, Practical Nonparametric Statistics, section 3.2.
    """
    ordered = np.sort(_finite(values, "values"))
    half = 1.959963984540054 * math.sqrt(len(ordered)) / 2
    low, high = math.floor(len(ordered) / 2 - half), math.ceil(len(ordered) / 2 + half)
    return float(ordered[max(0, low)]), float(ordered[min(len(ordered) - 1, high)])


def balanced_interval(confusion: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of the mean recall. Samples are drawn within their class.

    confusion: counts (C, C), row = true class.
    """
    generator = np.random.default_rng(seed)
    support = confusion.sum(1)
    rows = [i for i in range(len(confusion)) if support[i]]
    draws = [generator.binomial(support[i], confusion[i, i] / support[i], NUM_RESAMPLES) / support[i] for i in rows]
    return percentiles(np.mean(draws, axis=0))


def mcnemar(first: np.ndarray, second: np.ndarray) -> float:
    """Return the two-sided exact p value of "both are correct equally often" (McNemar 1947).

    Under this hypothesis, each model is the correct one in half of the samples on which exactly one is correct.

    first, second: (N,) bool, whether each model is correct on each sample.
    """
    only_first, only_second = int((first & ~second).sum()), int((~first & second).sum())
    num = only_first + only_second
    if not num:
        return 1.0
    # Logarithms, because num may be in the thousands.
    logs = [
        math.lgamma(num + 1) - math.lgamma(k + 1) - math.lgamma(num - k + 1)
        for k in range(min(only_first, only_second) + 1)
    ]
    top = max(logs)
    tail = math.exp(top - num * math.log(2)) * math.fsum(math.exp(value - top) for value in logs)
    return min(1.0, 2 * tail)


def sign_flip(differences: np.ndarray, seed: int = 0, num: int = 10_000) -> float:
    """Return the two-sided p value of "the signs of these paired differences are random", by `num` random draws.

    This is Fisher's randomisation test. Differences of equal size are interchangeable, so one binomial draws the signs
    of all of them.
    """
    sizes, counts = np.unique(np.abs(_finite(differences, "differences")), return_counts=True)
    draws = np.random.default_rng(seed).binomial(counts, 0.5, size=(num, len(sizes)))
    sums = np.abs((2 * draws - counts) @ sizes)
    return float((1 + (sums >= abs(differences.sum()) - 1e-9).sum()) / (num + 1))


def auroc_difference(
    labels: np.ndarray, first: np.ndarray, second: np.ndarray, seed: int = 0
) -> tuple[float, tuple[float, float], float] | None:
    """Compare two AUROCs on the same samples by bootstrap: (second - first, its 95 % interval, two-sided p value).

    Positives and negatives are drawn separately, the same ones for both models. None if one class is absent.
    """
    values = [auroc(labels, scores) for scores in (first, second)]
    if values[0] is None or values[1] is None:
        return None
    labels = np.asarray(labels, dtype=bool)
    ranked = [_ranked(np.asarray(scores, dtype=np.float64)) for scores in (first, second)]
    generator, rows = np.random.default_rng(seed), _class_rows(labels)
    resampled = []
    for _ in range(num_resamples(2 * len(labels))):
        weights = _resample_weights(generator, rows)
        first_value, second_value = (_weighted_auroc(labels[order], weights[order], starts) for order, starts in ranked)
        assert first_value is not None
        assert second_value is not None
        resampled.append(second_value - first_value)
    differences = np.array(resampled)
    tail = min((differences <= 0).mean(), (differences >= 0).mean())
    p = min(1.0, 2 * max(float(tail), 1 / len(differences)))
    return values[1] - values[0], percentiles(differences), p


def paired_interval(first: np.ndarray, second: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of mean(second - first), with the same samples for both."""
    return mean_interval(np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64), seed)


def holm(values: Sequence[float]) -> list[float]:
    """Correct p values for the number of tests (Holm 1979). The order stays."""
    corrected, running = [0.0] * len(values), 0.0
    for number, i in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        running = max(running, min(1.0, (len(values) - number) * values[i]))
        corrected[i] = running
    return corrected


def _binary(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    labels, scores = np.asarray(labels, dtype=bool), _finite(scores, "scores")
    if len(labels) != len(scores) or not len(labels):
        raise UserError(f"an AUROC needs as many scores as labels, not {len(scores)} scores and {len(labels)} labels")
    return labels, scores


def _finite(values: Any, name: str) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if not len(values) or not np.isfinite(values).all():
        raise UserError(
            f"{name} must be non-empty and finite; {int((~np.isfinite(values)).sum())} of {len(values)} are not finite"
        )
    return values


def _ranked(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the ascending order, and bool (N,): whether a run of equal scores starts at each position of the order."""
    order = np.argsort(scores, kind="stable")
    ordered = scores[order]
    return order, np.r_[True, ordered[1:] != ordered[:-1]]


def _weighted_auroc(labels: np.ndarray, weights: np.ndarray, starts: np.ndarray) -> float | None:
    """Compute the AUROC of weighted samples in ascending order of score. `starts` marks runs of equal scores."""
    runs = np.flatnonzero(starts)
    positive = np.add.reduceat(weights * labels, runs)
    negative = np.add.reduceat(weights * ~labels, runs)
    pairs = positive.sum() * negative.sum()
    if not pairs:
        return None
    below = np.cumsum(negative) - negative
    return float((positive * (below + negative / 2)).sum() / pairs)


def _class_rows(labels: np.ndarray) -> list[np.ndarray]:
    """Return the rows of the negatives, and those of the positives."""
    return [np.flatnonzero(labels == label) for label in (False, True)]


def _resample_weights(generator: np.random.Generator, class_rows: Sequence[np.ndarray]) -> np.ndarray:
    """Draw with replacement within each class. Return how often each sample was drawn, float64 (N,)."""
    weights = np.zeros(sum(map(len, class_rows)))
    for rows in class_rows:
        weights[rows] = np.bincount(generator.integers(0, len(rows), len(rows)), minlength=len(rows))
    return weights


def num_resamples(num: int) -> int:
    """Return the number of resamples for `num` samples: 1000, or fewer for more than 100,000 samples."""
    return max(200, min(NUM_RESAMPLES, _MAX_RESAMPLED // max(1, num)))


def percentiles(values: np.ndarray) -> tuple[float, float]:
    """Return the ends of the 95 % percentile interval of resampled values."""
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
