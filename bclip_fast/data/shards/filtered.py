"""The samples of a dataset that a filter over its manifest selects."""

from __future__ import annotations

import io
from bisect import bisect_right
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from bclip_fast.data import filters
from bclip_fast.data.storage import LocalStorage, ReadConfig, Storage
from bclip_fast.errors import UserError
from bclip_fast.io.hashing import sha256

from .format import CAPTION, read_description
from .manifest import MANIFEST
from .reader import ShardDataset


class FilteredDataset(ShardDataset):
    """The selected samples of one split, in the order of the dataset. It works like a `ShardDataset`.

    Its fingerprint follows from the dataset's fingerprint and the selected samples, and so do the order of a run and
    the decision whether the run can resume.

    Args:
        filter: an expression, see `bclip_fast.data.filters`.

    Raises:
        UserError: the filter doesn't fit the manifest, or it selects no sample.
    """

    def __init__(self, root: Path | str, split: str, read: ReadConfig | None, filter: str) -> None:
        super().__init__(root, split, read)
        self.unfiltered = ShardDataset(root, split, read)
        self.filter = filter
        self.rows = select(self.unfiltered, filters.parse(filter))
        starts = self.unfiltered._starts
        sizes = [int(((self.rows >= first) & (self.rows < end)).sum()) for first, end in pairwise(starts)]
        self.shard_sizes = [size for size in sizes if size]
        selection = sha256(self.rows.astype("<i8").tobytes().hex())
        self.fingerprint = sha256(f"filtered {self.unfiltered.fingerprint} {selection}")

    def __len__(self) -> int:
        return len(self.rows)

    def _locate(self, i: int) -> tuple[int, int]:
        if not -len(self) <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        row = int(self.rows[i])
        number = bisect_right(self._starts, row) - 1
        return number, row - self._starts[number]

    def _make_caches(self) -> None:
        sizes = self.shard_sizes
        self.shard_sizes = [shard["samples"] for shard in self._shards]
        super()._make_caches()
        self.shard_sizes = sizes

    def num_samples_with(self) -> dict[str, int]:
        """Return the number of selected samples that have a text of each kind. Reads the indices."""
        counts = {CAPTION: len(self)}
        for i in range(len(self)):
            for kind, sizes in self.text_bytes(i).items():
                if kind != CAPTION and sizes:
                    counts[kind] = counts.get(kind, 0) + 1
        return counts


def select(dataset: ShardDataset, chosen: filters.Filter) -> np.ndarray:
    """Return the positions (n,) int64 of the selected samples of a dataset, in increasing order. Raises UserError."""
    table = read_manifest(dataset.storage, chosen, dataset.split)
    starts = dataset.shard_starts()
    mask = chosen.mask(table)
    if not mask.any():
        parts = "; ".join(f"{part}: {count}" for part, count in chosen.counts(table))
        raise UserError(
            f"filter {chosen.text!r} selects none of the {len(table)} samples of the split {dataset.split} of "
            f"{dataset.root} ({parts})"
        )
    shards, positions = table["shard"].to_pylist(), table["position"].to_numpy()
    try:
        places = np.array([starts[name] for name in shards], np.int64) + positions
    except KeyError as error:
        raise UserError(f"{dataset.storage.path(MANIFEST)} names the shard {error}, which the dataset lacks") from None
    if len(np.unique(places)) != len(dataset):
        raise UserError(
            f"{dataset.storage.path(MANIFEST)} does not list every sample of the split {dataset.split} once; build the "
            "dataset again, or use no filter"
        )
    return np.sort(places[mask])


def read_manifest(storage: Storage, chosen: filters.Filter, split: str = "", further: tuple[str, ...] = ()) -> Any:
    """Return the columns of the manifest that a filter needs, and the place of each sample.

    Args:
        split: only its rows. If empty, all rows.
        further: more columns, if the manifest has them.
    """
    try:
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq
    except ModuleNotFoundError as error:
        raise UserError(f"a filter reads {MANIFEST}, which needs pip install pyarrow") from error
    path = storage.path(MANIFEST)
    try:
        # A URL's manifest is read in one piece. Of a local file, only the columns are read.
        source: Any = path if isinstance(storage, LocalStorage) else io.BytesIO(storage.read_all(MANIFEST))
        names = pq.read_schema(source).names
        chosen.check_columns(names, path)
        if isinstance(source, io.BytesIO):
            source.seek(0)
        wanted = dict.fromkeys(("split", "shard", "position", *chosen.columns, *further))
        rows = pc.field("split") == split if split else None
        return pq.read_table(source, columns=[name for name in wanted if name in names], filters=rows)
    except FileNotFoundError:
        raise UserError(f"{path} is missing, and the filter {chosen.text!r} needs it; copy it") from None
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read: {error}; copy it again, or use no filter") from error


def own_filter(storage: Storage) -> str:
    """Return the filter that dataset.json records as the dataset's selection, or an empty string."""
    return str(read_description(storage).get("filter", ""))
