"""From all parts to a plan: repeated articles, duplicate images, splits, the order and the shard of every pair.

The plan is an array of fixed-size records on disk, sorted by (shard, position). It is a function of the parts and the
configuration, so a run that was killed comes to the same one. Memory: about 100 bytes a pair while it is made.
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..errors import UserError
from .pairs import Reject, part_paths
from .shard_format import to_json
from .shard_writer import tar_bytes

SPLITS = ("train", "val", "test")
# Bits of 256; `sanitize.perceptual_hash` says what was measured.
NEAR_BITS = 12
_END_OF_TAR = 20480  # two empty blocks, filled up to a record
_PAIR = np.dtype(
    [
        ("order", "<u8"), ("key", "<u8"), ("source", "<u8"), ("phash", "<u8", 4), ("place", "<u8"),
        ("line", "<u8"), ("part", "<u4"), ("line_bytes", "<u4"), ("image_bytes", "<u4"), ("tar_bytes", "<u4"),
        ("begin", "<u4"), ("original", "<i8"), ("split", "u1"), ("near", "u1"),
    ]
)  # fmt: skip
_ARTICLE = np.dtype([("hash", "<u8"), ("line", "<u8"), ("part", "<u4"), ("line_bytes", "<u4")])
_LONGEST_END = len(b"E\t4294967295\n")


@dataclass(frozen=True)
class Shard:
    """Pairs `start` to `end` of the plan."""

    split: str
    number: int
    start: int
    end: int

    @property
    def name(self) -> str:
        return f"{self.split}-{self.number:06d}"


@dataclass(frozen=True)
class Splits:
    seed: int
    val_fraction: float
    test_fraction: float

    def of(self, identity: str) -> str:
        """train, val or test: a hash of the article's id and the seed, so that an article is never divided."""
        position = _hash(f"{self.seed}:{identity}") / 2**64
        if position < self.val_fraction:
            return "val"
        return "test" if position < self.val_fraction + self.test_fraction else "train"


def make_plan(work: Path, num_parts: int, splits: Splits, max_shard_bytes: int) -> dict[str, Any]:
    """Write plan.npy, shards.json and rejects.jsonl (what the plan itself rejects) to `work`; the counts."""
    num_rejects = _scan(work, num_parts, splits)
    pairs = np.fromfile(work / "pairs.bin", _PAIR)
    articles = np.fromfile(work / "articles.bin", _ARTICLE)
    rejects = work / "rejects.jsonl"
    with rejects.open("w", encoding="utf-8") as file:
        keep = np.ones(len(pairs), bool)
        num_repeated = _repeated_articles(work, pairs, articles, keep, file)
        pairs = pairs[keep]
        _, counts = np.unique(pairs["key"], return_counts=True)
        if (counts > 1).any():
            raise UserError("two pairs have one key: an article's files changed while they were read; build again")
        leaks = mark_duplicates(pairs)
        for row in np.flatnonzero(leaks >= 0).tolist():
            other = pairs[leaks[row]]
            reason = f"near duplicate of a {SPLITS[other['split']]} image: {key_of(work, other)}"
            meta = read_pair(work, pairs[row])["meta"]
            file.write(to_json([meta["article"], meta.get("figure", ""), meta["file"], reason]) + "\n")
        kept = leaks < 0
        pairs, num_leaks = pairs[kept], int((~kept).sum())
    new_place = np.cumsum(kept) - 1
    has = pairs["original"] >= 0
    pairs["original"][has] = new_place[pairs["original"][has]]
    order = np.lexsort((pairs["key"], pairs["order"], pairs["split"]))
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    pairs = pairs[order]
    has = pairs["original"] >= 0
    pairs["original"][has] = place[pairs["original"][has]]
    shards = _shards(pairs, max_shard_bytes)
    np.save(work / "plan.npy", pairs)
    counts_by_split = {name: int((pairs["split"] == number).sum()) for number, name in enumerate(SPLITS)}
    return {
        "articles": len(articles) - num_repeated,
        "pairs": len(pairs),
        "by_split": {name: count for name, count in counts_by_split.items() if count},
        "exact_duplicates": int((has & (pairs["near"] == 0)).sum()),
        "near_duplicates": int((has & (pairs["near"] == 1)).sum()),
        "rejects": num_rejects + num_repeated + num_leaks,
        "shards": [[shard.split, shard.number, shard.start, shard.end] for shard in shards],
    }


def _scan(work: Path, num_parts: int, splits: Splits) -> int:
    """All parts to pairs.bin and articles.bin; the number of rejects in them."""
    num_rejects = num_articles = 0
    begin, row = np.zeros(1, _ARTICLE), np.zeros(1, _PAIR)
    with (work / "pairs.bin").open("wb") as pairs, (work / "articles.bin").open("wb") as articles:
        for part in range(num_parts):
            path = part_paths(work / "parts", part)[1]
            if not _is_whole(path):
                raise damaged(work, part)
            line_start, identity, split = 0, "", 0
            with path.open("rb") as lines:
                for line in lines:
                    if line.startswith(b"A\t"):
                        identity, _ = json.loads(line[2:])
                        split = SPLITS.index(splits.of(identity))
                        begin[0] = (_hash(identity), line_start, part, len(line))
                        articles.write(begin.tobytes())
                        num_articles += 1
                    elif line.startswith(b"P\t"):
                        fields = line.split(b"\t", 9)
                        _, suffix, caption_bytes, meta_bytes, place, image_bytes, _, source, phash, _ = fields
                        key = pair_key(identity, suffix.decode())
                        sizes = sum(map(tar_bytes, (int(image_bytes), int(caption_bytes), int(meta_bytes))))
                        row[0] = (
                            _hash(f"{splits.seed}:order:{key}"), _hash(key), int(source[:16], 16),
                            np.frombuffer(bytes.fromhex(phash.decode()), "<u8"), int(place), line_start, part,
                            len(line), int(image_bytes), sizes, num_articles - 1, -1, split, 0,
                        )  # fmt: skip
                        pairs.write(row.tobytes())
                    elif line.startswith(b"R\t"):
                        num_rejects += 1
                    line_start += len(line)
    return num_rejects


def _is_whole(path: Path) -> bool:
    """Whether the last line of a part is the sum of those before."""
    checksum, tail = 0, b""
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            tail += block
            checksum = zlib.crc32(tail[:-_LONGEST_END], checksum)
            tail = tail[-_LONGEST_END:]
    end = tail.rfind(b"E\t")
    return end >= 0 and tail[end:] == b"E\t%d\n" % zlib.crc32(tail[:end], checksum)


def _repeated_articles(work: Path, pairs: np.ndarray, articles: np.ndarray, keep: np.ndarray, file: IO[str]) -> int:
    """Of several articles with one identity the first counts."""
    _, first, which = np.unique(articles["hash"], return_index=True, return_inverse=True)
    original = first[which]
    repeated = np.flatnonzero(original != np.arange(len(articles)))
    for number in repeated.tolist():
        identity, name = json.loads(_read_line(work, articles[number])[2:])
        _, other = json.loads(_read_line(work, articles[original[number]])[2:])
        file.write(to_json([identity, "", name, f"repeated article: also in {other}"]) + "\n")
    keep[np.isin(pairs["begin"], repeated)] = False
    return len(repeated)


def mark_duplicates(pairs: np.ndarray) -> np.ndarray:
    """Set `original` (row of the first image that is equal or nearly so, else -1) and `near`; the leaks.

    Equal: the same source bytes; near: perceptual hashes of which at most NEAR_BITS bits differ. The answer is, for
    each pair that may not stay, the row of an image of another split that it resembles: a train image like one of val
    or test, a val image like one of test. For others it is -1, and they alone count as originals.
    """
    rows = np.arange(len(pairs))
    leaks = np.full(len(pairs), -1)
    hashes = np.ascontiguousarray(pairs["phash"])
    _, first, look = np.unique(hashes.view("V32").ravel(), return_index=True, return_inverse=True)
    _, source = np.unique(pairs["source"], return_inverse=True)
    left, right = near_pairs(hashes[first])

    def first_like(chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For every row the first chosen one with its source, and with its source or its look; else len(pairs)."""
        by_source, by_look = np.full((2, len(pairs)), len(pairs))
        np.minimum.at(by_source, source[chosen], chosen)
        np.minimum.at(by_look, look[chosen], chosen)
        near = by_look.copy()
        np.minimum.at(near, left, by_look[right])
        np.minimum.at(near, right, by_look[left])
        return by_source[source], np.minimum(by_source[source], near[look])

    train, val, test = (pairs["split"] == number for number in range(len(SPLITS)))
    for protected, exposed in ((val, train), (test, train | val)):
        _, like = first_like(np.flatnonzero(protected))
        moved = exposed & (like < len(pairs))
        leaks[moved] = like[moved]
    same, original = first_like(np.flatnonzero(leaks < 0))
    pairs["original"] = np.where((leaks < 0) & (original < rows), original, -1)
    pairs["near"] = same >= rows
    return leaks


def near_pairs(hashes: np.ndarray, bits: int = NEAR_BITS) -> tuple[np.ndarray, np.ndarray]:
    """Index pairs of different (n, 4) uint64 hashes, each pair once, of which at most `bits` bits differ.

    Exact: the 256 positions are dealt out to bits + 1 bands; two such hashes agree in one band at least, and only those
    that agree in a band are compared.
    """
    found: list[np.ndarray] = []
    for band in range(bits + 1):
        chosen = np.zeros(256, np.uint8)
        chosen[band :: bits + 1] = 1
        mask = np.packbits(chosen, bitorder="little").view("<u8")
        mixed = np.zeros(len(hashes), np.uint64)
        for word in range(4):
            mixed = (mixed ^ (hashes[:, word] & mask[word])) * np.uint64(0x9E3779B97F4A7C15)
            mixed ^= mixed >> np.uint64(29)
        order = np.argsort(mixed, kind="stable")
        mixed = mixed[order]
        step = 1
        candidates = np.arange(len(mixed) - 1)
        while len(candidates := candidates[candidates + step < len(mixed)]):
            candidates = candidates[mixed[candidates] == mixed[candidates + step]]
            one, two = order[candidates], order[candidates + step]
            near = np.bitwise_count(hashes[one] ^ hashes[two]).sum(axis=1) <= bits
            found.append(np.sort(np.stack([one[near], two[near]], 1), axis=1))
            step += 1
    edges = np.unique(np.concatenate(found), axis=0) if found else np.empty((0, 2), np.int64)
    return edges[:, 0], edges[:, 1]


def _shards(pairs: np.ndarray, max_shard_bytes: int) -> list[Shard]:
    """Consecutive pairs of a split as long as they fit; a pair that is too large alone has a shard of its own."""
    shards = []
    for split, name in enumerate(SPLITS):
        start, end = np.searchsorted(pairs["split"], [split, split + 1]).tolist()
        ends = np.cumsum(pairs["tar_bytes"][start:end].astype(np.int64))
        position, number = 0, 0
        while position < end - start:
            before = int(ends[position - 1]) if position else 0
            stop = int(np.searchsorted(ends, before + max_shard_bytes - _END_OF_TAR, side="right"))
            stop = max(stop, position + 1)
            shards.append(Shard(name, number, start + position, start + stop))
            position, number = stop, number + 1
    return shards


def _read_line(work: Path, record: np.ndarray) -> bytes:
    with part_paths(work / "parts", int(record["part"]))[1].open("rb") as file:
        file.seek(int(record["line"]))
        return file.read(int(record["line_bytes"]))


def read_pair(work: Path, record: np.ndarray) -> dict[str, Any]:
    """`caption`, `meta`, `mentions`, `key` and `crc` (of the image) of a pair of the plan."""
    fields = _read_line(work, record).split(b"\t", 9)
    found: dict[str, Any] = json.loads(fields[9])
    return {**found, "key": pair_key(found["meta"]["article"], fields[1].decode()), "crc": int(fields[6])}


def read_image(work: Path, record: np.ndarray, crc: int) -> bytes:
    with part_paths(work / "parts", int(record["part"]))[0].open("rb") as file:
        file.seek(int(record["place"]))
        data = file.read(int(record["image_bytes"]))
    if zlib.crc32(data) != crc:
        raise damaged(work, int(record["part"]))
    return data


def damaged(work: Path, part: int) -> UserError:
    """The part is taken away, so that the next run does it again, with the same bytes."""
    part_paths(work / "parts", part)[1].unlink(missing_ok=True)
    return UserError(f"part {part} was damaged on the disk (a power failure?); run it again: the others are kept")


def key_of(work: Path, record: np.ndarray) -> str:
    return str(read_pair(work, record)["key"])


def part_rejects(work: Path, num_parts: int) -> Iterator[Reject]:
    """The rejects of all parts, then the plan's own."""
    for part in range(num_parts):
        with part_paths(work / "parts", part)[1].open("rb") as lines:
            yield from (Reject(*json.loads(line[2:])) for line in lines if line.startswith(b"R\t"))
    with (work / "rejects.jsonl").open(encoding="utf-8") as rows:
        yield from (Reject(*json.loads(row)) for row in rows)


def pair_key(identity: str, suffix: str) -> str:
    if not re.fullmatch(r"PMC\d{1,12}", identity):
        digest = hashlib.sha256(identity.encode()).hexdigest()[:8]
        identity = re.sub(r"[^A-Za-z0-9]+", "-", identity).strip("-")[-48:].lstrip("-") + f"-{digest}"
    return f"{identity}_{suffix}"


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
