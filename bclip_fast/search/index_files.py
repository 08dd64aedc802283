"""The files of an index, written from its parts block by block."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np

from bclip_fast.errors import UserError
from bclip_fast.eval.datasets import EvalDataset
from bclip_fast.eval.datasets.subset import SubsetDataset
from bclip_fast.eval.embed import Embedder, log_skipped
from bclip_fast.io.atomic import replacing_files
from bclip_fast.io.hashing import sha256_of_file

from . import stores
from .parts import Parts
from .recall import recall_at_10

log = logging.getLogger(__name__)

ROWS, INDEX = "embeddings.parquet", "index.faiss"
FIELDS = ("licence", "licence_url", "pmcid", "doi", "title", "citation")
NUM_QUERIES = 200
"""Number of images and of captions that measure the recall."""
METADATA = b"bclip_fast"
"""Key of our JSON in the metadata of `ROWS`."""


def write_index(
    out: Path,
    kind: stores.Kind,
    store: stores.Store,
    embedder: Embedder,
    data: EvalDataset,
    parts: Parts,
    metadata: dict[str, Any],
) -> None:
    """Write the files of an index from its complete parts.

    Args:
        metadata: description of the model and the data. Its `probe` has rows of the model's dimension.

    Raises:
        UserError: no image could be decoded, or the index needs more images.
        OSError: the files cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    total, dim = len(data), len(metadata["probe"][0])
    kept: list[int] = []
    ranges = np.stack([np.full(dim, np.inf, np.float32), np.full(dim, -np.inf, np.float32)])
    for images, rows in parts.blocks():
        kept += images.tolist()
        ranges[0] = np.minimum(ranges[0], rows.min(0, initial=np.inf))
        ranges[1] = np.maximum(ranges[1], rows.max(0, initial=-np.inf))
    skipped = sorted(set(range(total)) - set(kept))
    # Shards accept a damaged sample among the captions only after its image was refused.
    reasons = embedder.reasons(data, skipped)
    if not kept:
        raise UserError(f"none of {total} images can be decoded; the first one: {reasons.get(0, 'it can be now')}")
    sampled = spread(len(kept), stores.num_training_rows(kind, len(kept)))
    index = stores.new_index(kind, store, len(kept), rows_of(parts, sampled, dim), ranges)
    for _, rows in parts.blocks():
        stores.add(index, rows)
    subset = SubsetDataset(data, kept) if skipped else data
    captions = subset.captions()
    metadata = metadata | {"index": kind, "store": store, "num_images": total}
    if (kind, store) != ("faiss_flat", "fp32"):
        metadata["recall_at_10"] = _recall(index, embedder, parts, len(kept), captions, dim)
    if store == "int8":
        metadata["ranges"] = ranges.tolist()
    unknown: list[str | None] = [None] * len(kept)
    columns: dict[str, Any] = {
        "key": pa.array([subset.key(i) for i in range(len(kept))]),
        "row": pa.array(kept, pa.int64()),
        "caption": pa.array(captions or unknown, pa.string()),
    }
    for field in FIELDS:
        columns[field] = pa.array(subset.labels(field) if field in subset.label_kinds else unknown, pa.string())
    with replacing_files(out) as partial:
        with (partial / INDEX).open("wb") as file:
            stores.write(index, file)
        metadata["sha256"] = sha256_of_file(partial / INDEX)
        table = pa.table(columns)
        dtype = pa.from_numpy_dtype(stores.encode(ranges, store, ranges).dtype)
        width = dim // 8 if store == "ubinary" else dim
        schema = table.schema.append(pa.field("embedding", pa.list_(dtype, width)))
        schema = schema.with_metadata({METADATA: json.dumps(metadata)})
        with pq.ParquetWriter(partial / ROWS, schema) as writer:
            start = 0
            for _, rows in parts.blocks():
                codes = pa.array(stores.encode(rows, store, ranges).ravel())
                block = table.slice(start, len(rows))
                block = block.append_column(schema.field("embedding"), pa.FixedSizeListArray.from_arrays(codes, width))
                if len(rows):
                    writer.write_table(block.replace_schema_metadata(schema.metadata))
                start += len(rows)
    log_skipped({data.key(i): reason for i, reason in reasons.items()}, len(skipped), total)
    log.info("%d images in %s", len(kept), out)


def spread(num: int, count: int) -> np.ndarray:
    """Return `count` evenly spaced numbers below `num`, int64."""
    return np.arange(count, dtype=np.int64) * num // max(1, count)


def rows_of(parts: Parts, chosen: np.ndarray, dim: int) -> np.ndarray:
    """Return the embeddings with these ascending numbers in the index, float32 (n, D)."""
    picked, start = [np.empty((0, dim), np.float32)], 0
    for _, rows in parts.blocks():
        picked.append(rows[chosen[(chosen >= start) & (chosen < start + len(rows))] - start])
        start += len(rows)
    return np.concatenate(picked)


def _recall(
    index: Any, embedder: Embedder, parts: Parts, num: int, captions: list[str] | None, dim: int
) -> dict[str, float]:
    """Measure and log the recall at 10, with images and captions of the data as queries."""
    chosen = spread(num, min(num, NUM_QUERIES))
    recalls = {}
    if num > 1:
        rows = rows_of(parts, chosen, dim)
        recalls["images"] = recall_at_10(index, rows, (block for _, block in parts.blocks()), chosen)
    if texts := [captions[i] for i in chosen if captions[i].strip()] if captions else []:
        queries = embedder.texts(texts).cpu().numpy()
        recalls["captions"] = recall_at_10(index, queries, (block for _, block in parts.blocks()))
    shown = ", ".join(f"{recall:.3f} for {name}" for name, recall in recalls.items())
    log.info("recall@10 against exact search in fp32, with %d queries each: %s", len(chosen), shown)
    return recalls
