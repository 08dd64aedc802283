"""Shards of `bclip ingest build`: captions for retrieval, and every text field of the metadata as a label kind."""

from __future__ import annotations

import functools
from pathlib import Path

from bclip_fast.data.shards.format import read_description
from bclip_fast.data.shards.reader import ShardDataset
from bclip_fast.data.splits import resolve
from bclip_fast.data.storage import open_storage
from bclip_fast.errors import UserError

_NUM_PROBED = 256


class ShardEvalDataset:
    """One split of a dataset of shards. See `EvalDataset`."""

    def __init__(self, root: Path | str, split: str) -> None:
        """root: folder or URL. Raises UserError if the split is empty."""
        names = sorted(read_description(open_storage(root))["splits"])
        self._shards = ShardDataset(root, resolve(split, names, f"data {root}", by_program=True))
        if not len(self._shards):
            raise UserError(f"data {root} has no sample in split {split!r}")
        self.path = str(root)
        self.split = self._shards.split
        self.fingerprint = self._shards.fingerprint

    def __len__(self) -> int:
        return len(self._shards)

    @functools.cached_property
    def label_kinds(self) -> tuple[str, ...]:
        """The text fields that occur in the metadata of about 256 evenly spaced samples."""
        step = max(1, len(self) // _NUM_PROBED)
        metas = [self._shards[i].meta for i in range(0, len(self), step)]
        return tuple(sorted({name for meta in metas for name, value in meta.items() if isinstance(value, str)}))

    def key(self, i: int) -> str:
        """Return the sample's key in the shards."""
        return self._shards[i].key

    def image(self, i: int) -> bytes:
        """Return the encoded image."""
        return self._shards[i].image

    def captions(self) -> list[str]:
        """Return all captions."""
        return [self._shards.caption(i) for i in range(len(self))]

    def labels(self, kind: str) -> list[str | None]:
        """Return the text field `kind` of every sample. Raises UserError if no sample has it."""
        values = [self._shards[i].meta.get(kind) for i in range(len(self))]
        labels = [value if isinstance(value, str) else None for value in values]
        if not any(label is not None for label in labels):
            raise UserError(
                f"label {kind!r} is in no sample's metadata of {self.path}, split {self.split!r}; "
                f"its labels are {', '.join(self.label_kinds) or 'none'}"
            )
        return labels
