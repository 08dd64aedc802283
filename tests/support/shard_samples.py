"""A small dataset of two splits for tests of shards."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bclip_fast.data.shards.format import Sample
from bclip_fast.data.shards.writer import ShardWriter


def jpeg(number: int) -> bytes:
    """Return a small JPEG of noise."""
    pixels = np.random.default_rng(number).integers(0, 255, (24, 20 + number % 9, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def samples(count: int = 20) -> list[Sample]:
    """Return samples with numbers, nested values and non-ASCII captions."""
    return [
        Sample(f"key_{i}", jpeg(i), f"caption {i} \u03b1", {"number": i, "half": i / 2, "parts": [i, {"a": None}]})
        for i in range(count)
    ]


def split_of(i: int) -> str:
    """Return the split of sample i: every fifth one is in val."""
    return "val" if i % 5 == 0 else "train"


def write_dataset(out: Path, **options: Any) -> Path:
    """Write the samples in several shards."""
    with ShardWriter(out, max_shard_bytes=9000, **options) as writer:
        for i, sample in enumerate(samples()):
            writer.write(sample, split_of(i))
    return out
