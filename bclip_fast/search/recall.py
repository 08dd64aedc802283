"""Recall of an approximate index: the share of the exact 10 nearest images that it finds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from . import stores

K = 10
_TIES = 1e-6


def recall_at_10(
    index: Any, queries: np.ndarray, blocks: Iterable[np.ndarray], own_rows: np.ndarray | None = None
) -> float:
    """Return the mean recall at 10 of queries against an exact search in float32.

    An image counts as found if its exact cosine is at least that of the exact 10th, so that equal images may replace
    one another.

    Args:
        queries: float32 (q, D) of unit norm.
        blocks: all embeddings in the order of the index, in float32 blocks (n, D).
        own_rows: row of each query in the index, (q,), which counts neither as found nor as near. None: queries that
            are not in the index.
    """
    own = np.full(len(queries), -1) if own_rows is None else own_rows
    found = stores.search(index, queries, K + 1)[1]
    exact_scores = np.full(found.shape, -np.inf, dtype=np.float32)
    best = np.full((len(queries), 0), -np.inf, dtype=np.float32)
    start = 0
    for block in blocks:
        scores = queries @ block.T
        place = own - start
        inside = np.flatnonzero((place >= 0) & (place < len(block)))
        scores[inside, place[inside]] = -np.inf
        here = (found >= start) & (found < start + len(block))
        query, _ = np.nonzero(here)
        exact_scores[here] = scores[query, found[here] - start]
        best = -np.sort(-np.concatenate([best, scores], axis=1), axis=1)[:, :K]
        start += len(block)
    exact_scores[found == own[:, None]] = -np.inf
    # The index found its own row in place of an 11th image, or not at all.
    kept = np.take_along_axis(exact_scores, np.argsort(found == own[:, None], axis=1, kind="stable")[:, :K], axis=1)
    num = np.minimum(np.isfinite(best).sum(1), K)
    threshold = best[np.arange(len(best)), num - 1] - _TIES
    hits = np.minimum((kept >= threshold[:, None]).sum(1), num)
    return float((hits / num).mean())
