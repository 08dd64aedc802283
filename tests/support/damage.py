"""Damage to single samples of shards, in place, so that sizes and fingerprints stay the same."""

from __future__ import annotations

import json
from pathlib import Path

from bclip_fast.data.shards.reader import ShardDataset

KINDS = ("pixels", "header", "place", "meta", "caption")


def spoil(folder: Path | str, index: int, kind: str = "pixels", split: str = "train") -> str:
    """Damage a sample and return its key. `REASONS[kind]` is part of the error that reports it."""
    key, shard = ShardDataset(folder, split).name_of(index)
    path = Path(folder) / shard
    entries = json.loads(path.with_suffix(".index.json").read_text())["samples"]
    entry = next(entry for entry in entries if entry["key"] == key)
    offset, size = {
        # In this order: half of the scan behind a correct header, the whole JPEG, the tar header, JSON and caption.
        "pixels": (entry["jpg"][0] + entry["jpg"][1] // 2, entry["jpg"][1] - entry["jpg"][1] // 2),
        "header": entry["jpg"],
        "place": (entry["jpg"][0] - 512, 100),
        "meta": entry["json"],
        "caption": (entry["txt"][0], 1),
    }[kind]
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * size)
    return key


REASONS = {
    "pixels": "cannot be decoded",
    "header": "",
    "place": "not at the offset in the index",
    "meta": "is corrupt",
    "caption": "is corrupt",
}
