"""The metrics of medpmc-clip-eval, and their bootstrap from kept scores alone.

Source: Yale-BIDS-Chen-Lab/medpmc-clip-eval at 2e7b5d2, README (arXiv 2607.07673). Each row of the benchmark has three
metrics:

    classes     accuracy of the top class, macro F1, and the AUC over the flattened one-hot labels and scores
    labels      scores from 0.5 predict a label: accuracy over all pairs of sample and label, mean F1 of the labels, and
                mean AUC of the labels that have both kinds of samples
    options     as classes, where a class is the position of an option in its own question

A class without a sample and without a prediction has no F1. A label without either has an F1 of 0.

A resample draws units with replacement: the groups (patients, images of a question) if there are any, the samples
within their class for classes, and all samples for labels. The metrics of a resample are functions of sums of weights,
so a block of resamples is a product of a sparse matrix and the weights.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from bclip_fast.errors import UserError

METRICS = ("accuracy", "f1", "auc")
"""The metrics, in the order of the columns of all arrays here."""
NUM_DRAWS = 10_000
"""Number of resamples."""
_BLOCK = 64
_RUN = 32
_MAX_AT_ONCE = 512
# float32 counts whole numbers up to this one.
_MAX_EXACT = 1 << 24

Kind = Literal["classes", "labels", "options"]


@dataclass(frozen=True)
class KeptScores:
    """Everything that the metrics need. N rows: samples, or questions.

    Attributes:
        kind: which formulas hold, see the module.
        targets: int64 (N,), the class or the position of the right option. Or bool (N, C) for labels.
        scores: float32 (N, C). For options, a row's missing options are NaN at its end.
        groups: number of the unit of each row, int64 (N,). None: each row is a unit.
    """

    kind: Kind
    targets: np.ndarray
    scores: np.ndarray
    groups: np.ndarray | None = None

    def __post_init__(self) -> None:
        """Check shapes and values. Raises UserError."""
        num = len(self.scores)
        shape = self.scores.shape if self.kind == "labels" else (num,)
        if not num or self.scores.ndim != 2 or self.targets.shape != shape:
            raise UserError(f"targets {self.targets.shape} and scores {self.scores.shape} do not fit each other")
        if self.groups is not None and self.groups.shape != (num,):
            raise UserError(f"{len(self.groups)} groups do not fit {num} rows of scores")
        is_option = self.is_option
        if not np.isfinite(self.scores[is_option]).all() or (self.kind != "options" and not is_option.all()):
            raise UserError("scores hold NaN or infinity")
        if self.kind == "labels":
            if not (self.targets.any(0) & ~self.targets.all(0)).any():
                raise UserError("no label has samples with it and without it, so the AUC is undefined")
            return
        counts = is_option.sum(1)
        if (counts < 2).any():
            raise UserError(f"row {int(counts.argmin())} has {int(counts.min())} options, but needs at least two")
        if (self.targets < 0).any() or (self.targets >= counts).any():
            raise UserError("a target is not one of the classes or options of its row")

    @functools.cached_property
    def is_option(self) -> np.ndarray:
        """Whether a column is an option of the row, bool (N, C)."""
        return ~np.isnan(self.scores)

    @functools.cached_property
    def predictions(self) -> np.ndarray:
        """The position of the highest score, int64 (N,), the first one on a tie. For labels, bool (N, C)."""
        if self.kind == "labels":
            return self.scores >= 0.5
        return np.where(self.is_option, self.scores, -np.inf).argmax(1)

    @functools.cached_property
    def strata(self) -> list[int]:
        """Sizes of the strata, in the order of the units. Units are drawn within their stratum."""
        if self.kind == "classes" and self.groups is None:
            return np.unique(self.targets, return_counts=True)[1].tolist()  # type: ignore[no-any-return]
        return [int(self.units.max()) + 1]

    @functools.cached_property
    def units(self) -> np.ndarray:
        """Number of the unit of each row, int64 (N,), from 0 without gaps. The units of a stratum are neighbours."""
        if self.groups is not None:
            return np.unique(self.groups, return_inverse=True)[1].ravel()
        if self.kind != "classes":
            return np.arange(len(self.scores))
        units = np.empty(len(self.targets), np.int64)
        units[np.argsort(self.targets, kind="stable")] = np.arange(len(units))
        return units


def measure(kept: KeptScores) -> dict[str, float]:
    """Return the metrics by name. `auc` is defined for all kept scores."""
    sums = _Sums(kept)
    weights = np.ones((sums.num_units, 1), sums.dtype)
    return dict(zip(METRICS, sums.metrics(weights)[:, 0].tolist(), strict=True))


def resample(kept: KeptScores, *, num_draws: int | None = None, seed: int = 0) -> np.ndarray:
    """Return the metrics of `num_draws` resamples, by default `NUM_DRAWS`: float64 (num_draws, 3).

    The draws depend on the seed, the targets and the groups. So models that were measured on the same samples get the
    same draws, and their differences are paired. The number of threads changes nothing. A draw without both kinds of
    any label has an AUC of NaN.
    """
    sums, num_draws = _Sums(kept), num_draws or NUM_DRAWS
    result = np.empty((num_draws, len(METRICS)))
    starts = range(0, num_draws, _BLOCK)
    num_threads = min(len(starts), _num_processors())

    def work(thread: int) -> None:
        draws = _Draws(kept.strata)
        for start in starts[thread::num_threads]:
            stop = min(start + _BLOCK, num_draws)
            weights = draws(np.random.default_rng([seed, start])).astype(sums.dtype, copy=False)
            result[start:stop] = sums.metrics(weights)[:, : stop - start].T

    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(work, range(num_threads)))
    return result


def _num_processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def interval(draws: np.ndarray) -> tuple[float, float] | None:
    """Return the 95 % percentile interval of draws (n,). NaN is left out. None if all are NaN."""
    finite = draws[np.isfinite(draws)]
    if not len(finite):
        return None
    low, high = np.quantile(finite, [0.025, 0.975])
    return float(low), float(high)


class _Draws:
    """Draws blocks of resamples into memory of its own, which the next block overwrites."""

    def __init__(self, strata: Sequence[int]) -> None:
        self._strata, num = strata, sum(strata)
        # A stride of a power of two would map all rows to the same lines of the processor's cache.
        self._counts = np.zeros((_BLOCK, num + 16), np.float32)[:, :num]
        self._weights = np.empty((num, _BLOCK), np.float32)

    def __call__(self, generator: np.random.Generator) -> np.ndarray:
        """Return how often each unit is in each resample: float32 (units, `_BLOCK`)."""
        start = 0
        for size in self._strata:
            drawn = generator.integers(0, size, (_BLOCK, size), dtype=np.uint32)
            place = self._counts[:, start : start + size]
            if size <= _MAX_AT_ONCE:
                drawn += np.arange(0, _BLOCK * size, size, dtype=np.uint32)[:, None]
                place[:] = np.bincount(drawn.ravel(), minlength=_BLOCK * size).reshape(_BLOCK, size)
            else:  # the counts of one resample stay in the processor's cache
                for counts, units in zip(place, drawn, strict=True):
                    counts[:] = np.bincount(units, minlength=size)
            start += size
        np.copyto(self._weights, self._counts.T)
        return self._weights


class _Sums:
    """The sums of weights on which the metrics of resamples depend, as sparse matrices over the units."""

    def __init__(self, kept: KeptScores) -> None:
        self.kind, units = kept.kind, kept.units
        self.num_units = int(units.max()) + 1
        columns = kept.scores.shape[1]
        self.dtype = np.float32 if kept.is_option.sum() * 2 < _MAX_EXACT else np.float64
        if kept.kind == "labels":
            hits = kept.targets & kept.predictions
            masks = [*hits.T, *kept.targets.T, *kept.predictions.T]
            self._counts = self._stack([units[mask] for mask in masks])
            both = [i for i in range(columns) if kept.targets[:, i].any() and not kept.targets[:, i].all()]
            entries = [(kept.scores[:, i], kept.targets[:, i], units) for i in both]
            self._totals = self._stack([units])
        else:
            hits = kept.targets == kept.predictions
            rows = [units[hits & (kept.targets == i)] for i in range(columns)]
            rows += [units[kept.targets == i] for i in range(columns)]
            rows += [units[kept.predictions == i] for i in range(columns)]
            self._counts = self._stack(rows)
            is_right = np.arange(columns) == kept.targets[:, None]
            flat = kept.is_option.ravel()
            spread = np.repeat(units, columns)[flat]
            entries = [(kept.scores.ravel()[flat], is_right.ravel()[flat], spread)]
        self._ranked = [self._levels(*entry) for entry in entries]

    def _stack(self, rows: Sequence[np.ndarray]) -> Any:
        """Return a matrix (len(rows), units) whose entries count how often a row has a unit."""
        from scipy.sparse import csr_array

        ends = np.cumsum([0, *map(len, rows)])
        values = np.ones(ends[-1], self.dtype)
        return csr_array((values, np.concatenate(rows), ends), shape=(len(rows), self.num_units))

    def _levels(self, scores: np.ndarray, is_right: np.ndarray, units: np.ndarray) -> tuple[Any, Any, np.ndarray]:
        """Divide entries in ascending order of score into levels: wrong entries, and right ones that rank above them.

        Returns the matrices of the wrong and of the right entries (levels, units), and the levels whose right and wrong
        entries have equal scores. The number of levels is a multiple of `_RUN`.
        """
        order = np.argsort(scores, kind="stable")
        ordered, is_right, units = scores[order], is_right[order], units[order]
        starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
        has_right = np.logical_or.reduceat(is_right, starts)
        has_wrong = np.logical_or.reduceat(~is_right, starts)
        is_tie = has_right & has_wrong
        begins = np.r_[True, is_tie[1:] | is_tie[:-1] | (has_wrong[1:] & has_right[:-1])]
        level_of_run = np.cumsum(begins) - 1
        level = np.repeat(level_of_run, np.diff(np.r_[starts, len(ordered)]))
        ties = np.flatnonzero(is_tie[begins])
        return self._by_level(level, units, ~is_right), self._by_level(level, units, is_right), ties

    def _by_level(self, level: np.ndarray, units: np.ndarray, mask: np.ndarray) -> Any:
        from scipy.sparse import csr_array

        num_levels = -(-(int(level[-1]) + 1) // _RUN) * _RUN
        ends = np.searchsorted(level[mask], np.arange(num_levels + 1))
        values = np.ones(ends[-1], self.dtype)
        return csr_array((values, units[mask], ends), shape=(num_levels, self.num_units))

    def metrics(self, weights: np.ndarray) -> np.ndarray:
        """Return the metrics (3, n) of n resamples. weights: how often each unit is in each, (units, n)."""
        hits, right, predicted = np.split((self._counts @ weights).astype(np.float64), 3)
        both = right + predicted
        f1 = np.divide(2 * hits, both, out=np.zeros_like(hits), where=both > 0)
        if self.kind == "labels":
            num = (self._totals @ weights).astype(np.float64)
            accuracy = 1 - (both - 2 * hits).sum(0) / (num[0] * len(hits))
            mean_f1 = f1.mean(0)
        else:
            accuracy = hits.sum(0) / right.sum(0)
            mean_f1 = f1.sum(0) / (both > 0).sum(0)
        areas = np.stack([_area(*levels, weights) for levels in self._ranked])
        is_defined = np.isfinite(areas)
        count = is_defined.sum(0)
        area = np.divide(
            np.where(is_defined, areas, 0).sum(0), count, out=np.full(len(count), math.nan), where=count > 0
        )
        return np.stack([accuracy, mean_f1, area])


def _area(wrong: Any, right: Any, ties: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the AUC of each resample, (n,). NaN if it has only right or only wrong entries.

    The running sum of the wrong entries is a product with a triangular matrix in runs of levels, and a sum over runs.
    """
    num_wrong, num_right = wrong @ weights, right @ weights
    runs = num_wrong.reshape(-1, _RUN, num_wrong.shape[1])
    below = np.matmul(np.tri(_RUN, dtype=weights.dtype), runs)
    totals = below[:, -1].astype(np.float64)
    below.reshape(num_wrong.shape)[ties] -= num_wrong[ties] / 2
    right_runs = num_right.reshape(below.shape)
    right_totals = right_runs.sum(1, dtype=np.float64)
    ranked = np.einsum("kij,kij->j", right_runs, below, dtype=np.float64)
    ranked += np.einsum("kj,kj->j", right_totals, np.cumsum(totals, axis=0) - totals)
    pairs = totals.sum(0) * right_totals.sum(0)
    return np.divide(ranked, pairs, out=np.full(len(pairs), math.nan), where=pairs > 0)
