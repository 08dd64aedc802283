"""Average precision and ranks of image-to-image retrieval, exact, with ties in random order.

Similarities are rounded to multiples of 2^-20, about 1e-6, because float32 embeddings cannot tell smaller differences
apart. Equal ones are ties. A tie counts as the average over random orders of the tied candidates (McSherry and Najork
2008, ECIR, doi 10.1007/978-3-540-78646-7_38). A model that maps everything to one point therefore scores exactly
chance.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .retrieval import Ranks, full_float32

_LEVELS = 1 << 20
_SHIFT = 23
"""Bits of a key: a similarity of -1 to 1 has 2^21 + 1 levels, and one bit says whether the candidate is correct."""
_PAIRS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Retrieved:
    """The result of every query that has a correct candidate."""

    rows: np.ndarray
    """Numbers of these queries, int64 (Q,)."""
    average_precision: np.ndarray
    """Average precision of each of these queries, float64 (Q,)."""
    ranks: Ranks
    """Ranks of the first correct candidate of each of these queries."""


@torch.inference_mode()
def retrieve(
    queries: Tensor,
    query_classes: np.ndarray,
    candidates: Tensor,
    candidate_classes: np.ndarray,
    *,
    is_same: bool,
    pairs_at_once: int = _PAIRS_AT_ONCE,
) -> Retrieved:
    """Rank all candidates for each query. A candidate is correct if it has the query's class.

    The memory beyond the results is a few times `pairs_at_once` numbers.

    Args:
        queries, candidates: (N, D) and (M, D), unit norm.
        query_classes, candidate_classes: int64 (N,) and (M,).
        is_same: the candidates are the queries. A query is then no candidate of itself.
        pairs_at_once: similarities to hold at once.
    """
    num_candidates = len(candidates) - is_same
    sizes = np.bincount(candidate_classes, minlength=int(query_classes.max()) + 1)
    num_correct = sizes[query_classes] - is_same
    rows = np.flatnonzero(num_correct > 0)
    precision, counts = np.zeros(len(rows)), np.zeros((3, len(rows)), np.int64)
    step = max(1, pairs_at_once // len(candidates))
    for start in range(0, len(rows), step):
        block = rows[start : start + step]
        keys = _keys(queries[torch.from_numpy(block).to(queries.device)], candidates)
        keys |= query_classes[block, None] != candidate_classes[None]
        if is_same:  # the query itself becomes the last candidate, and is then cut off
            keys[np.arange(len(block)), block] = (1 << _SHIFT) - 1
        keys.sort(axis=1)
        part = slice(start, start + len(block))
        precision[part], counts[:, part] = _measure(keys[:, :num_candidates])
    better, tied, tied_correct = map(torch.from_numpy, counts)
    ranks = Ranks(better, tied, tied_correct, torch.from_numpy(num_correct[rows]), num_candidates)
    return Retrieved(rows, precision, ranks)


def _keys(queries: Tensor, candidates: Tensor) -> np.ndarray:
    """Return keys int32 (n, M) that ascend as the similarities descend. Their lowest bit is 0."""
    with full_float32():
        scores = queries.float() @ candidates.float().T
    levels = scores.clamp_(-1, 1).mul_(-_LEVELS).round_().to(torch.int32).add_(_LEVELS)
    return levels.mul_(2).cpu().numpy()


def _measure(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return average precisions (n,), and counts (3, n): better, tied and correct tied candidates.

    keys: int32 (n, M), ascending in each row, 0 in the lowest bit of the correct candidates. Each row has one of them.
    """
    num, width = keys.shape
    is_correct = (keys & 1) == 0
    num_correct = is_correct.sum(1)
    query, place = np.nonzero(is_correct)
    ends = np.cumsum(num_correct)
    # The number of correct candidates up to each correct one.
    hits = np.arange(1, len(query) + 1) - (ends - num_correct)[query]
    total = np.bincount(query, hits / (place + 1), minlength=num)

    # A run of ties keeps its correct candidates first. A run of both kinds has one border between them.
    line = (keys.astype(np.int64) + (np.arange(num) << _SHIFT)[:, None]).ravel()
    border_query, border = np.nonzero((keys[:, 1:] ^ keys[:, :-1]) == 1)
    level = line[border_query * width + border]  # key of the correct candidates of the run
    low, middle, high = (np.searchsorted(line, level + step) - border_query * width for step in (0, 1, 2))
    sizes, correct = high - low, middle - low
    before = hits[np.searchsorted(query * width + place, border_query * width + low)] - 1
    expected = _expected(low, sizes, correct, before) - _in_order(low, correct, before)
    total += np.bincount(border_query, expected, minlength=num)

    first = place[ends - num_correct]
    first_keys = line[np.arange(num) * width + first]
    low, middle, high = (np.searchsorted(line, first_keys + step) - np.arange(num) * width for step in (0, 1, 2))
    return total / num_correct, np.stack([low, high - low, middle - low])


def _expected(low: np.ndarray, sizes: np.ndarray, correct: np.ndarray, before: np.ndarray) -> np.ndarray:
    """Return the expected sum of precisions at the correct candidates of each run of ties.

    A run has n tied candidates, r of them correct. Its place i is correct with probability r / n. In that case, the
    i - 1 places before it hold (i - 1)(r - 1) / (n - 1) correct candidates on average.
    """
    run, i = _ragged(sizes)
    n, r = sizes[run], correct[run]
    values = r / n * (before[run] + 1 + i * (r - 1) / np.maximum(n - 1, 1)) / (low[run] + i + 1)
    return np.bincount(run, values, minlength=len(sizes))


def _in_order(low: np.ndarray, correct: np.ndarray, before: np.ndarray) -> np.ndarray:
    """Return the sum of precisions of each run of ties whose correct candidates come first."""
    run, i = _ragged(correct)
    return np.bincount(run, (before[run] + i + 1) / (low[run] + i + 1), minlength=len(correct))


def _ragged(sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return for each member of runs of `sizes` the number of its run, and its place in it, from 0."""
    run = np.repeat(np.arange(len(sizes)), sizes)
    return run, np.arange(len(run)) - np.repeat(np.cumsum(sizes) - sizes, sizes)


def chance(num_correct: np.ndarray, num_candidates: int) -> np.ndarray:
    """Return the expected average precision of a random order, float64 (Q,)."""
    sizes, inverse = np.unique(num_correct, return_inverse=True)
    i = np.arange(num_candidates)
    harmonic = float((1 / (i + 1)).sum())
    # The mean over places i of (1 + (i - 1)(r - 1) / (n - 1)) / i, as in `_expected`.
    slope = (sizes - 1) / max(num_candidates - 1, 1)
    return ((harmonic + slope * (num_candidates - harmonic)) / num_candidates)[inverse.ravel()]
