"""Damage to single samples of shards, in place, so that sizes and fingerprints stay the same."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from bclip_fast.data.image_files import ImageError, decode_as_loaders
from bclip_fast.data.shards.checksum import crc32c
from bclip_fast.data.shards.reader import ShardDataset

KINDS = ("pixels", "bit", "header", "place", "meta", "caption")


def spoil(folder: Path | str, index: int, kind: str = "pixels", split: str = "train") -> str:
    """Damage a sample and return its key. `REASONS[kind]` is part of the error that reports it.

    The index gets the checksums of the damaged members, as if the writer had stored them, so the decoders must find the
    damage. It keeps those of "place" and "bit": one bit of a JPEG, which still decodes.
    """
    key, shard = ShardDataset(folder, split).name_of(index)
    path = Path(folder) / shard
    contents = json.loads(path.with_suffix(".index.json").read_text())
    entry = next(entry for entry in contents["samples"] if entry["key"] == key)
    offset, size = {
        # In this order: half of the scan behind a correct header, the whole JPEG, the tar header, JSON and caption.
        "pixels": (entry["jpg"][0] + entry["jpg"][1] // 2, entry["jpg"][1] - entry["jpg"][1] // 2),
        "header": entry["jpg"],
        "place": (entry["jpg"][0] - 512, 100),
        "meta": entry["json"],
        "caption": (entry["txt"][0], 1),
        "bit": (entry["jpg"][0], 1),
    }[kind]
    with path.open("r+b") as file:
        file.seek(offset)
        damage = _other_pixels(file.read(entry["jpg"][1])) if kind == "bit" else b"\xff" * size
        file.seek(offset)
        file.write(damage)
        if kind not in ("place", "bit") and "crc32c" in entry:
            file.flush()
            data = path.read_bytes()
            places = [entry[member] for member in ("jpg", "txt", "json")]
            entry["crc32c"] = [crc32c(data[start : start + length]) for start, length in places]
            path.with_suffix(".index.json").write_text(json.dumps(contents))
    return key


def entry_of(folder: Path, shard: str = "train-000000", position: int = 0) -> dict[str, Any]:
    """The entry of a sample in its shard's index."""
    return json.loads((folder / f"{shard}.index.json").read_text())["samples"][position]


def flip_bit(folder: Path, member: str, shard: str = "train-000000", position: int = 0) -> str:
    """Change one bit of a member, which changes neither its format nor its size. Return the member's name."""
    entry = entry_of(folder, shard, position)
    offset, size = entry[member]
    data = bytearray((folder / f"{shard}.tar").read_bytes())
    data[offset + {"jpg": size - 3, "txt": 2, "json": min(3, size - 1)}[member]] ^= 1
    (folder / f"{shard}.tar").write_bytes(data)
    return f"{entry['key']}.{member}"


def _other_pixels(jpeg: bytes) -> bytes:
    """Change one bit of the scan so that the file still decodes, to other pixels."""
    pixels = decode_as_loaders(jpeg).tobytes()
    for place in range(len(jpeg) - 3, 0, -1):
        for bit in range(8):
            damaged = jpeg[:place] + bytes([jpeg[place] ^ 1 << bit]) + jpeg[place + 1 :]
            with contextlib.suppress(ImageError):
                if decode_as_loaders(damaged).tobytes() != pixels:
                    return damaged
    raise AssertionError


REASONS = {
    "pixels": "cannot be decoded",
    "header": "",
    "place": "not at the offset in the index",
    "meta": "is corrupt",
    "caption": "is corrupt",
    "bit": ".jpg is damaged: its CRC-32C is ",
}
