"""Several datasets as one, and the way from a setting such as `data.shards` to its datasets."""

from __future__ import annotations

import dataclasses
import logging
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

from bclip_fast.data import filters
from bclip_fast.data.order import Mixture
from bclip_fast.data.sources import Source, mixture_of
from bclip_fast.data.splits import resolve
from bclip_fast.data.storage import ReadConfig, open_storage
from bclip_fast.errors import UserError
from bclip_fast.io.hashing import sha256

from .filtered import FilteredDataset, own_filter
from .format import CAPTION, MissingDescription, Sample, read_description
from .reader import BadSample, ShardDataset
from .tar_dataset import TarDataset
from .tar_paths import is_ours, is_tar_path

log = logging.getLogger(__name__)


class MixedDataset:
    """The samples of several datasets, one dataset after another. It works like a `ShardDataset`.

    Keys and names of shards begin with the name of the dataset, so that they are unique.

    Args:
        sources: names and weights of the datasets.
        members: the datasets.

    Raises:
        UserError: a dataset has no samples.
    """

    def __init__(self, sources: Sequence[Source], members: Sequence[ShardDataset]) -> None:
        self.sources, self.members = tuple(sources), tuple(members)
        self.names = [source.name for source in sources]
        self.root = ", ".join(member.root for member in members)
        self.split = members[0].split
        self.shard_sizes = [size for member in members for size in member.shard_sizes]
        self.num_bytes = sum(member.num_bytes for member in members)
        self.starts = [0, *accumulate(len(member) for member in members)]
        sizes, num_shards = [len(member) for member in members], [len(member.shard_sizes) for member in members]
        self.mixture: Mixture = mixture_of(sources, sizes, num_shards, [member.fingerprint for member in members])
        lines = [f"{member.share} {member.fingerprint}" for member in self.mixture.members]
        self.fingerprint = sha256("\n".join(["mixture", str(self.mixture.epoch_samples), *lines]))

    def __len__(self) -> int:
        return self.starts[-1]

    def _locate(self, i: int) -> tuple[int, int]:
        """Return the number of the member that has sample i, and its index there."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        i %= len(self)
        number = bisect_right(self.starts, i) - 1
        return number, i - self.starts[number]

    def __getitem__(self, i: int) -> Sample:
        number, place = self._locate(i)
        sample = self.members[number][place]
        return dataclasses.replace(sample, key=f"{self.names[number]}/{sample.key}")

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    @property
    def active_reads(self) -> list[tuple[str, float]]:
        """(file and bytes, start time) of each read in progress, for messages."""
        return [read for member in self.members for read in member.active_reads]

    def fetch(self, indices: Sequence[int]) -> Callable[[], list[Sample | BadSample]]:
        """Start to read samples. Return a function that waits for them, as `ShardDataset.fetch` does."""
        places = [self._locate(i) for i in indices]
        rows: dict[int, list[int]] = {}
        for row, (number, _) in enumerate(places):
            rows.setdefault(number, []).append(row)
        reads = {number: self.members[number].fetch([places[row][1] for row in rows[number]]) for number in rows}

        def finish() -> list[Sample | BadSample]:
            samples: dict[int, Sample | BadSample] = {}
            for number, read in reads.items():
                for row, sample in zip(rows[number], read(), strict=True):
                    samples[row] = _named(self.names[number], sample)
            return [samples[row] for row in range(len(places))]

        return finish

    def name_of(self, i: int) -> tuple[str, str]:
        """Return sample i's key and its shard, both with the name of the dataset. Only reads the index."""
        number, place = self._locate(i)
        key, shard = self.members[number].name_of(place)
        return f"{self.names[number]}/{key}", f"{self.names[number]}/{shard}"

    def root_of(self, i: int) -> str:
        """Return the path of the dataset that has sample i."""
        return self.members[self._locate(i)[0]].root

    def caption_bytes(self, i: int) -> int:
        """Return the size of sample i's caption. Only reads the index."""
        number, place = self._locate(i)
        return self.members[number].caption_bytes(place)

    def text_bytes(self, i: int) -> dict[str, list[int]]:
        """Return the size of each text of sample i, by kind. Only reads the index."""
        number, place = self._locate(i)
        return self.members[number].text_bytes(place)

    def num_samples_with(self) -> dict[str, int]:
        """Return the number of samples that have a text of each kind."""
        counts: Counter[str] = Counter()
        for member in self.members:
            counts.update(member.num_samples_with())
        return dict(counts)

    def caption(self, i: int) -> str:
        """Return the caption of sample i without reading its image. Raises BadSample."""
        number, place = self._locate(i)
        return self.members[number].caption(place)

    def captions(self, kinds: Sequence[str] = (CAPTION,)) -> Iterator[str]:
        """Yield the texts of these kinds in order, as `ShardDataset.captions` does."""
        for member in self.members:
            yield from member.captions(kinds)


Dataset = ShardDataset | MixedDataset
"""Random access to samples with a `Sample` each, in shards."""


def open_dataset(
    shards: str | tuple[Source, ...], split: str, read: ReadConfig | None = None, filter: str = filters.ALL
) -> Dataset:
    """Open what a setting such as `data.shards` names. A dataset whose weight is 0 isn't opened.

    Args:
        filter: an expression that selects samples of each dataset (`bclip_fast.data.filters`). If empty, the filter
            that the dataset records. `all`: no filter.

    Raises:
        UserError: a dataset can't be opened. For a list, the message begins with its name.
    """
    if isinstance(shards, str):
        return filtered(open_path(shards, split, read), filter)
    members = []
    used = [source for source in shards if source.amount]
    for source in used:
        try:
            members.append(filtered(open_path(source.path, split, read, source.caption_key), filter))
        except UserError as error:
            raise type(error)(f"dataset {source.name}: {error}") from None
    if len(used) == 1 and used[0].epochs in (None, 1):
        return members[0]
    return MixedDataset(used, members)


def filtered(dataset: ShardDataset, filter: str) -> ShardDataset:
    """Return the samples of a dataset that a filter selects, as `open_dataset` does. Raises UserError."""
    if filter == filters.ALL:
        return dataset
    if not dataset.has_manifest:
        if filter:
            raise UserError(
                f"filter {filter!r} reads a manifest, which the tar files of {dataset.root} lack; use no filter"
            )
        return dataset
    chosen = filter or own_filter(dataset.storage)
    if not chosen:
        return dataset
    selected = FilteredDataset(dataset, chosen)
    counts = len(selected), len(dataset)
    log.info("%s, split %s: filter %s selects %s of %s samples", dataset.root, dataset.split, chosen, *counts)
    return selected


def open_path(
    path: str, split: str, read: ReadConfig | None = None, caption_key: str = "", *, any_spelling: bool = False
) -> ShardDataset:
    """Open one dataset: ours, or tar files in WebDataset's layout.

    Args:
        caption_key: as for `TarDataset`.
        any_spelling: whether another spelling of the split in a dataset of ours will do.

    Raises:
        UserError: neither can be opened, or `caption_key` is set for a dataset of ours.
    """
    if is_tar_path(path):
        return TarDataset(path, split, read, caption_key)
    try:
        if any_spelling:
            names = sorted(read_description(open_storage(path, read))["splits"])
            split = resolve(split, names, f"data {path}", by_program=True)
        dataset = ShardDataset(path, split, read)
    except MissingDescription:
        names = open_storage(path, read).find(".tar")
        if not names or is_ours(open_storage(path, read), names[0]):
            raise
        return TarDataset(path, split, read, caption_key)
    if caption_key:
        raise UserError(f"caption_key={caption_key} is only for tar files of others, but {path} is a dataset of ours")
    return dataset


def _named(name: str, sample: Sample | BadSample) -> Sample | BadSample:
    """Return the sample with the dataset's name before its key."""
    if isinstance(sample, BadSample):
        return sample
    return dataclasses.replace(sample, key=f"{name}/{sample.key}")
