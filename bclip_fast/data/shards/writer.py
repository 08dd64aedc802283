"""Write a dataset atomically. The same samples in the same order give the same bytes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tarfile
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from bclip_fast.errors import UserError
from bclip_fast.io import system
from bclip_fast.io.atomic import put_in_place, write_text

from .checksum import crc32c
from .format import BLOCK, CHECKSUM, FORMAT_VERSION, Sample, description_text, fingerprint_of, index_text, to_json
from .manifest import ManifestRows, write_manifest

_KEY = re.compile(r"[A-Za-z0-9_-]{1,90}")
_SPLIT = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


class ShardFile:
    """Writes one tar and its index. tarfile makes the headers, and this class places them, so it knows all offsets."""

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
        """Append a sample. Return its row for the manifest."""
        contents = {"jpg": image, "txt": caption.encode(), "json": meta.encode()}
        entry: dict[str, Any] = {"key": key, CHECKSUM: [crc32c(data) for data in contents.values()]}
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
        """Complete the tar and write its index. Return the shard's description for dataset.json."""
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
        with self._index_path.open("w", encoding="utf-8") as file:
            file.write(index_text(description, self._samples))
            _sync(file)
        return description

    def close(self) -> None:
        """Close the file without completing it."""
        self._file.close()


def _sync(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_and_close(file: IO[Any]) -> None:
    _sync(file)
    file.close()


def write_description(folder: Path, splits: dict[str, list[dict[str, Any]]], info: dict[str, Any]) -> None:
    """Write dataset.json atomically, as the last file: it marks the dataset as complete."""
    split_descriptions = {
        split: {
            "samples": sum(shard["samples"] for shard in shards),
            "shards": len(shards),
            "fingerprint": fingerprint_of(split, shards),
            "files": shards,
        }
        for split, shards in sorted(splits.items())
    }
    all_shards = [shard for description in split_descriptions.values() for shard in description["files"]]
    description = {
        **info,
        "format": "bclip_fast.shards",
        "version": FORMAT_VERSION,
        "checksum": CHECKSUM,
        "fingerprint": fingerprint_of("", all_shards),
        "splits": split_descriptions,
    }
    write_text(folder / "dataset.json", description_text(description), sync=True)


class Staging:
    """The folder of an unfinished dataset: `.{out.name}.partial`, next to `out`. `publish` renames it to `out`.

    Entering the context locks the folder, and keeps the files of a killed run for a resume.

    Args:
        overwrite: replace a finished dataset in `out`. Any other files in `out` are never replaced.

    Raises:
        UserError: `out` is occupied, or another process writes to it.
    """

    def __init__(self, out: Path | str, overwrite: bool) -> None:
        self.out = Path(os.path.abspath(out))
        self.path = self.out.with_name(f".{self.out.name}.partial")
        self._old = self.out.with_name(f".{self.out.name}.old")
        self._overwrite = overwrite
        self._finish_publishing()  # a process was killed before it did
        self._check_out()

    def _check_out(self) -> None:
        if self.out.exists() and not self.out.is_dir():
            raise UserError(f"{self.out} is a file; give a folder for the dataset")
        if not self.out.exists() or not any(self.out.iterdir()):
            return
        if not (self.out / "dataset.json").is_file():
            raise UserError(f"{self.out} is not empty and not a dataset; give another folder")
        if not self._overwrite:
            raise UserError(f"{self.out} already holds a finished dataset; give another folder or overwrite it")

    def __enter__(self) -> Staging:
        self.path.mkdir(parents=True, exist_ok=True)
        is_unfinished = (self.path / "lock").exists()
        # The lock ends with its process, so a killed run doesn't block the next one.
        self._lock = (self.path / "lock").open("w")
        try:
            system.lock(self._lock, wait=False)
        except OSError:
            self._lock.close()
            raise UserError(f"{self.out}: another process is writing this dataset; wait for it or end it") from None
        if not is_unfinished:  # a replaced dataset, which a killed process left
            self.clear()
        if self._old.exists():  # a process was killed between the two renames of an overwrite
            if self.out.exists():
                shutil.rmtree(self._old)
            else:
                self._old.rename(self.out)
                self._check_out()
        return self

    def clear(self) -> None:
        """Delete all files in the folder except the lock."""
        for path in self.path.iterdir():
            if path.name != "lock":
                _remove(path)

    def publish(self) -> None:
        """Rename the folder to `out`, in place of an older dataset."""
        put_in_place(self.path, self.out)
        self._finish_publishing()

    def _finish_publishing(self) -> None:
        """Delete the replaced dataset, which has no lock, and then the lock of the new one."""
        if (self.out / "lock").exists() and (self.out / "dataset.json").exists():
            if not (self.path / "lock").exists():
                self._keep_other_files()
                shutil.rmtree(self.path, ignore_errors=True)
            (self.out / "lock").unlink(missing_ok=True)

    def _keep_other_files(self) -> None:
        """Move the files that are no part of the replaced dataset to the new one."""
        try:
            splits = json.loads((self.path / "dataset.json").read_bytes())["splits"].values()
            names = {shard["name"] for split in splits for shard in split["files"]}
        except (OSError, ValueError, KeyError, TypeError):
            return
        names = {f"{name}{suffix}" for name in names for suffix in (".tar", ".index.json")}
        names |= {"manifest.parquet", "rejects.parquet", "dataset.json"}
        for path in self.path.iterdir():
            if path.name not in names and not (self.out / path.name).exists():
                path.rename(self.out / path.name)

    def discard(self) -> None:
        """Delete the folder."""
        if self.path.exists():
            shutil.rmtree(self.path)

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(OSError):
            self._finish_publishing()  # a signal came while it did
        self._lock.close()


class ShardWriter:
    """Context manager that writes a dataset. `out` appears when the block ends without an exception.

    Attributes:
        staging: folder of the unfinished dataset. The caller may add files to it.
        info: values that dataset.json gets in addition to its own.
    """

    def __init__(self, out: Path | str, *, max_shard_bytes: int = 256 << 20, overwrite: bool = False) -> None:
        if max_shard_bytes < 1:
            raise UserError(f"max_shard_bytes={max_shard_bytes} must be positive")
        self._staging = Staging(out, overwrite)
        self.out, self.staging = self._staging.out, self._staging.path
        self.info: dict[str, Any] = {}
        self._max_shard_bytes = max_shard_bytes
        self._keys: set[str] = set()
        self._open: dict[str, ShardFile] = {}
        self._finished: dict[str, list[dict[str, Any]]] = {}

    def __enter__(self) -> ShardWriter:
        self._staging.__enter__()
        self._staging.clear()
        self._rows = ManifestRows(self.staging / "manifest.rows")
        return self

    def write(self, sample: Sample, split: str) -> None:
        """Append a sample. Raises UserError if its key is invalid or repeated, or its caption or image is unusable."""
        if not _KEY.fullmatch(sample.key):
            raise UserError(f"key {sample.key!r} is invalid; use 1 to 90 characters of A-Z a-z 0-9 _ -")
        if not _SPLIT.fullmatch(split):
            raise UserError(f"split {split!r} is invalid; use a letter, then letters, digits and _")
        if sample.key in self._keys:
            raise UserError(f"key {sample.key!r} was written before; keys must be unique in a dataset")
        if not sample.caption.strip():
            raise UserError(f"sample {sample.key} has an empty caption; leave it out")
        if sample.image[:3] != b"\xff\xd8\xff":
            raise UserError(f"sample {sample.key}: the image is not a JPEG; convert it")
        try:
            meta = to_json(sample.meta)
            num_bytes = sum(map(tar_bytes, (len(sample.image), len(sample.caption.encode()), len(meta.encode()))))
        except (TypeError, ValueError) as error:
            raise UserError(f"sample {sample.key}: cannot be stored as text: {error}") from None
        shard = self._open.get(split)
        if shard is not None and shard.num_bytes + num_bytes > self._max_shard_bytes:
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
                    raise UserError(f"{self.out}: the dataset has no samples; write at least one")
                self._finish()
                published = True
        finally:
            for shard in self._open.values():
                shard.close()
            self._rows.close()
            if not published:
                self._staging.discard()
            self._staging.__exit__()

    def _finish(self) -> None:
        for split in sorted(self._open):
            self._finish_shard(split)
        rows = self.staging / "manifest.rows"
        write_manifest(self.staging, [(rows, self._rows.close())])
        rows.unlink()
        write_description(self.staging, self._finished, self.info)
        self._staging.publish()


def tar_bytes(size: int) -> int:
    """Return the number of bytes that a member of this size takes in a tar."""
    return BLOCK + size + -size % BLOCK


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
