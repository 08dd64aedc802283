"""Loaders over small datasets, and comparisons of their batches."""

from __future__ import annotations

from typing import Any

import torch

from bclip_fast.data.batch import Batch
from bclip_fast.data.loader import Loader
from bclip_fast.data.sampler import ShardSampler
from bclip_fast.data.shards.reader import ShardDataset
from bclip_fast.data.transform import Preprocess, PreprocessConfig


def tokenize(captions: list[str]) -> list[list[int]]:
    """Return 0 to 3 tokens for each caption."""
    return [[len(caption), ord(caption[2]), 7][: len(caption) % 4] for caption in captions]


def loader(dataset: ShardDataset, rank: int = 0, world_size: int = 1, **changes: Any) -> Loader:
    """Return a loader of global batches of 8 samples. `stream`: further options of the sampler."""
    settings: dict[str, Any] = {"batch_size": 8, "seed": 1, "rank": rank, "world_size": world_size}
    sampler = ShardSampler(dataset.shard_sizes, dataset.fingerprint, **settings, **changes.pop("stream", {}))
    settings = {"preprocess": Preprocess(PreprocessConfig(size=24)), **changes}
    return Loader(dataset, settings.pop("tokenize", tokenize), sampler, **settings)


def take(source: Loader, count: int) -> list[Batch]:
    """Return the next batches."""
    return [next(source) for _ in range(count)]


def by_key(batches: list[Batch]) -> list[tuple[Any, ...]]:
    """Return the samples of batches as (key, pixels, tokens), sorted by key.

    With costs, the number of ranks decides which rank has a sample. A sorted list doesn't depend on it.
    """
    rows = [
        (key, image.numpy().tobytes(), tuple(ids.tolist()))
        for batch in batches
        for key, image, ids in zip(batch.keys, batch.images, batch.ids.split(batch.lengths), strict=True)
    ]
    return sorted(rows)


def have_same_samples(left: list[Batch], right: list[Batch]) -> bool:
    """Return whether two lists of batches are equal bit for bit."""
    return len(left) == len(right) and all(
        a.keys == b.keys
        and torch.equal(a.images, b.images)
        and torch.equal(a.ids, b.ids)
        and a.lengths == b.lengths
        and a.epoch == b.epoch
        for a, b in zip(left, right, strict=True)
    )
