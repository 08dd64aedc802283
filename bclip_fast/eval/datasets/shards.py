"""Shards of `bclip ingest build`: captions for retrieval, and every text field of the metadata as a label kind."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from bclip_fast.data import filters
from bclip_fast.data.shards.format import Sample
from bclip_fast.data.shards.mixed import Dataset, MixedDataset, filtered, open_path
from bclip_fast.data.shards.reader import BadSample, ShardDataset
from bclip_fast.data.sources import Source
from bclip_fast.data.splits import MissingSplit
from bclip_fast.errors import UserError

log = logging.getLogger(__name__)

_NUM_PROBED = 256

T = TypeVar("T")


class ShardEvalDataset:
    """One split of a dataset of shards. See `EvalDataset`.

    A damaged sample raises BadSample. After `image` has raised it, the caller leaves the sample out, so `captions` and
    `labels` give an empty value for it.
    """

    def __init__(self, data: Path | str | tuple[Source, ...], split: str, filter: str = filters.ALL) -> None:
        """Open `shards`. data: folder or URL, or several of them, as in `open_dataset`.

        filter: as for `bclip_fast.data.shards.mixed.open_dataset`.

        Raises:
            UserError: the split is empty, or the filter doesn't fit the data or selects nothing.
        """
        self.shards: Dataset = (
            _open_list(data, split, filter)
            if isinstance(data, tuple)
            else filtered(open_path(str(data), split, any_spelling=True), filter)
        )
        if not len(self.shards):
            raise UserError(f"data {self.shards.root} has no sample in split {split!r}")
        self.path = self.shards.root
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


def _open_list(sources: tuple[Source, ...], split: str, filter: str) -> Dataset:
    """Open the datasets that have the split. A dataset whose weight is 0 isn't used."""
    members: dict[Source, ShardDataset] = {}
    missing: dict[str, MissingSplit] = {}
    for source in sources:
        if not source.amount:
            continue
        try:
            dataset = open_path(source.path, split, caption_key=source.caption_key, any_spelling=True)
            members[dataclasses.replace(source, weight=None, epochs=None)] = filtered(dataset, filter)
        except MissingSplit as error:
            missing[source.name] = error
        except UserError as error:
            raise type(error)(f"dataset {source.name}: {error}") from None
    if not members:
        raise next(iter(missing.values()))
    if missing:
        names = [source.name for source in members]
        log.info("split %s is that of %s; without it: %s", split, ", ".join(names), ", ".join(missing))
    return MixedDataset(list(members), list(members.values())) if len(members) > 1 else next(iter(members.values()))
