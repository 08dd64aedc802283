"""Shards of `bclip ingest build`: captions for retrieval, and every text field of the metadata as a label kind."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from bclip_fast.data.shards.format import Sample, read_description
from bclip_fast.data.shards.reader import BadSample, ShardDataset
from bclip_fast.data.splits import resolve
from bclip_fast.data.storage import open_storage
from bclip_fast.errors import UserError

_NUM_PROBED = 256

T = TypeVar("T")


class ShardEvalDataset:
    """One split of a dataset of shards. See `EvalDataset`.

    A damaged sample raises BadSample. After `image` has raised it, the caller leaves the sample out, so `captions` and
    `labels` give an empty value for it.
    """

    def __init__(self, root: Path | str, split: str) -> None:
        """Open the shards `root`, a folder or URL, as `shards`. Raises UserError if the split is empty."""
        names = sorted(read_description(open_storage(root))["splits"])
        self.shards = ShardDataset(root, resolve(split, names, f"data {root}", by_program=True))
        if not len(self.shards):
            raise UserError(f"data {root} has no sample in split {split!r}")
        self.path = str(root)
        self.split = self.shards.split
        self.fingerprint = self.shards.fingerprint
        self._left_out: set[int] = set()

    def __len__(self) -> int:
        return len(self.shards)

    @functools.cached_property
    def label_kinds(self) -> tuple[str, ...]:
        """The text fields that occur in the metadata of about 256 evenly spaced samples."""
        step = max(1, len(self) // _NUM_PROBED)
        metas = [sample.meta for i in range(0, len(self), step) if (sample := self._intact(i)) is not None]
        return tuple(sorted({name for meta in metas for name, value in meta.items() if isinstance(value, str)}))

    def key(self, i: int) -> str:
        """Return the sample's key in the shards."""
        return self.shards.name_of(i)[0]

    def image(self, i: int) -> bytes:
        """Return the encoded image."""
        try:
            return self.shards[i].image
        except BadSample:
            self._left_out.add(i)
            raise

    def captions(self) -> list[str]:
        """Return all captions."""
        return [self._unless_left_out(i, self.shards.caption, "") for i in range(len(self))]

    def labels(self, kind: str) -> list[str | None]:
        """Return the text field `kind` of every sample. Raises UserError if no sample has it."""
        values = [self._unless_left_out(i, lambda i: self.shards[i].meta.get(kind), None) for i in range(len(self))]
        labels = [value if isinstance(value, str) else None for value in values]
        if not any(label is not None for label in labels):
            raise UserError(
                f"label {kind!r} is in no sample's metadata of {self.path}, split {self.split!r}; "
                f"its labels are {', '.join(self.label_kinds) or 'none'}"
            )
        return labels

    def _unless_left_out(self, i: int, read: Callable[[int], T], empty: T) -> T:
        try:
            return read(i)
        except BadSample:
            if i not in self._left_out:
                raise
            return empty

    def _intact(self, i: int) -> Sample | None:
        try:
            return self.shards[i]
        except BadSample:
            return None
