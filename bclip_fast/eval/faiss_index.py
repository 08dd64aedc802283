"""Nearest neighbours by an index of faiss."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from bclip_fast.errors import UserError

Index = Literal["exact", "faiss_flat", "hnsw", "ivf"]


def build(candidates: Tensor, kind: Index, *, effort: int = 64) -> Any:
    """faiss's index of (N, D) candidates by inner product, approximate unless `faiss_flat`.

    effort: efSearch of HNSW, the lists probed by IVF; more finds more and takes longer.
    """
    import faiss

    rows, dim = np.ascontiguousarray(candidates.cpu().float().numpy()), candidates.shape[1]
    if kind == "faiss_flat":
        index: Any = faiss.IndexFlatIP(dim)
    elif kind == "hnsw":
        index = faiss.IndexHNSWFlat(dim, 32, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efSearch = effort
    elif kind == "ivf":
        # faiss's guideline of 4 sqrt(N) lists, trained on at least 39 rows each.
        num_lists = max(1, min(int(4 * len(rows) ** 0.5), len(rows) // 39))
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, num_lists, faiss.METRIC_INNER_PRODUCT)
        index.train(rows)
        index.nprobe = min(effort, num_lists)
    else:
        raise UserError(f"index {kind!r} is unknown: use exact, faiss_flat, hnsw or ivf")
    index.add(rows)
    return index


def search(queries: Tensor, candidates: Tensor, kind: Index, k: int, *, effort: int = 64) -> Tensor:
    """(N, k) int64: the k nearest candidates as an index of faiss finds them; `kind` and `effort` as of `build`."""
    index = build(candidates, kind, effort=effort)
    vectors = np.ascontiguousarray(queries.cpu().float().numpy())
    return torch.from_numpy(index.search(vectors, min(k, len(candidates)))[1])
