"""Write a dataset atomically. The same samples in the same order give the same bytes."""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from bclip_fast.errors import UserError
from bclip_fast.io.atomic import write_text

from .checksum import crc32c
from .format import (
    BLOCK,
    CAPTION,
    CHECKSUM,
    KINDS,
    TEXTS,
    Sample,
    description_text,
    fingerprint_of,
    index_text,
    to_json,
)
from .manifest import ManifestRows, write_manifest
from .staging import Staging

_KEY = re.compile(r"[A-Za-z0-9_-]{1,90}")
_SPLIT = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


class ShardFile:
    """Writes one tar and its index. tarfile makes the headers, and this class places them, so it knows all offsets.

    version: format version of the dataset. The samples of version 2 have texts.
    """

    def __init__(self, folder: Path, split: str, number: int, version: int = 1) -> None:
        self.name = f"{split}-{number:06d}"
        self._version = version
        self._num_samples_with: Counter[str] = Counter()
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

    def add(
        self, key: str, split: str, caption: str, image: bytes, meta: str, texts: dict[str, list[str]] | None = None
    ) -> dict[str, Any]:
        """Append a sample. Return its row for the manifest. texts: None in a dataset of version 1."""
        contents = {"jpg": image, "txt": caption.encode(), "json": meta.encode()}
        entry: dict[str, Any] = {"key": key}
        if texts is not None:
            contents[TEXTS] = to_json(texts).encode()
            entry["texts"] = {kind: [len(text.encode()) for text in each] for kind, each in texts.items()}
            self._num_samples_with.update(texts.keys())
        entry[CHECKSUM] = [crc32c(data) for data in contents.values()]
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
        if self._num_samples_with:
            description["texts"] = dict(self._num_samples_with)
        with self._index_path.open("w", encoding="utf-8") as file:
            file.write(index_text(description, self._samples, self._version))
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


def write_description(
    folder: Path, splits: dict[str, list[dict[str, Any]]], info: dict[str, Any], version: int = 1
) -> None:
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
        "version": version,
        "checksum": CHECKSUM,
        "fingerprint": fingerprint_of("", all_shards),
        "splits": split_descriptions,
    }
    write_text(folder / "dataset.json", description_text(description), sync=True)


class ShardWriter:
    """Context manager that writes a dataset. `out` appears when the block ends without an exception.

    Args:
        texts: keep texts in addition to the captions. The dataset then has format version 2, which earlier releases
            don't read.

    Attributes:
        staging: folder of the unfinished dataset. The caller may add files to it.
        info: values that dataset.json gets in addition to its own.
    """

    def __init__(
        self, out: Path | str, *, max_shard_bytes: int = 256 << 20, overwrite: bool = False, texts: bool = False
    ) -> None:
        if max_shard_bytes < 1:
            raise UserError(f"max_shard_bytes={max_shard_bytes} must be positive")
        self._staging = Staging(out, overwrite)
        self.out, self.staging = self._staging.out, self._staging.path
        self.info: dict[str, Any] = {}
        self._max_shard_bytes = max_shard_bytes
        self._version = 2 if texts else 1
        self._keys: set[str] = set()
        self._open: dict[str, ShardFile] = {}
        self._finished: dict[str, list[dict[str, Any]]] = {}

    def __enter__(self) -> ShardWriter:
        self._staging.__enter__()
        self._staging.clear()
        self._rows = ManifestRows(self.staging / "manifest.rows")
        return self

    def write(self, sample: Sample, split: str) -> None:
        """Append a sample. Raises UserError if its key is invalid or repeated, or a text or the image is unusable."""
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
        self._check_texts(sample)
        try:
            meta = to_json(sample.meta)
            contents = [sample.image, sample.caption.encode(), meta.encode()]
            if self._version > 1:
                contents.append(to_json(sample.texts).encode())
            num_bytes = sum(map(tar_bytes, map(len, contents)))
        except (TypeError, ValueError) as error:
            raise UserError(f"sample {sample.key}: cannot be stored as text: {error}") from None
        shard = self._open.get(split)
        if shard is not None and shard.num_bytes + num_bytes > self._max_shard_bytes:
            self._finish_shard(split)
            shard = None
        if shard is None:
            number = len(self._finished.setdefault(split, []))
            shard = self._open[split] = ShardFile(self.staging, split, number, self._version)
        self._keys.add(sample.key)
        texts = None if self._version == 1 else sample.texts
        row = shard.add(sample.key, split, sample.caption, sample.image, meta, texts)
        self._rows.add(row, sample.meta, {"texts": texts} if texts else {})

    def _check_texts(self, sample: Sample) -> None:
        if sample.texts and self._version == 1:
            raise UserError(f"sample {sample.key} has texts besides its caption; pass texts=True to ShardWriter")
        for kind, texts in sample.texts.items():
            if kind not in KINDS or kind == CAPTION:
                raise UserError(f"sample {sample.key} has texts of kind {kind!r}; use {', '.join(KINDS[1:])}")
            if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
                raise UserError(f"sample {sample.key} has an empty {kind}; leave it out")

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
        write_description(self.staging, self._finished, self.info, self._version)
        self._staging.publish()


def tar_bytes(size: int) -> int:
    """Return the number of bytes that a member of this size takes in a tar."""
    return BLOCK + size + -size % BLOCK
