"""The samples of a dataset that a filter over its manifest selects."""

from __future__ import annotations

import io
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from bclip_fast.data import filters
from bclip_fast.data.storage import LocalStorage, Storage
from bclip_fast.errors import UserError
from bclip_fast.io.hashing import sha256

from .format import CAPTION, KINDS, read_description
from .manifest import MANIFEST
from .reader import ShardDataset

# Rows of the manifest in memory at a time.
_ROWS = 65536


class FilteredDataset(ShardDataset):
    """The selected samples of one split, in the order of the dataset. It works like a `ShardDataset`.

    Its fingerprint follows from the dataset's fingerprint and the selected samples, and so do the order of a run and
    the decision whether the run can resume.

    Args:
        dataset: the dataset.
        filter: an expression, see `bclip_fast.data.filters`.

    Raises:
        UserError: the filter doesn't fit the manifest, or it selects no sample.
    """

    def __init__(self, dataset: ShardDataset, filter: str) -> None:
        self.__setstate__(dataset.__getstate__())
        self.unfiltered = dataset
        self.filter = filter
        self.rows = select(self.unfiltered, filters.parse(filter))
        # The rows are in increasing order. A shard without a selected sample has no place in the order of a run.
        self.shard_sizes = [size for size in np.diff(np.searchsorted(self.rows, self._starts)).tolist() if size]
        # Estimated: the selected samples are as large as the others.
        self.num_bytes = self.num_bytes * len(self.rows) // len(self.unfiltered)
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
        """Return the number of selected samples with a text of each kind. With texts, this reads all indices."""
        counts = {CAPTION: len(self)}
        if len(self.unfiltered.num_samples_with()) == 1:
            return counts
        for number, (first, end) in enumerate(pairwise(np.searchsorted(self.rows, self._starts).tolist())):
            if first == end:
                continue
            _, index = self._read_index(number)
            if index.text_starts is None or index.text_kinds is None:
                continue
            owners = np.repeat(np.arange(len(index.text_starts) - 1), np.diff(index.text_starts))
            is_selected = np.isin(owners, self.rows[first:end] - self._starts[number])
            for kind in np.unique(index.text_kinds[is_selected]).tolist():
                samples = np.unique(owners[is_selected & (index.text_kinds == kind)])
                counts[KINDS[kind]] = counts.get(KINDS[kind], 0) + len(samples)
        return counts


def select(dataset: ShardDataset, chosen: filters.Filter) -> np.ndarray:
    """Return the positions (n,) int64 of the selected samples of a dataset, in increasing order.

    Memory: about 9 bytes for each sample of the split.

    Raises:
        UserError: the filter doesn't fit the manifest or selects nothing, or the manifest doesn't fit the dataset.
    """
    path, starts = dataset.storage.path(MANIFEST), dataset.shard_starts()
    places, masks = [], []
    counts: Counter[str] = Counter()
    for table in read_manifest(dataset.storage, chosen, dataset.split):
        shards = table["shard"].combine_chunks().dictionary_encode()
        names = shards.dictionary.to_pylist()
        if unknown := [name for name in names if name not in starts]:
            raise UserError(f"{path} names the shard {unknown[0]}, which the dataset does not have")
        first = np.array([starts[name] for name in names], np.int64)
        places.append(first[shards.indices.to_numpy()] + table["position"].to_numpy())
        masks.append(chosen.mask(table))
        counts.update(dict(chosen.counts(table)))
    place, mask = np.concatenate([*places, np.empty(0, np.int64)]), np.concatenate([*masks, np.empty(0, bool)])
    is_listed = np.zeros(len(dataset), bool)
    if len(place) == len(dataset) and place.min(initial=0) >= 0 and place.max(initial=0) < len(dataset):
        is_listed[place] = True
    if not is_listed.all():
        raise UserError(
            f"{path} does not list every sample of the split {dataset.split} once; build the dataset again, or use no "
            "filter"
        )
    if not mask.any():
        subject = f"{len(place)} samples of the split {dataset.split} of {dataset.root}"
        raise UserError(nothing_selected(chosen, subject, counts))
    return np.sort(place[mask])


def nothing_selected(chosen: filters.Filter, subject: str, counts: Mapping[str, int]) -> str:
    """Return the message about a filter that selects no sample. counts: the samples that each part of it selects."""
    parts = "; ".join(f"{part}: {count}" for part, count in counts.items())
    return f"filter {chosen.text!r} selects none of the {subject} ({parts}); change it"


def read_manifest(
    storage: Storage, chosen: filters.Filter, split: str = "", further: tuple[str, ...] = ()
) -> Iterator[Any]:
    """Yield tables with the columns of the manifest that a filter needs, and the place of each sample.

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
        file = pq.ParquetFile(source)
        names = file.schema_arrow.names
        chosen.check_columns(names, path)
        wanted = dict.fromkeys(("split", "shard", "position", *chosen.columns, *further))
        for batch in file.iter_batches(_ROWS, columns=[name for name in wanted if name in names]):
            table = pa.Table.from_batches([batch])
            yield table.filter(pc.equal(table["split"], split)) if split else table
    except FileNotFoundError:
        raise UserError(f"{path} is missing, and the filter {chosen.text!r} needs it; copy it") from None
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read: {error}; copy it again, or use no filter") from error


def own_filter(storage: Storage) -> str:
    """Return the filter that dataset.json records as the dataset's selection, or an empty string."""
    return str(read_description(storage).get("filter", ""))
