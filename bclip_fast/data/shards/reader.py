"""Datasets on disk: `ShardWriter` writes, `ShardDataset` reads at random, `verify` checks.

The layout of the folder is described in `shard_format`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from bclip_fast.data.daemon_pool import Workers
from bclip_fast.data.storage import Files, LocalFiles, ReadConfig, RemoteFiles, open_files
from bclip_fast.data.storage_cache import CachedFiles
from bclip_fast.errors import UserError

from .format import BLOCK, MEMBERS, Sample, read_description, read_index

# Merged ranges are read in pieces of this size, so that several connections share one.
_MAX_SPAN = 8 << 20
# Samples of a URL that are held at a time where all are read through.
_CHUNK = 256


class BadSample(UserError):
    """A sample whose bytes are damaged: a property of the dataset, unlike a ReadError, which is one of its storage."""


class ShardDataset:
    """Random access to the samples of one split, in the order in which they were written.

    Args:
        root: a folder, or a URL that fsspec can read.
        read: how a file is tried to be read.

    Safe from several threads, after fork, and after pickling. UserError: missing folder, split, shard or index; a shard
    of the wrong length (of a URL's shards this shows where they are read); an index that disagrees with its shard.
    """

    def __init__(self, root: Path | str, split: str = "train", read: ReadConfig | None = None) -> None:
        self.files: Files = open_files(root, read)
        self.root = str(root)
        self.split = split
        description = read_description(self.files)
        splits = description["splits"]
        if split not in splits:
            raise UserError(f"{self.root}: no split {split!r}; it has {', '.join(sorted(splits))}")
        self.fingerprint: str = splits[split]["fingerprint"]
        self._shards: list[dict[str, Any]] = splits[split]["files"]
        self.shard_sizes: list[int] = [shard["samples"] for shard in self._shards]
        self.num_bytes = sum(shard["num_bytes"] for shard in self._shards)
        if isinstance(self.files, RemoteFiles) and self.files.config.cache_dir:
            sizes = {f"{shard['name']}.tar": (shard["num_bytes"], shard["sha256"]) for shard in self._shards}
            self.files = CachedFiles(self.files, sizes, self.files.config)
        elif isinstance(self.files, LocalFiles):
            for number, shard in enumerate(self._shards):
                path = self.files.root / self._name(number)
                if not path.is_file():
                    raise UserError(f"{path}: missing; copy it again or build the dataset again")
                if path.stat().st_size != shard["num_bytes"]:
                    raise UserError(
                        f"{path}: {path.stat().st_size} bytes, should be {shard['num_bytes']} "
                        "(truncated?); copy it again or build the dataset again"
                    )
        self._make_caches()

    def _name(self, number: int) -> str:
        return f"{self._shards[number]['name']}.tar"

    def _make_caches(self) -> None:
        self._starts = [0, *accumulate(self.shard_sizes)]
        self._index = functools.lru_cache(None)(lambda number: read_index(self.files, self._shards[number])[1])
        self._connections: tuple[int, Workers] | None = None

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        for name in ("_index", "_connections"):
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

    def _span(self, i: int) -> tuple[int, int, int]:
        """(shard, first byte, last byte + 1) of a sample with the header of its first member."""
        number, position = self._locate(i)
        index = self._index(number)
        return (
            number,
            int(index.offsets[position, 0]) - BLOCK,
            int(index.offsets[position, -1] + index.sizes[position, -1]),
        )

    def __getitem__(self, i: int) -> Sample:
        number, start, end = self._span(i)
        return self._parse(i, self.files.read(self._name(number), start, end))

    def _parse(self, i: int, data: bytes) -> Sample:
        number, position = self._locate(i)
        index = self._index(number)
        offsets, sizes = index.offsets[position].tolist(), index.sizes[position].tolist()
        start = offsets[0] - BLOCK
        names, contents = [], []
        for offset, size in zip(offsets, sizes, strict=True):
            offset -= start
            names.append(data[offset - BLOCK : offset - BLOCK + 100].rstrip(b"\0"))
            contents.append(data[offset : offset + size])
        key = names[0].removesuffix(b".jpg")
        path = self.files.path(self._name(number))
        if names != [key + b"." + member.encode() for member in MEMBERS]:
            raise BadSample(f"{path}: sample {position} is not where the index says; build again")
        try:
            caption, meta = contents[1].decode(), json.loads(contents[2])
            return Sample(key.decode("ascii"), contents[0], caption, meta)
        except ValueError as error:
            raise BadSample(f"{path}: sample {position} is corrupt: {error}") from None

    def fetch(self, indices: Sequence[int]) -> Callable[[], list[Sample | BadSample]]:
        """Reads many samples; the damaged ones come back as BadSample. Call the result for them.

        Those of a folder are read in that call. Reads from a URL begin at once, in threads of their own, near ranges
        of a shard merged, so what is fetched before it is needed is read ahead. Raises ReadError.
        """
        if not self.files.remote:
            return lambda: [
                self._parsed(i, self.files.read(self._name(n), a, b))
                for i, (n, a, b) in zip(indices, map(self._span, indices), strict=True)
            ]
        spans = [self._span(i) for i in indices]
        merged = merge_ranges(spans, self.files.config.max_gap_kib << 10, _MAX_SPAN)
        pool = self._pool()
        reads = [pool.submit(self.files.read, self._name(number), start, end) for number, start, end in merged]

        def finish() -> list[Sample | BadSample]:
            found: dict[tuple[int, int, int], bytes] = {}
            ordered = sorted(set(spans))
            place = 0
            for (number, first, last), read in zip(merged, reads, strict=True):
                data = read.result()
                while place < len(ordered) and ordered[place][0] == number and ordered[place][2] <= last:
                    found[ordered[place]] = data[ordered[place][1] - first : ordered[place][2] - first]
                    place += 1
            return [self._parsed(i, found[span]) for i, span in zip(indices, spans, strict=True)]

        return finish

    def _parsed(self, i: int, data: bytes) -> Sample | BadSample:
        try:
            return self._parse(i, data)
        except BadSample as bad:
            return bad

    def _pool(self) -> Workers:
        if self._connections is None or self._connections[0] != os.getpid():
            pool = Workers(self.files.config.connections, "bclip-connection")
            weakref.finalize(self, pool.close, 0.0)
            self._connections = os.getpid(), pool
        return self._connections[1]

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def name_of(self, i: int) -> tuple[str, str]:
        """(key, file name of the shard) of sample i by the index alone."""
        number, position = self._locate(i)
        return read_index(self.files, self._shards[number])[0][position], self._name(number)

    def caption_bytes(self, i: int) -> int:
        """The size of sample i's caption, from the index alone."""
        number, position = self._locate(i)
        return int(self._index(number).sizes[position, 1])

    def caption(self, i: int) -> str:
        """The caption of sample i, without reading its image."""
        number, position = self._locate(i)
        index = self._index(number)
        offset, size = int(index.offsets[position, 1]), int(index.sizes[position, 1])
        try:
            return self.files.read(self._name(number), offset, offset + size).decode()
        except UnicodeDecodeError as error:
            path = self.files.path(self._name(number))
            raise BadSample(f"{path}: sample {position} is corrupt: {error}") from None

    def captions(self) -> Iterator[str]:
        """All captions but the damaged ones, in order; a URL's shards are read through for them."""
        if not self.files.remote:
            for i in range(len(self)):
                with contextlib.suppress(BadSample):
                    yield self.caption(i)
            return
        ahead = self.fetch(range(min(_CHUNK, len(self))))
        for start in range(0, len(self), _CHUNK):
            chunk = ahead()
            ahead = self.fetch(range(start + _CHUNK, min(start + 2 * _CHUNK, len(self))))
            yield from (sample.caption for sample in chunk if isinstance(sample, Sample))


def merge_ranges(spans: Sequence[tuple[int, int, int]], max_gap: int, max_span: int) -> list[tuple[int, int, int]]:
    """(file, start, end) ranges in rising order, those with at most `max_gap` bytes between them as one of at most
    `max_span`, so that each span lies whole in one. Spans of a file don't overlap unless they are equal."""
    merged: list[tuple[int, int, int]] = []
    for file, start, end in sorted(spans):
        if merged and merged[-1][0] == file and start - merged[-1][2] <= max_gap and end - merged[-1][1] <= max_span:
            merged[-1] = file, merged[-1][1], max(end, merged[-1][2])
        else:
            merged.append((file, start, end))
    return merged
