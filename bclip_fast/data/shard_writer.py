"""Write a dataset atomically: the same samples in the same order give the same bytes."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import tarfile
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from bclip_fast.data.shard_format import BLOCK, FORMAT_VERSION, Sample, fingerprint_of, to_json
from bclip_fast.errors import UserError

_KEY = re.compile(r"[A-Za-z0-9_-]{1,90}")
_SPLIT = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
# Columns of every manifest; metadata of the same name stays in the `meta` column alone.
_MANIFEST_COLUMNS = ("key", "split", "shard", "position", "caption", "num_image_bytes", "meta")
_MANIFEST_ROW_GROUP = 8192


class _ShardFile:
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

    def add(self, key: str, contents: dict[str, bytes]) -> None:
        entry: dict[str, Any] = {"key": key}
        for extension, data in contents.items():
            info = tarfile.TarInfo(f"{key}.{extension}")
            info.size = len(data)
            self._write(info.tobuf(tarfile.USTAR_FORMAT))
            entry[extension] = [self.num_bytes, len(data)]
            self._write(data)
            self._write(bytes(-len(data) % BLOCK))
        self._samples.append(entry)

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


class _Manifest:
    """Collects rows on disk, then writes them in row groups: memory does not grow with them."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "manifest.parquet"
        self._rows_path = folder / "manifest.rows"
        self._rows = self._rows_path.open("w", encoding="utf-8")
        self._types: dict[str, set[type]] = {}

    def add(self, row: dict[str, Any], meta: dict[str, Any]) -> None:
        for name, value in meta.items():
            if name not in _MANIFEST_COLUMNS and value is not None:
                self._types.setdefault(name, set()).add(type(value))
        self._rows.write(to_json([row, meta]) + "\n")

    def _column(self, name: str) -> tuple[Any, Any]:
        """Arrow type of a metadata column, and the conversion: JSON for mixed and nested values."""
        import pyarrow as pa

        types = self._types[name]
        if types == {bool}:
            return pa.bool_(), bool
        if types == {int}:
            return pa.int64(), int
        if types <= {int, float}:
            return pa.float64(), float
        if types == {str}:
            return pa.string(), str
        return pa.string(), to_json

    def finish(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._rows.close()
        columns = {name: self._column(name) for name in sorted(self._types)}
        kinds = {name: pa.string() for name in _MANIFEST_COLUMNS}
        kinds.update(position=pa.int64(), num_image_bytes=pa.int64())
        kinds.update({name: kind for name, (kind, _) in columns.items()})
        schema = pa.schema(list(kinds.items()))
        with (
            self._rows_path.open(encoding="utf-8") as lines,
            pq.ParquetWriter(self._path, schema, compression="zstd") as writer,
        ):
            while chunk := list(islice(lines, _MANIFEST_ROW_GROUP)):
                rows = []
                for row, meta in map(json.loads, chunk):
                    flat = {
                        name: None if meta.get(name) is None else convert(meta[name])
                        for name, (_, convert) in columns.items()
                    }
                    rows.append({**row, "meta": to_json(meta), **flat})
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
        self._rows_path.unlink()

    def close(self) -> None:
        self._rows.close()


class ShardWriter:
    """Context manager that writes a dataset; `out` appears, whole, when the block ends well.

    Everything is written to the sibling folder `.{out.name}.partial` and renamed at the end.
    Attributes: `staging`, that folder, where a caller may add files of its own; `info`, merged into
    dataset.json. A finished dataset in `out` raises UserError unless `overwrite`; a folder that
    holds anything else is never replaced.
    """

    def __init__(self, out: Path | str, *, max_shard_bytes: int = 256 << 20, overwrite: bool = False) -> None:
        if max_shard_bytes < 1:
            raise UserError(f"max_shard_bytes={max_shard_bytes}: must be positive")
        self.out = Path(os.path.abspath(out))
        self.staging = self.out.with_name(f".{self.out.name}.partial")
        self.info: dict[str, Any] = {}
        self._old = self.out.with_name(f".{self.out.name}.old")
        self._max_shard_bytes = max_shard_bytes
        self._overwrite = overwrite
        self._renamed = False
        self._keys: set[str] = set()
        self._open: dict[str, _ShardFile] = {}
        self._finished: dict[str, list[dict[str, Any]]] = {}
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

    def __enter__(self) -> ShardWriter:
        self.staging.mkdir(parents=True, exist_ok=True)
        # The lock dies with its process: a killed run's rest is cleared, a running one respected.
        self._lock = (self.staging / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise UserError(f"{self.out}: another process is writing this dataset") from None
        for path in self.staging.iterdir():
            if path.name != "lock":
                _remove(path)
        if self._old.exists():  # killed between the two renames of an overwrite
            if self.out.exists():
                shutil.rmtree(self._old)
            else:
                self._old.rename(self.out)
                self._check_out()
        self._manifest = _Manifest(self.staging)
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
            contents = {
                "jpg": sample.image,
                "txt": sample.caption.encode(),
                "json": to_json(sample.meta).encode(),
            }
        except (TypeError, ValueError) as error:
            raise UserError(f"sample {sample.key}: cannot be stored as text: {error}") from None
        needed = sum(BLOCK + len(data) + -len(data) % BLOCK for data in contents.values())
        shard = self._open.get(split)
        if shard is not None and shard.num_bytes + needed > self._max_shard_bytes:
            self._finish_shard(split)
            shard = None
        if shard is None:
            number = len(self._finished.setdefault(split, []))
            shard = self._open[split] = _ShardFile(self.staging, split, number)
        self._keys.add(sample.key)
        row = {
            "key": sample.key,
            "split": split,
            "shard": shard.name,
            "position": len(shard),
            "caption": sample.caption,
            "num_image_bytes": len(sample.image),
        }
        shard.add(sample.key, contents)
        self._manifest.add(row, sample.meta)

    def _finish_shard(self, split: str) -> None:
        self._finished[split].append(self._open.pop(split).finish())

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                if not self._keys:
                    raise UserError(f"{self.out}: no samples to write")
                self._finish()
        finally:
            for shard in self._open.values():
                shard.close()
            self._manifest.close()
            if not self._renamed:
                shutil.rmtree(self.staging)
            self._lock.close()

    def _finish(self) -> None:
        for split in sorted(self._open):
            self._finish_shard(split)
        self._manifest.finish()
        splits = {
            split: {
                "samples": sum(shard["samples"] for shard in shards),
                "shards": len(shards),
                "fingerprint": fingerprint_of(split, shards),
                "files": shards,
            }
            for split, shards in sorted(self._finished.items())
        }
        everything = [shard for description in splits.values() for shard in description["files"]]
        description = {
            **self.info,
            "format": "bclip_fast.shards",
            "version": FORMAT_VERSION,
            "fingerprint": fingerprint_of("", everything),
            "splits": splits,
        }
        with (self.staging / "dataset.json").open("w", encoding="utf-8") as file:
            json.dump(description, file, indent=1, sort_keys=True, allow_nan=False)
            file.write("\n")
            _sync(file)
        (self.staging / "lock").unlink()
        if self.out.exists() and any(self.out.iterdir()):
            self.out.rename(self._old)
        self.staging.rename(self.out)
        self._renamed = True
        if self._old.exists():
            shutil.rmtree(self._old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
