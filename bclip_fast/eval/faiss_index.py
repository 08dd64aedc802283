"""Nearest neighbours by faiss."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from bclip_fast.errors import UserError

Index = Literal["exact", "faiss_flat", "hnsw", "ivf"]


def build_index(candidates: Tensor, kind: Index, *, effort: int = 64) -> Any:
    """Build faiss's inner-product index of candidates (N, D). Only `faiss_flat` is exact.

    effort: efSearch of HNSW, or the number of lists that IVF probes. More effort finds more and takes longer.
    """
    import faiss

    rows, dim = np.ascontiguousarray(candidates.cpu().float().numpy()), candidates.shape[1]
    if kind == "faiss_flat":
        index: Any = faiss.IndexFlatIP(dim)
    elif kind == "hnsw":
        index = faiss.IndexHNSWFlat(dim, 32, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efSearch = effort
    elif kind == "ivf":
        # faiss's guideline: 4 sqrt(N) lists, trained on at least 39 rows each.
        num_lists = max(1, min(int(4 * len(rows) ** 0.5), len(rows) // 39))
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, num_lists, faiss.METRIC_INNER_PRODUCT)
        index.train(rows)
        index.nprobe = min(effort, num_lists)
    else:
        raise UserError(f"index {kind!r} is unknown; use exact, faiss_flat, hnsw or ivf")
    index.add(rows)
    return index


def nearest(queries: Tensor, candidates: Tensor, kind: Index, k: int, *, effort: int = 64) -> Tensor:
    """Return the k nearest candidates that a faiss index finds, int64 (N, k). Arguments as for `build_index`."""
    index = build_index(candidates, kind, effort=effort)
    vectors = np.ascontiguousarray(queries.cpu().float().numpy())
    return torch.from_numpy(index.search(vectors, min(k, len(candidates)))[1])
