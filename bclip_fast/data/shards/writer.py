"""Write a dataset atomically: the same samples in the same order give the same bytes."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import tarfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from bclip_fast.errors import UserError
from bclip_fast.io.atomic import write_text

from .format import BLOCK, FORMAT_VERSION, Sample, fingerprint_of, to_json

_KEY = re.compile(r"[A-Za-z0-9_-]{1,90}")
_SPLIT = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
# Columns of every manifest; metadata of the same name stays in the `meta` column alone.
_MANIFEST_COLUMNS = ("key", "split", "shard", "position", "offset", "caption", "num_image_bytes", "meta")
# Rows hold captions, metadata and mentions: some 10 kB each while they are made.
_MANIFEST_ROW_GROUP = 4096


class ShardFile:
    """One tar being written. tarfile makes the headers, we place them: so offsets are known."""

    def __init__(self, folder: Path, split: str, number: int) -> None:
        self.name = f"{split}-{number:06d}"
        self.num_bytes = 0
        self._index_path = folder / f"{self.name}.index.json"
        self._file = (folder / f"{self.name}.tar").open("wb")
        self._hash = hashlib.sha256()
        self._samples: list[dict[str, Any]] = []

    def __len__(self) -> int:
        return len(self._samples)

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.num_bytes += len(data)

    def add(self, key: str, split: str, caption: str, image: bytes, meta: str) -> dict[str, Any]:
        """Append a sample; the row that the manifest has of it."""
        contents = {"jpg": image, "txt": caption.encode(), "json": meta.encode()}
        entry: dict[str, Any] = {"key": key}
        for extension, data in contents.items():
            info = tarfile.TarInfo(f"{key}.{extension}")
            info.size = len(data)
            self._write(info.tobuf(tarfile.USTAR_FORMAT))
            entry[extension] = [self.num_bytes, len(data)]
            self._write(data)
            self._write(bytes(-len(data) % BLOCK))
        self._samples.append(entry)
        row = {"key": key, "split": split, "shard": self.name, "position": len(self) - 1, "offset": entry["jpg"][0]}
        return {**row, "caption": caption, "num_image_bytes": len(image)}

    def finish(self) -> dict[str, Any]:
        # Two empty blocks end an archive, and its length is a multiple of the record size.
        self._write(bytes(2 * BLOCK))
        self._write(bytes(-self.num_bytes % tarfile.RECORDSIZE))
        _sync_and_close(self._file)
        description = {
            "name": self.name,
            "samples": len(self._samples),
            "num_bytes": self.num_bytes,
            "sha256": self._hash.hexdigest(),
        }
        head = to_json({"version": FORMAT_VERSION, **description, "samples": None})
        lines = ",\n".join(to_json(entry) for entry in self._samples)
        with self._index_path.open("w", encoding="utf-8") as file:
            file.write(head.replace('"samples":null', f'"samples":[\n{lines}\n]'))
            _sync(file)
        return description

    def close(self) -> None:
        self._file.close()


def _sync(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_and_close(file: IO[Any]) -> None:
    _sync(file)
    file.close()


class ManifestRows:
    """Rows of a manifest on their way to it, on disk; `close` answers with the types of the metadata's columns."""

    def __init__(self, path: Path) -> None:
        self._rows = path.open("w", encoding="utf-8")
        self._types: dict[str, set[str]] = {}

    def add(self, row: dict[str, Any], meta: dict[str, Any], extra: dict[str, Any]) -> None:
        """`extra`: metadata that the manifest has beside those of the shard."""
        for name, value in {**meta, **extra}.items():
            if name not in _MANIFEST_COLUMNS and value is not None:
                self._types.setdefault(name, set()).add(type(value).__name__)
        self._rows.write(to_json([row, meta, extra]) + "\n")

    def close(self) -> dict[str, list[str]]:
        self._rows.close()
        return {name: sorted(types) for name, types in self._types.items()}


def write_manifest(folder: Path, parts: list[tuple[Path, dict[str, list[str]]]]) -> None:
    """manifest.parquet of the rows and types of several ManifestRows, in row groups: memory does not grow with them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    types: dict[str, set[str]] = {}
    for _, found in parts:
        for name, names in found.items():
            types.setdefault(name, set()).update(names)
    columns = {name: _column(types[name]) for name in sorted(types)}
    kinds = {name: pa.string() for name in _MANIFEST_COLUMNS}
    kinds.update(position=pa.int64(), offset=pa.int64(), num_image_bytes=pa.int64())
    kinds.update({name: kind for name, (kind, _) in columns.items()})
    schema = pa.schema(list(kinds.items()))
    with pq.ParquetWriter(folder / "manifest.parquet", schema, compression="zstd") as writer:
        lines = (line for path, _ in parts for line in _lines(path))
        while chunk := list(islice(lines, _MANIFEST_ROW_GROUP)):
            rows = []
            for row, meta, extra in map(json.loads, chunk):
                everything = {**meta, **extra}
                flat = {
                    name: None if everything.get(name) is None else convert(everything[name])
                    for name, (_, convert) in columns.items()
                }
                rows.append({**row, "meta": to_json(meta), **flat})
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        yield from file


def _column(types: set[str]) -> tuple[Any, Callable[[Any], Any]]:
    """Arrow type of a metadata column, and the conversion: JSON for mixed and nested values."""
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


def write_description(folder: Path, splits: dict[str, list[dict[str, Any]]], info: dict[str, Any]) -> None:
    """dataset.json, whole or not at all: it says that everything else is there."""
    described = {
        split: {
            "samples": sum(shard["samples"] for shard in shards),
            "shards": len(shards),
            "fingerprint": fingerprint_of(split, shards),
            "files": shards,
        }
        for split, shards in sorted(splits.items())
    }
    everything = [shard for description in described.values() for shard in description["files"]]
    description = {
        **info,
        "format": "bclip_fast.shards",
        "version": FORMAT_VERSION,
        "fingerprint": fingerprint_of("", everything),
        "splits": described,
    }
    text = json.dumps(description, indent=1, sort_keys=True, allow_nan=False) + "\n"
    write_text(folder / "dataset.json", text, sync=True)


class Staging:
    """A dataset in the making: the folder `.{out.name}.partial` beside `out`, which `publish` renames to it.

    Entering locks it; what a killed run left in it stays, for whoever can use it. A finished dataset in `out` raises
    UserError unless `overwrite`; a folder that holds anything else is never replaced.
    """

    def __init__(self, out: Path | str, overwrite: bool) -> None:
        self.out = Path(os.path.abspath(out))
        self.path = self.out.with_name(f".{self.out.name}.partial")
        self._old = self.out.with_name(f".{self.out.name}.old")
        self._overwrite = overwrite
        self._check_out()

    def _check_out(self) -> None:
        if self.out.exists() and not self.out.is_dir():
            raise UserError(f"{self.out}: is a file; give a folder to write the dataset to")
        if not self.out.exists() or not any(self.out.iterdir()):
            return
        if not (self.out / "dataset.json").is_file():
            raise UserError(f"{self.out}: not empty and not a dataset; give another folder")
        if not self._overwrite:
            raise UserError(f"{self.out}: already holds a finished dataset; give another folder or overwrite")

    def __enter__(self) -> Staging:
        self.path.mkdir(parents=True, exist_ok=True)
        # The lock dies with its process: a running one is respected.
        self._lock = (self.path / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise UserError(f"{self.out}: another process is writing this dataset") from None
        if self._old.exists():  # killed between the two renames of an overwrite
            if self.out.exists():
                shutil.rmtree(self._old)
            else:
                self._old.rename(self.out)
                self._check_out()
        return self

    def clear(self) -> None:
        for path in self.path.iterdir():
            if path.name != "lock":
                _remove(path)

    def publish(self) -> None:
        (self.path / "lock").unlink()
        if self.out.exists() and any(self.out.iterdir()):
            self.out.rename(self._old)
        self.path.rename(self.out)
        if self._old.exists():
            shutil.rmtree(self._old)

    def discard(self) -> None:
        if self.path.exists():
            shutil.rmtree(self.path)

    def __exit__(self, *error: object) -> None:
        self._lock.close()


class ShardWriter:
    """Context manager that writes a dataset; `out` appears, whole, when the block ends well.

    Attributes: `staging`, the folder of its Staging, where a caller may add files of its own; `info`, merged into
    dataset.json.
    """

    def __init__(self, out: Path | str, *, max_shard_bytes: int = 256 << 20, overwrite: bool = False) -> None:
        if max_shard_bytes < 1:
            raise UserError(f"max_shard_bytes={max_shard_bytes}: must be positive")
        self._place = Staging(out, overwrite)
        self.out, self.staging = self._place.out, self._place.path
        self.info: dict[str, Any] = {}
        self._max_shard_bytes = max_shard_bytes
        self._keys: set[str] = set()
        self._open: dict[str, ShardFile] = {}
        self._finished: dict[str, list[dict[str, Any]]] = {}

    def __enter__(self) -> ShardWriter:
        self._place.__enter__()
        self._place.clear()
        self._rows = ManifestRows(self.staging / "manifest.rows")
        return self

    def write(self, sample: Sample, split: str) -> None:
        """Append a sample. UserError: bad or repeated key, empty caption, image that is no JPEG."""
        if not _KEY.fullmatch(sample.key):
            raise UserError(f"key {sample.key!r}: use 1 to 90 of A-Z a-z 0-9 _ -")
        if not _SPLIT.fullmatch(split):
            raise UserError(f"split {split!r}: use letters, digits and _, a letter first")
        if sample.key in self._keys:
            raise UserError(f"key {sample.key!r}: written twice; keys must be unique in a dataset")
        if not sample.caption.strip():
            raise UserError(f"sample {sample.key}: empty caption")
        if sample.image[:3] != b"\xff\xd8\xff":
            raise UserError(f"sample {sample.key}: the image is not a JPEG")
        try:
            meta = to_json(sample.meta)
            needed = sum(map(tar_bytes, (len(sample.image), len(sample.caption.encode()), len(meta.encode()))))
        except (TypeError, ValueError) as error:
            raise UserError(f"sample {sample.key}: cannot be stored as text: {error}") from None
        shard = self._open.get(split)
        if shard is not None and shard.num_bytes + needed > self._max_shard_bytes:
            self._finish_shard(split)
            shard = None
        if shard is None:
            number = len(self._finished.setdefault(split, []))
            shard = self._open[split] = ShardFile(self.staging, split, number)
        self._keys.add(sample.key)
        self._rows.add(shard.add(sample.key, split, sample.caption, sample.image, meta), sample.meta, {})

    def _finish_shard(self, split: str) -> None:
        self._finished[split].append(self._open.pop(split).finish())

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        published = False
        try:
            if kind is None:
                if not self._keys:
                    raise UserError(f"{self.out}: no samples to write")
                self._finish()
                published = True
        finally:
            for shard in self._open.values():
                shard.close()
            self._rows.close()
            if not published:
                self._place.discard()
            self._place.__exit__()

    def _finish(self) -> None:
        for split in sorted(self._open):
            self._finish_shard(split)
        rows = self.staging / "manifest.rows"
        write_manifest(self.staging, [(rows, self._rows.close())])
        rows.unlink()
        write_description(self.staging, self._finished, self.info)
        self._place.publish()


def tar_bytes(size: int) -> int:
    """What a member of this size takes in a tar."""
    return BLOCK + size + -size % BLOCK


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
