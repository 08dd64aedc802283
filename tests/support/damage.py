"""Damage single samples of shards in place. Sizes and fingerprints stay the same."""

from __future__ import annotations

import json
from pathlib import Path

from bclip_fast.data.shards.reader import ShardDataset

KINDS = ("pixels", "header", "place", "meta", "caption")


def spoil(folder: Path | str, index: int, kind: str = "pixels", split: str = "train") -> str:
    """Damage a sample. Return its key. REASONS holds the reader's message for each kind of damage."""
    key, shard = ShardDataset(folder, split).name_of(index)
    path = Path(folder) / shard
    entries = json.loads(path.with_suffix(".index.json").read_text())["samples"]
    entry = next(entry for entry in entries if entry["key"] == key)
    offset, size = {
        # pixels: half of the scan, which leaves the JPEG header intact. place: the header in the tar.
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
