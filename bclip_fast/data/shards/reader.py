"""Random access to the samples of a dataset. `format` describes the folder."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import weakref
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from bclip_fast.data.daemon_pool import DaemonPool
from bclip_fast.data.storage import LocalStorage, ReadConfig, RemoteStorage, Storage, open_storage
from bclip_fast.data.storage_cache import CachedStorage
from bclip_fast.errors import UserError

from .checksum import crc32c
from .format import BLOCK, CAPTION, MEMBERS, TEXTS, Index, Sample, read_description, read_index

log = logging.getLogger(__name__)

# Limit for a merged range, so that several connections share a large one.
_MAX_SPAN = 8 << 20
# Number of samples in memory at a time when `captions` reads all samples of a URL.
_CHUNK = 256


class BadSample(UserError):
    """A damaged sample. The dataset is at fault. In contrast, a ReadError is a fault of the storage."""


@functools.cache
def _say_no_checksums(root: str) -> None:
    log.warning(
        "%s has no checksums, so damaged samples that can be decoded are used; "
        "bclip ingest verify --add_checksums adds them",
        root,
    )


class ShardDataset:
    """Random access to the samples of one split, in the order in which they were written.

    Safe for several threads, after a fork, and after pickling. Every read compares the sample with its checksums.

    Args:
        root: folder, or URL that fsspec can read.
        read: how to read files and repeat failed reads.

    Raises:
        UserError: folder, split, shard or index is missing, an index disagrees with its shard, or a shard has the wrong
            length. For a URL, a read detects a missing or short shard.
    """

    has_manifest = True

    def __init__(self, root: Path | str, split: str = "train", read: ReadConfig | None = None) -> None:
        self.storage: Storage = open_storage(root, read)
        self.root = str(root)
        self.split = split
        description = read_description(self.storage)
        splits = description["splits"]
        if split not in splits:
            raise UserError(f"{self.root}: no split {split!r}; it has {', '.join(sorted(splits))}")
        self.has_checksums = "checksum" in description
        if not self.has_checksums:
            _say_no_checksums(self.root)
        self.version: int = description["version"]
        self.fingerprint: str = splits[split]["fingerprint"]
        self._shards: list[dict[str, Any]] = splits[split]["files"]
        self.shard_sizes: list[int] = [shard["samples"] for shard in self._shards]
        self.num_bytes = sum(shard["num_bytes"] for shard in self._shards)
        if isinstance(self.storage, RemoteStorage) and self.storage.config.cache_dir:
            sizes = {f"{shard['name']}.tar": (shard["num_bytes"], shard["sha256"]) for shard in self._shards}
            self.storage = CachedStorage(self.storage, sizes, self.storage.config)
        elif isinstance(self.storage, LocalStorage):
            for number, shard in enumerate(self._shards):
                path = self.storage.root / self._name(number)
                if not path.is_file():
                    raise UserError(f"{path} is missing; copy it again or build the dataset again")
                if path.stat().st_size != shard["num_bytes"]:
                    raise UserError(
                        f"{path} has {path.stat().st_size} bytes instead of {shard['num_bytes']} "
                        "(truncated?); copy it again or build the dataset again"
                    )
        self._make_caches()

    def _name(self, number: int) -> str:
        return f"{self._shards[number]['name']}.tar"

    def _make_caches(self) -> None:
        self._starts = [0, *accumulate(self.shard_sizes)]
        self._index = functools.lru_cache(None)(lambda number: self._read_index(number)[1])
        self._keys = functools.lru_cache(2)(lambda number: self._read_index(number)[0])
        self._connections: tuple[int, DaemonPool] | None = None

    def _read_index(self, number: int) -> tuple[list[str], Index]:
        return read_index(self.storage, self._shards[number], self.has_checksums, self.version)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        for name in ("_index", "_keys", "_connections"):
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
        """Return (shard, first byte, last byte + 1) of a sample, with the header of its first member."""
        number, position = self._locate(i)
        index = self._index(number)
        return (
            number,
            int(index.offsets[position, 0]) - BLOCK,
            int(index.offsets[position, -1] + index.sizes[position, -1]),
        )

    def __getitem__(self, i: int) -> Sample:
        number, start, end = self._span(i)
        return self._parse(i, self.storage.read(self._name(number), start, end))

    def _parse(self, i: int, data: bytes) -> Sample:
        """Return sample i from its bytes. If they are damaged, read them once more. Raises BadSample."""
        try:
            return self._parse_once(i, data)
        except BadSample as bad:
            number, start, end = self._span(i)
            sample = self._parse_once(i, self.storage.read_again(self._name(number), start, end))
            log.warning("%s; a second read was intact", bad)
            return sample

    def _parse_once(self, i: int, data: bytes) -> Sample:
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
        path = self.storage.path(self._name(number))
        if names != [key + b"." + member.encode() for member in MEMBERS[self.version]]:
            raise BadSample(f"{path}: sample {position} is not at the offset in the index; build the dataset again")
        if index.checksums is not None:
            for name, content, checksum in zip(names, contents, index.checksums[position].tolist(), strict=True):
                if (actual := crc32c(content)) != checksum:
                    raise BadSample(
                        f"{path}: {name.decode('latin-1')} is damaged: its CRC-32C is {actual:08x}, but the index has "
                        f"{checksum:08x}; copy the shard and its index again"
                    )
        try:
            caption, (meta, *texts) = contents[1].decode(), map(json.loads, contents[2:])
            return Sample(key.decode("ascii"), contents[0], caption, meta, *texts)
        except ValueError as error:
            raise BadSample(f"{path}: sample {position} is corrupt: {error}") from None

    @property
    def active_reads(self) -> list[tuple[str, float]]:
        """(file and bytes, start time) of each read in progress, for messages."""
        return list(self.storage.active_reads.values())

    def fetch(self, indices: Sequence[int]) -> Callable[[], list[Sample | BadSample]]:
        """Start to read samples. Return a function that waits for them and returns them.

        Damaged samples are returned as BadSample. From a folder, the returned function makes the reads. From a URL, the
        reads start at once in other threads, and close ranges of a shard are merged. Both raise ReadError.
        """
        if not self.storage.remote:
            return lambda: [
                self._parse_or_bad(i, self.storage.read(self._name(n), a, b))
                for i, (n, a, b) in zip(indices, map(self._span, indices), strict=True)
            ]
        spans = [self._span(i) for i in indices]
        merged = merge_ranges(spans, self.storage.config.max_gap_kib << 10, _MAX_SPAN)
        pool = self._pool()
        reads = [pool.submit(self.storage.read, self._name(number), start, end) for number, start, end in merged]

        def finish() -> list[Sample | BadSample]:
            data_of: dict[tuple[int, int, int], bytes] = {}
            waiting = deque(sorted(set(spans)))
            for (number, first, last), read in zip(merged, reads, strict=True):
                data = read.result()
                while waiting and waiting[0][0] == number and waiting[0][2] <= last:
                    span = waiting.popleft()
                    data_of[span] = data[span[1] - first : span[2] - first]
            return [self._parse_or_bad(i, data_of[span]) for i, span in zip(indices, spans, strict=True)]

        return finish

    def _parse_or_bad(self, i: int, data: bytes) -> Sample | BadSample:
        try:
            return self._parse(i, data)
        except BadSample as bad:
            return bad

    def _pool(self) -> DaemonPool:
        if self._connections is None or self._connections[0] != os.getpid():
            pool = DaemonPool(self.storage.config.connections, "bclip-connection")
            weakref.finalize(self, pool.close, 0.0)
            self._connections = os.getpid(), pool
        return self._connections[1]

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def shard_starts(self) -> dict[str, int]:
        """Return the index of the first sample of each shard, by the shard's name."""
        return {shard["name"]: start for shard, start in zip(self._shards, self._starts[:-1], strict=True)}

    def name_of(self, i: int) -> tuple[str, str]:
        """Return sample i's key and the file name of its shard. Only reads the index."""
        number, position = self._locate(i)
        return self._keys(number)[position], self._name(number)

    def root_of(self, i: int) -> str:
        """Return the path of the dataset that has sample i."""
        return self.root

    def caption_bytes(self, i: int) -> int:
        """Return the size of sample i's caption. Only reads the index."""
        number, position = self._locate(i)
        return int(self._index(number).sizes[position, 1])

    def num_samples_with(self) -> dict[str, int]:
        """Return the number of samples that have a text of each kind. Only reads dataset.json."""
        counts = {CAPTION: len(self)}
        for shard in self._shards:
            for kind, count in shard.get("texts", {}).items():
                counts[kind] = counts.get(kind, 0) + count
        return counts

    def text_bytes(self, i: int) -> dict[str, list[int]]:
        """Return the size of each text of sample i, by kind. Only reads the index."""
        number, position = self._locate(i)
        index = self._index(number)
        return {CAPTION: [int(index.sizes[position, 1])], **index.text_bytes_of(position)}

    def texts(self, i: int) -> dict[str, list[str]]:
        """Return all texts of sample i by kind, without reading its image. Raises BadSample."""
        caption = {CAPTION: [self.caption(i)]}
        if TEXTS not in MEMBERS[self.version]:
            return caption
        data = self._member(i, TEXTS)
        with contextlib.suppress(ValueError):
            if data is not None:
                return caption | json.loads(data)
        return caption | self[i].texts

    def _member(self, i: int, name: str) -> bytes | None:
        """Return a member of sample i. None if its checksum differs."""
        number, position = self._locate(i)
        index, column = self._index(number), MEMBERS[self.version].index(name)
        offset, size = int(index.offsets[position, column]), int(index.sizes[position, column])
        data = self.storage.read(self._name(number), offset, offset + size)
        return data if index.checksums is None or crc32c(data) == index.checksums[position, column] else None

    def caption(self, i: int) -> str:
        """Return the caption of sample i without reading its image. Raises BadSample."""
        data = self._member(i, "txt")
        with contextlib.suppress(UnicodeDecodeError):
            if data is not None:
                return data.decode()
        return self[i].caption  # raises BadSample, which names the member, unless a second read is intact

    def captions(self, kinds: Sequence[str] = (CAPTION,)) -> Iterator[str]:
        """Yield the texts of all samples in order, except damaged ones. From a URL, this reads all bytes of the shards.

        Args:
            kinds: the kinds of texts.
        """
        if not self.storage.remote:
            for i in range(len(self)):
                with contextlib.suppress(BadSample):
                    texts = {CAPTION: [self.caption(i)]} if tuple(kinds) == (CAPTION,) else self.texts(i)
                    yield from (text for kind in kinds for text in texts.get(kind, ()))
            return
        ahead = self.fetch(range(min(_CHUNK, len(self))))
        for start in range(0, len(self), _CHUNK):
            chunk = ahead()
            ahead = self.fetch(range(start + _CHUNK, min(start + 2 * _CHUNK, len(self))))
            for sample in chunk:
                if isinstance(sample, Sample):
                    texts = {CAPTION: [sample.caption], **sample.texts}
                    yield from (text for kind in kinds for text in texts.get(kind, ()))


def merge_ranges(spans: Sequence[tuple[int, int, int]], max_gap: int, max_span: int) -> list[tuple[int, int, int]]:
    """Merge (file, start, end) spans into ranges, in increasing order. Each span lies completely in one range.

    Args:
        spans: spans that are equal or don't overlap.
        max_gap: largest gap, in bytes, between spans of one range.
        max_span: limit for a merged range, in bytes.
    """
    merged: list[tuple[int, int, int]] = []
    for file, start, end in sorted(spans):
        if merged and merged[-1][0] == file and start - merged[-1][2] <= max_gap and end - merged[-1][1] <= max_span:
            merged[-1] = file, merged[-1][1], max(end, merged[-1][2])
        else:
            merged.append((file, start, end))
    return merged
