"""Datasets on disk: `ShardWriter` writes, `ShardDataset` reads at random, `verify` checks.

The layout of the folder is described in `shard_format`.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import tarfile
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

from bclip_fast.data.shard_format import (
    BLOCK,
    MEMBERS,
    Index,
    Sample,
    fingerprint_of,
    read_description,
    read_index,
)
from bclip_fast.data.shard_writer import ShardWriter
from bclip_fast.errors import UserError

__all__ = ["Sample", "ShardDataset", "ShardWriter", "verify"]

_MAX_OPEN_SHARDS = 128


class _Descriptor:
    """A file descriptor that lives as long as a reader holds it, whatever the cache forgets."""

    def __init__(self, path: Path) -> None:
        self.number = -1
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


class ShardDataset:
    """Random access to the samples of one split, in the order in which they were written.

    Reads are single `pread` calls at the index's offsets: safe from several threads, after fork,
    and after pickling. UserError: missing folder, split, shard or index; a shard of the wrong
    length; an index that disagrees with its shard.
    """

    def __init__(self, root: Path | str, split: str = "train") -> None:
        self.root = Path(root)
        self.split = split
        description = read_description(self.root)
        splits = description["splits"]
        if split not in splits:
            raise UserError(f"{self.root}: no split {split!r}; it has {', '.join(sorted(splits))}")
        self.fingerprint: str = splits[split]["fingerprint"]
        self._shards: list[dict[str, Any]] = splits[split]["files"]
        self.shard_sizes: list[int] = [shard["samples"] for shard in self._shards]
        for shard in self._shards:
            path = self._path(shard)
            if not path.is_file():
                raise UserError(f"{path}: missing; copy it again or build the dataset again")
            if path.stat().st_size != shard["num_bytes"]:
                raise UserError(
                    f"{path}: {path.stat().st_size} bytes, should be {shard['num_bytes']} "
                    "(truncated?); copy it again or build the dataset again"
                )
        self._make_caches()

    def _path(self, shard: dict[str, Any]) -> Path:
        return self.root / f"{shard['name']}.tar"

    def _make_caches(self) -> None:
        self._starts = [0, *accumulate(self.shard_sizes)]
        # lru_cache holds no lock that a fork could leave locked, and is safe between threads.
        self._file = functools.lru_cache(_MAX_OPEN_SHARDS)(lambda number: _Descriptor(self._path(self._shards[number])))
        self._index = functools.lru_cache(None)(lambda number: read_index(self.root, self._shards[number])[1])

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        for name in ("_file", "_index"):
            del state[name]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._make_caches()

    def __len__(self) -> int:
        return self._starts[-1]

    def _locate(self, i: int) -> tuple[int, int]:
        if not -len(self) <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        i %= len(self)
        number = bisect_right(self._starts, i) - 1
        return number, i - self._starts[number]

    def _read(self, number: int, start: int, end: int) -> bytes:
        path = self._path(self._shards[number])
        try:
            # Held while it is read: the cache may drop it, and with its last reference the descriptor closes.
            file = self._file(number)
            data = os.pread(file.number, end - start, start)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
        if len(data) != end - start:
            raise UserError(f"{path}: ends before byte {end} (truncated?); copy it again")
        return data

    def __getitem__(self, i: int) -> Sample:
        number, position = self._locate(i)
        index = self._index(number)
        offsets, sizes = index.offsets[position].tolist(), index.sizes[position].tolist()
        start = offsets[0] - BLOCK
        data = self._read(number, start, offsets[-1] + sizes[-1])
        names, contents = [], []
        for offset, size in zip(offsets, sizes, strict=True):
            offset -= start
            names.append(data[offset - BLOCK : offset - BLOCK + 100].rstrip(b"\0"))
            contents.append(data[offset : offset + size])
        key = names[0].removesuffix(b".jpg")
        if names != [key + b"." + member.encode() for member in MEMBERS]:
            path = self._path(self._shards[number])
            raise UserError(f"{path}: sample {position} is not where the index says; build again")
        try:
            caption, meta = contents[1].decode(), json.loads(contents[2])
            return Sample(key.decode("ascii"), contents[0], caption, meta)
        except ValueError as error:
            path = self._path(self._shards[number])
            raise UserError(f"{path}: sample {position} is corrupt: {error}") from None

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def caption_bytes(self, i: int) -> int:
        """The size of sample i's caption, from the index alone."""
        number, position = self._locate(i)
        return int(self._index(number).sizes[position, 1])

    def caption(self, i: int) -> str:
        """The caption of sample i, without reading its image."""
        number, position = self._locate(i)
        index = self._index(number)
        offset, size = int(index.offsets[position, 1]), int(index.sizes[position, 1])
        return self._read(number, offset, offset + size).decode()


def verify(root: Path | str) -> list[str]:
    """Re-read everything: hashes, every member of every tar, every image, index and manifest.

    Returns the problems found, one line each; empty when all is well. UserError when there is no
    dataset at all.
    """
    root = Path(root)
    description = read_description(root)
    problems: list[str] = []
    rows: list[tuple[str, str, str, int]] = []
    expected = {"dataset.json", "manifest.parquet"}
    everything = []
    for split, part in sorted(description["splits"].items()):
        everything += part["files"]
        if part["fingerprint"] != fingerprint_of(split, part["files"]):
            problems.append(f"dataset.json: the fingerprint of split {split} is wrong")
        if part["samples"] != sum(shard["samples"] for shard in part["files"]):
            problems.append(f"dataset.json: the number of samples of split {split} is wrong")
        for shard in part["files"]:
            expected |= {f"{shard['name']}.tar", f"{shard['name']}.index.json"}
            keys: list[str] = []
            try:
                keys, index = read_index(root, shard)
                problems += _verify_shard(root / f"{shard['name']}.tar", shard, keys, index)
            except UserError as error:
                problems.append(str(error))
            rows += [(key, split, shard["name"], place) for place, key in enumerate(keys)]
    if description["fingerprint"] != fingerprint_of("", everything):
        problems.append("dataset.json: the fingerprint is wrong")
    if len({row[0] for row in rows}) != len(rows):
        problems.append("keys are repeated")
    problems += _verify_manifest(root / "manifest.parquet", rows)
    strangers = {path.name for pattern in ("*.tar", "*.index.json") for path in root.glob(pattern)}
    problems += [f"{name}: not named in dataset.json" for name in sorted(strangers - expected)]
    return problems


def _verify_shard(path: Path, shard: dict[str, Any], keys: list[str], index: Index) -> list[str]:
    if not path.is_file():
        return [f"{path.name}: missing"]
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    problems = []
    if digest.hexdigest() != shard["sha256"]:
        problems.append(f"{path.name}: its SHA-256 is not that of dataset.json")
    wanted = [
        (f"{key}.{member}", int(offset), int(size))
        for key, offsets, sizes in zip(keys, index.offsets, index.sizes, strict=True)
        for member, offset, size in zip(MEMBERS, offsets, sizes, strict=True)
    ]
    found = 0
    try:
        with tarfile.open(path, "r:") as tar:
            for info, place in zip(tar, wanted, strict=False):
                if (info.name, info.offset_data, info.size) != place:
                    return [*problems, f"{path.name}: {info.name} is not where the index says"]
                content = tar.extractfile(info)
                if content is None:
                    return [*problems, f"{path.name}: {info.name} is not a file"]
                if reason := _content_problem(info.name, content.read()):
                    problems.append(f"{path.name}: {info.name}: {reason}")
                found += 1
            if found == len(wanted) and tar.next() is not None:
                problems.append(f"{path.name}: holds more than the index says")
    except (tarfile.TarError, OSError) as error:
        return [*problems, f"{path.name}: cannot be read: {error}"]
    if found != len(wanted):
        problems.append(f"{path.name}: {found} members, the index has {len(wanted)}")
    return problems


def _content_problem(name: str, data: bytes) -> str | None:
    from PIL import Image

    try:
        if name.endswith(".jpg"):
            with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
                image.load()
                return None if image.mode == "RGB" else f"mode {image.mode}, not RGB"
        if name.endswith(".txt"):
            return None if data.decode().strip() else "empty caption"
        return None if isinstance(json.loads(data), dict) else "not a JSON object"
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return f"cannot be decoded: {error}"


def _verify_manifest(path: Path, rows: list[tuple[str, str, str, int]]) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path, columns=["key", "split", "shard", "position"])
    except (OSError, pa.ArrowException) as error:
        return [f"{path.name}: cannot be read: {str(error).splitlines()[0]}"]
    found = sorted(zip(*(column.to_pylist() for column in table.columns), strict=True))
    return [] if found == sorted(rows) else [f"{path.name}: its rows are not those of the shards"]
