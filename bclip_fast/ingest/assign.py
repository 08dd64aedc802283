"""Make the plan from all parts: remove repeated articles and leaks, and assign split, order and shard of every pair.

The plan is an array of fixed-size records on disk, sorted by (shard, position). It depends only on the parts and the
configuration, so a killed run makes the same plan again. Making it takes about 100 bytes of memory a pair.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from bclip_fast.data.shards.format import to_json
from bclip_fast.data.shards.writer import tar_bytes
from bclip_fast.errors import UserError

from .duplicates import mark_duplicates
from .parts import (
    ARTICLE,
    PAIR,
    REJECT,
    SPLITS,
    discard_damaged,
    is_complete,
    pair_key,
    parse_article,
    parse_pair,
    part_paths,
    read_line,
    read_pair,
)

# Bytes at the end of a tar: two empty blocks, padded to a record.
_END_OF_TAR = 20480
# The fields are a file format: killed runs of older versions left plan.npy. "place" is the offset of the image, and
# "begin" the number of the article.
_PAIR = np.dtype(
    [
        ("order", "<u8"), ("key", "<u8"), ("source", "<u8"), ("phash", "<u8", 4), ("place", "<u8"),
        ("line", "<u8"), ("part", "<u4"), ("line_bytes", "<u4"), ("image_bytes", "<u4"), ("tar_bytes", "<u4"),
        ("begin", "<u4"), ("original", "<i8"), ("split", "u1"), ("near", "u1"),
    ]
)  # fmt: skip
_ARTICLE = np.dtype([("hash", "<u8"), ("line", "<u8"), ("part", "<u4"), ("line_bytes", "<u4")])


@dataclass(frozen=True)
class Shard:
    """A shard with the pairs `start` to `end` - 1 of the plan."""

    split: str
    number: int
    start: int
    end: int

    @property
    def name(self) -> str:
        """Name of the shard's files, without suffix."""
        return f"{self.split}-{self.number:06d}"


@dataclass(frozen=True)
class Splits:
    """The rule that assigns articles to splits."""

    seed: int
    val_fraction: float
    test_fraction: float

    def of(self, identity: str) -> str:
        """Return the split of an article: train, val or test. It depends only on the seed and the article's id."""
        position = _hash(f"{self.seed}:{identity}") / 2**64
        if position < self.val_fraction:
            return "val"
        return "test" if position < self.val_fraction + self.test_fraction else "train"


def make_plan(work: Path, num_parts: int, splits: Splits, max_shard_bytes: int) -> dict[str, Any]:
    """Write plan.npy and rejects.jsonl (the rejects of the plan itself) to `work`. Return the counts and the shards."""
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
            raise UserError(
                "two pairs have the same key: an article changed while it was read; build the dataset again"
            )
        leaks = mark_duplicates(pairs)
        for row in np.flatnonzero(leaks >= 0).tolist():
            other = pairs[leaks[row]]
            reason = f"near duplicate of a {SPLITS[other['split']]} image: {key_of(work, other)}"
            meta = read_pair(work, pairs[row])["meta"]
            file.write(to_json([meta["article"], meta.get("figure", ""), meta["file"], reason]) + "\n")
        kept = leaks < 0
        pairs, num_leaks = pairs[kept], int((~kept).sum())
    row_after_removal = np.cumsum(kept) - 1
    has_original = pairs["original"] >= 0
    pairs["original"][has_original] = row_after_removal[pairs["original"][has_original]]
    order = np.lexsort((pairs["key"], pairs["order"], pairs["split"]))
    row_after_sort = np.empty(len(order), np.int64)
    row_after_sort[order] = np.arange(len(order))
    pairs = pairs[order]
    has_original = pairs["original"] >= 0
    pairs["original"][has_original] = row_after_sort[pairs["original"][has_original]]
    shards = _shards(pairs, max_shard_bytes)
    with (work / "plan.npy").open("wb") as file:
        # np.save doesn't report a disk that becomes full when it closes the file.
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(pairs))
        file.write(pairs.view(np.uint8).data)
    counts_by_split = {name: int((pairs["split"] == number).sum()) for number, name in enumerate(SPLITS)}
    return {
        "articles": len(articles) - num_repeated,
        "pairs": len(pairs),
        "by_split": {name: count for name, count in counts_by_split.items() if count},
        "exact_duplicates": int((has_original & (pairs["near"] == 0)).sum()),
        "near_duplicates": int((has_original & (pairs["near"] == 1)).sum()),
        "rejects": num_rejects + num_repeated + num_leaks,
        "shards": [[shard.split, shard.number, shard.start, shard.end] for shard in shards],
    }


def _scan(work: Path, num_parts: int, splits: Splits) -> int:
    """Write the records of all parts to pairs.bin and articles.bin. Return the number of rejects in the parts."""
    num_rejects = num_articles = 0
    article, row = np.zeros(1, _ARTICLE), np.zeros(1, _PAIR)
    with (work / "pairs.bin").open("wb") as pairs, (work / "articles.bin").open("wb") as articles:
        for part in range(num_parts):
            path = part_paths(work / "parts", part)[1]
            if not is_complete(path):
                raise discard_damaged(work, part)
            line_start, identity, split = 0, "", 0
            with path.open("rb") as lines:
                for line in lines:
                    if line.startswith(ARTICLE):
                        identity = parse_article(line).identity
                        split = SPLITS.index(splits.of(identity))
                        article[0] = (_hash(identity), line_start, part, len(line))
                        articles.write(article.tobytes())
                        num_articles += 1
                    elif line.startswith(PAIR):
                        pair = parse_pair(line)
                        key = pair_key(identity, pair.suffix)
                        members = [pair.image_bytes, pair.caption_bytes, pair.meta_bytes]
                        sizes = sum(map(tar_bytes, members + [len(pair.texts)] * bool(pair.texts)))
                        row[0] = (
                            _hash(f"{splits.seed}:order:{key}"), _hash(key), int(pair.source_sha256[:16], 16),
                            np.frombuffer(bytes.fromhex(pair.phash), "<u8"), pair.image_offset, line_start, part,
                            len(line), pair.image_bytes, sizes, num_articles - 1, -1, split, 0,
                        )  # fmt: skip
                        pairs.write(row.tobytes())
                    elif line.startswith(REJECT):
                        num_rejects += 1
                    line_start += len(line)
    return num_rejects


def _repeated_articles(work: Path, pairs: np.ndarray, articles: np.ndarray, keep: np.ndarray, file: IO[str]) -> int:
    """Keep the first of several articles with the same identity. Return the number of the others."""
    _, first, ids = np.unique(articles["hash"], return_index=True, return_inverse=True)
    original = first[ids]
    repeated = np.flatnonzero(original != np.arange(len(articles)))
    for number in repeated.tolist():
        article = parse_article(read_line(work, articles[number]))
        other = parse_article(read_line(work, articles[original[number]])).file
        file.write(to_json([article.identity, "", article.file, f"repeated article: also in {other}"]) + "\n")
    keep[np.isin(pairs["begin"], repeated)] = False
    return len(repeated)


def _shards(pairs: np.ndarray, max_shard_bytes: int) -> list[Shard]:
    """Divide the pairs of each split into shards. A pair larger than the limit gets its own shard."""
    shards = []
    for split, name in enumerate(SPLITS):
        start, end = np.searchsorted(pairs["split"], [split, split + 1]).tolist()
        ends = np.cumsum(pairs["tar_bytes"][start:end].astype(np.int64))
        position, number = 0, 0
        while position < end - start:
            start_bytes = int(ends[position - 1]) if position else 0
            stop = int(np.searchsorted(ends, start_bytes + max_shard_bytes - _END_OF_TAR, side="right"))
            stop = max(stop, position + 1)
            shards.append(Shard(name, number, start + position, start + stop))
            position, number = stop, number + 1
    return shards


def key_of(work: Path, record: np.ndarray) -> str:
    """Return the key of a record of the plan."""
    return str(read_pair(work, record)["key"])


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
