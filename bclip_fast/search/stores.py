"""Number formats of stored embeddings, and the faiss indexes that hold them.

| store | bytes per value | stored value |
|---|---|---|
| fp32 | 4 | the value |
| fp16 | 2 | the value, rounded to half precision |
| int8 | 1 | the number of its step, -128 to 127. 256 equal steps cover the range of each dimension |
| ubinary | 1/8 | its sign: 1 if it is positive. 8 dimensions share a byte, the first in the highest bit |

The names int8 and ubinary, and their codes, are those of `quantize_embeddings` in sentence-transformers. Its int8 codes
may be higher by 1, because it rounds towards zero.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bclip_fast.errors import UserError

Store = Literal["fp32", "fp16", "int8", "ubinary"]
Kind = Literal["faiss_flat", "hnsw", "ivf", "ivfpq"]
BITS = {"fp32": 32, "fp16": 16, "int8": 8, "ubinary": 1}
"""Bits per value."""
TRAINING_ROWS_PER_LIST = 64
MIN_PQ_ROWS = 256
"""Rows that a product quantizer of 8 bits needs."""
_RESCORED = 10  # candidates per hit whose scores are computed from the query itself


def check(kind: Kind, store: Store, num: int, dim: int) -> None:
    """Raise UserError for an index that `num` embeddings of `dim` values cannot have."""
    if store == "ubinary" and dim % 8:
        raise UserError(f"store ubinary packs 8 dimensions into a byte, but the model has {dim}; use --store int8")
    if store == "ubinary" and kind in ("hnsw", "ivf"):
        raise UserError(f"index {kind} does not hold ubinary embeddings; use --index faiss_flat, or --store int8")
    if kind == "ivfpq" and num < MIN_PQ_ROWS:
        raise UserError(f"index ivfpq needs at least {MIN_PQ_ROWS} images, the data have {num}; use --index faiss_flat")


def num_lists(num: int) -> int:
    """Return the number of inverted lists: 4 sqrt(N), with at least 39 training rows each, as faiss advises."""
    return max(1, min(int(4 * num**0.5), num // 39))


def num_probes(num: int) -> int:
    """Return the number of lists that a query of IVF-PQ searches: 1 in 32, at least 16."""
    return min(num_lists(num), max(16, num_lists(num) // 32))


def num_pq_bytes(dim: int) -> int:
    """Return the bytes of a product-quantized embedding: one for 8 dimensions, or for fewer where 8 do not divide."""
    return dim // next(size for size in (8, 4, 2, 1) if dim % size == 0)


def num_training_rows(kind: Kind, num: int) -> int:
    """Return the number of embeddings that train an index."""
    if kind == "ivfpq":
        return min(num, max(TRAINING_ROWS_PER_LIST * num_lists(num), 64 * 256))
    return min(num, TRAINING_ROWS_PER_LIST * num_lists(num)) if kind == "ivf" else 0


def bytes_per_row(kind: Kind, store: Store, dim: int) -> int:
    """Return the bytes of an image in index.faiss: its codes, its number, and for HNSW its 64 neighbours."""
    codes = num_pq_bytes(dim) if kind == "ivfpq" else dim * BITS[store] // 8
    return codes + {"faiss_flat": 0, "hnsw": 4 * 64 + 16, "ivf": 8, "ivfpq": 8}[kind]


def new_index(kind: Kind, store: Store, num: int, sample: np.ndarray, ranges: np.ndarray) -> Any:
    """Return a trained empty index for `num` embeddings.

    Args:
        sample: training rows, float32 (S, D) of unit norm.
        ranges: smallest and largest value of each dimension, float32 (2, D).
    """
    import faiss

    dim = ranges.shape[1]
    check(kind, store, num, dim)
    product, scalar = faiss.METRIC_INNER_PRODUCT, faiss.ScalarQuantizer
    codes: Any = {"fp16": scalar.QT_fp16, "int8": scalar.QT_8bit}.get(store)
    index: Any
    if kind == "ivfpq":
        coarse = faiss.IndexFlatIP(dim)
        index = faiss.IndexIVFPQ(coarse, dim, num_lists(num), num_pq_bytes(dim), 8, product)
        index.nprobe = num_probes(num)
    elif kind == "ivf":
        coarse, lists = faiss.IndexFlatIP(dim), num_lists(num)
        if codes is None:
            index = faiss.IndexIVFFlat(coarse, dim, lists, product)
        else:
            index = faiss.IndexIVFScalarQuantizer(coarse, dim, lists, codes, product, False)
        index.nprobe = min(64, lists)
    elif kind == "hnsw":
        index = faiss.IndexHNSWFlat(dim, 32, product) if codes is None else faiss.IndexHNSWSQ(dim, codes, 32, product)
        index.hnsw.efSearch = 64
    elif store == "ubinary":
        return faiss.IndexBinaryFlat(dim)
    else:
        index = faiss.IndexFlatIP(dim) if codes is None else faiss.IndexScalarQuantizer(dim, codes, product)
    if not index.is_trained:
        index.train(np.ascontiguousarray(sample if len(sample) else ranges))
    if store == "int8" and kind != "ivfpq":
        # The sample may lack the extreme values. Two rows with them give the quantizer the true ranges.
        holder: Any = faiss.downcast_index(index.storage) if kind == "hnsw" else index
        holder.sq.train(np.ascontiguousarray(ranges))
    return index


def add(index: Any, rows: np.ndarray) -> None:
    """Add float32 rows (n, D) to an index of any store."""
    if is_binary(index):
        index.add(np.packbits(rows > 0, axis=1))
    else:
        index.add(np.ascontiguousarray(rows))


def is_binary(index: Any) -> bool:
    """Return whether an index holds ubinary embeddings."""
    import faiss

    return isinstance(index, faiss.IndexBinary)


def encode(rows: np.ndarray, store: Store, ranges: np.ndarray) -> np.ndarray:
    """Return the stored values of float32 rows (n, D): (n, D), or for ubinary uint8 (n, D / 8).

    ranges: smallest and largest value of each dimension, (2, D), for int8.
    """
    if store == "fp32":
        return rows
    if store == "fp16":
        return rows.astype(np.float16)
    if store == "ubinary":
        return np.packbits(rows > 0, axis=1)
    low, width = ranges[0], np.maximum(ranges[1] - ranges[0], np.finfo(np.float32).tiny)
    # In the order of faiss's operations, so that the codes in both files are equal.
    codes = (np.clip((rows - low) / width, 0, 1) * np.float32(255)).astype(np.int16)
    return (codes - 128).astype(np.int8)


def search(index: Any, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return scores (n, k), float32 cosines, and rows (n, k), int64, of the embeddings nearest to float32 (n, D).

    A missing neighbour has row -1. Among ubinary embeddings, the 10 k with the fewest unequal bits are scored again by
    the cosine of the query and the vector of signs.
    """
    if not is_binary(index):
        result: tuple[np.ndarray, np.ndarray] = index.search(np.ascontiguousarray(queries), min(k, index.ntotal))
        return result
    import faiss

    num = min(_RESCORED * k, index.ntotal)
    rows = index.search(np.packbits(queries > 0, axis=1), num)[1]
    # A view of the mapped file. It would be invalid after the index.
    codes = faiss.rev_swig_ptr(index.xb.data(), index.ntotal * index.d // 8).reshape(index.ntotal, -1)
    signs = np.unpackbits(codes[rows], axis=2).astype(np.float32) * 2 - 1
    scores = np.einsum("nd,nkd->nk", queries, signs) / np.float32(index.d**0.5)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)


def write(index: Any, file: io.BufferedWriter) -> None:
    """Write an index. Raises OSError if the disk is full, which faiss's own files ignore at their end."""
    import faiss

    writer = faiss.PyCallbackIOWriter(file.write)  # type: ignore[attr-defined]
    (faiss.write_index_binary if is_binary(index) else faiss.write_index)(index, writer)


def read(path: Path) -> Any:
    """Map an index into memory: the system reads its pages at the first use, and may drop them.

    Raises OSError, or RuntimeError if the file is damaged.
    """
    import faiss

    with path.open("rb") as file:
        reader = faiss.read_index_binary if file.read(4) == b"IBxF" else faiss.read_index
    # faiss before 1.11 cannot map all of these indexes and reads them.
    return reader(str(path), getattr(faiss, "IO_FLAG_MMAP_IFC", 0))
