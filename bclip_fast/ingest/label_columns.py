"""The columns of a dataset's manifest that `bclip ingest label` writes."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bclip_fast.errors import UserError, first_line
from bclip_fast.io.atomic import replacing

COLUMNS = ("kind", "kind_p", "kind_by")
# Rows of the manifest in memory at a time, and shards whose results are in memory at a time.
_ROWS, _SHARDS = 4096, 4


def is_labelled(path: Path, name: str, description: dict[str, Any]) -> bool:
    """Return whether a manifest has the kinds of all pairs by the labeller `name`. Raises UserError for lost rows."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    num_pairs = sum(split["samples"] for split in description["splits"].values())
    try:
        with pq.ParquetFile(path) as file:
            if file.metadata.num_rows != num_pairs:
                raise UserError(
                    f"{path} has {file.metadata.num_rows} rows, but the dataset has {num_pairs} pairs; copy it again, "
                    "or build the dataset again"
                )
            if not set(COLUMNS) <= set(file.schema_arrow.names):
                return False
            batches = file.iter_batches(_ROWS, columns=["kind_by"])
            return all(pc.all(pc.fill_null(pc.equal(batch["kind_by"], name), False)).as_py() for batch in batches)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}; copy it again, or build again") from None


def columns_of(path: Path) -> list[str]:
    """Return the names of a manifest's columns."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        names: list[str] = pq.read_schema(path).names
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}; copy it again, or build again") from None
    return names


def write_kinds(path: Path, results: Callable[[str], list[Any]], name: str) -> tuple[Counter[str], int]:
    """Replace a manifest by one with the columns of the results. Return the counts of kinds and of damaged images.

    Args:
        results: function from the name of a shard to the (kind, probability) of each sample, None for damaged ones.
        name: value of the column kind_by.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    read = functools.lru_cache(_SHARDS)(results)
    counts: Counter[str] = Counter()
    num_damaged = 0
    added = [pa.field("kind", pa.string()), pa.field("kind_p", pa.float64()), pa.field("kind_by", pa.string())]
    try:
        with replacing(path, sync=True) as partial, contextlib.ExitStack() as stack:
            source = stack.enter_context(pq.ParquetFile(path))
            kept = [field for field in source.schema_arrow if field.name not in COLUMNS]
            schema = pa.schema([*kept, *added])
            writer = stack.enter_context(pq.ParquetWriter(partial, schema, compression="zstd"))
            for batch in source.iter_batches(_ROWS):
                places = zip(batch["shard"].to_pylist(), batch["position"].to_pylist(), strict=True)
                kinds = [read(shard)[position] or [None, None] for shard, position in places]
                counts.update(kind for kind, _ in kinds if kind is not None)
                num_damaged += sum(kind is None for kind, _ in kinds)
                values = [batch[field.name] for field in kept]
                values += [pa.array([kind for kind, _ in kinds], pa.string())]
                values += [pa.array([p for _, p in kinds], pa.float64()), pa.array([name] * len(kinds), pa.string())]
                writer.write_batch(pa.RecordBatch.from_arrays(values, schema=schema))
    except (pa.ArrowException, KeyError, IndexError, FileNotFoundError) as error:
        raise UserError(f"{path} doesn't fit the shards: {first_line(error)}; build the dataset again") from error
    return counts, num_damaged
