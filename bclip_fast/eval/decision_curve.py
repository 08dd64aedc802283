"""Decision curves of binary tasks (Vickers and Elkin 2006, doi 10.1177/0272989X06295361).

At a threshold t, the samples with a probability of at least t are treated. The net benefit is

    true positives / N - false positives / N * t / (1 - t).

Two rules without a model are the baselines: treat all, and treat none, which has a net benefit of 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bclip_fast.errors import UserError

from . import statistics

THRESHOLDS = np.arange(1, 100) / 100


def measure(is_positive: np.ndarray, probabilities: np.ndarray, class_name: str) -> dict[str, Any]:
    """Return the net benefit of each of `THRESHOLDS`, with its 95 % bootstrap interval, and of treating all.

    Args:
        is_positive: bool (N,).
        probabilities: float (N,), of the positive class, whose name is `class_name`.

    Returns:
        JSON-ready dict: class, num_samples, prevalence, and `points` with threshold, net_benefit, low, high, treat_all
        and treat_none.

    Raises:
        UserError: no samples, or NaN.
    """
    if not len(probabilities) or not np.isfinite(probabilities).all():
        raise UserError("a decision curve needs at least one sample, and probabilities that are finite")
    num = len(probabilities)
    # A sample is treated at the thresholds up to its probability. So counts of `steps` decide the whole curve.
    steps = np.searchsorted(THRESHOLDS, probabilities, side="right")
    size = len(THRESHOLDS) + 1
    cells = np.bincount(steps + size * np.asarray(is_positive, dtype=np.int64), minlength=2 * size)
    draws = np.random.default_rng(0).multinomial(num, cells / num, size=statistics.NUM_RESAMPLES)
    low, high = np.quantile(_net_benefit(draws), [(1 - statistics.LEVEL) / 2, (1 + statistics.LEVEL) / 2], axis=0)
    prevalence = float(np.mean(is_positive))
    odds = THRESHOLDS / (1 - THRESHOLDS)
    columns = {
        "threshold": THRESHOLDS,
        "net_benefit": _net_benefit(cells[None])[0],
        "low": low,
        "high": high,
        "treat_all": prevalence - (1 - prevalence) * odds,
        "treat_none": np.zeros(len(THRESHOLDS)),
    }
    points = [dict(zip(columns, row, strict=True)) for row in np.stack(list(columns.values()), 1).round(9).tolist()]
    return {"class": class_name, "num_samples": num, "prevalence": prevalence, "points": points}


def _net_benefit(cells: np.ndarray) -> np.ndarray:
    """Return the net benefit (R, T) of counts (R, 2 (T + 1)): negatives by step, then positives."""
    negative, positive = np.split(cells, 2, axis=1)
    # Treated at threshold number k are the samples of the steps above k.
    false, true = (np.cumsum(part[:, ::-1], axis=1)[:, ::-1][:, 1:] for part in (negative, positive))
    return (true - false * (THRESHOLDS / (1 - THRESHOLDS))) / cells.sum(1, keepdims=True)
