"""Shards written by `bclip ingest build`: captions for retrieval, and any text field of the metadata as a label."""

from __future__ import annotations

import functools
from pathlib import Path

from bclip_fast.data.shards.reader import ShardDataset

from ...errors import UserError

_NUM_PROBED = 256


class ShardEvalDataset:
    """One split of a dataset of shards; see `EvalDataset`."""

    def __init__(self, root: Path | str, split: str) -> None:
        self._shards = ShardDataset(root, split)
        if not len(self._shards):
            raise UserError(f"data {root} has no sample in split {split!r}")
        self.path = str(root)
        self.split = split
        self.fingerprint = self._shards.fingerprint

    def __len__(self) -> int:
        return len(self._shards)

    @functools.cached_property
    def label_kinds(self) -> tuple[str, ...]:
        step = max(1, len(self) // _NUM_PROBED)
        metas = [self._shards[i].meta for i in range(0, len(self), step)]
        return tuple(sorted({name for meta in metas for name, value in meta.items() if isinstance(value, str)}))

    def key(self, i: int) -> str:
        return self._shards[i].key

    def image(self, i: int) -> bytes:
        return self._shards[i].image

    def captions(self) -> list[str]:
        return [self._shards.caption(i) for i in range(len(self))]

    def labels(self, kind: str) -> list[str | None]:
        values = [self._shards[i].meta.get(kind) for i in range(len(self))]
        labels = [value if isinstance(value, str) else None for value in values]
        if not any(label is not None for label in labels):
            raise UserError(
                f"label {kind!r} is in no sample's metadata of {self.path}, split {self.split!r}: "
                f"there are {', '.join(self.label_kinds) or 'none'}"
            )
        return labels
