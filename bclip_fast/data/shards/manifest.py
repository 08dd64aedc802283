"""Write a dataset's manifest.parquet: a row for each sample."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from .format import to_json

MANIFEST = "manifest.parquet"

# Columns of every manifest. Metadata with one of these names only appears in the `meta` column.
_MANIFEST_COLUMNS = ("key", "split", "shard", "position", "offset", "caption", "num_image_bytes", "meta")
# A row with its caption, metadata and mentions takes about 10 kB while it is being written.
_MANIFEST_ROW_GROUP = 4096


class ManifestRows:
    """A file with rows for the manifest. `close` returns the types of the metadata's columns."""

    def __init__(self, path: Path) -> None:
        self._rows = path.open("w", encoding="utf-8")
        self._types: dict[str, set[str]] = {}

    def add(self, row: dict[str, Any], meta: dict[str, Any], extra: dict[str, Any]) -> None:
        """Append a row. `extra`: metadata that only the manifest has."""
        for name, value in {**meta, **extra}.items():
            if name not in _MANIFEST_COLUMNS and value is not None:
                self._types.setdefault(name, set()).add(type(value).__name__)
        self._rows.write(to_json([row, meta, extra]) + "\n")

    def close(self) -> dict[str, list[str]]:
        """Close the file. Return the names of the types of each metadata column."""
        self._rows.close()
        return {name: sorted(types) for name, types in self._types.items()}


def write_manifest(folder: Path, parts: list[tuple[Path, dict[str, list[str]]]]) -> None:
    """Write manifest.parquet from the rows and types of several ManifestRows, in bounded memory."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    types: dict[str, set[str]] = {}
    for _, part_types in parts:
        for name, names in part_types.items():
            types.setdefault(name, set()).update(names)
    columns = {name: _column(types[name]) for name in sorted(types)}
    kinds = {name: pa.string() for name in _MANIFEST_COLUMNS}
    kinds.update(position=pa.int64(), offset=pa.int64(), num_image_bytes=pa.int64())
    kinds.update({name: kind for name, (kind, _) in columns.items()})
    schema = pa.schema(list(kinds.items()))
    with pq.ParquetWriter(folder / MANIFEST, schema, compression="zstd") as writer:
        lines = (line for path, _ in parts for line in _lines(path))
        while chunk := list(islice(lines, _MANIFEST_ROW_GROUP)):
            rows = []
            for row, meta, extra in map(json.loads, chunk):
                values = {**meta, **extra}
                flat = {
                    name: None if values.get(name) is None else convert(values[name])
                    for name, (_, convert) in columns.items()
                }
                rows.append({**row, "meta": to_json(meta), **flat})
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        yield from file


def _column(types: set[str]) -> tuple[Any, Callable[[Any], Any]]:
    """Return the Arrow type of a metadata column and the conversion to it. Mixed and nested values become JSON."""
    import pyarrow as pa

    if types == {"bool"}:
        return pa.bool_(), bool
    if types == {"int"}:
        return pa.int64(), int
    if types <= {"int", "float"}:
        return pa.float64(), float
    if types == {"str"}:
        return pa.string(), str
    return pa.string(), to_json
