"""The data of evaluations: images with captions or labels, from shards, folders, CSV files and public data sets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from bclip_fast.data import filters
from bclip_fast.data.shards.tar_paths import has_tar_files, is_tar_path
from bclip_fast.data.sources import Source
from bclip_fast.data.splits import check_whole
from bclip_fast.errors import UserError, choices

READERS = (
    "auto", "pcam", "medmnist", "rsna", "rsna_all", "tcga_til", "pictures", "ham10000", "deepdrid", "dad", "lc25000",
    "microbench",
)  # fmt: skip
"""Names of the readers, as in the key `dataset` of a task file."""


class EvalDataset(Protocol):
    """N samples in a fixed order. Every method raises UserError, with the file's name, if it cannot read a file."""

    path: str
    split: str

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the contents. It does not depend on the location of the data."""

    @property
    def label_kinds(self) -> tuple[str, ...]:
        """The names that `labels` accepts."""

    def __len__(self) -> int: ...

    def key(self, i: int) -> str:
        """Return the name of sample i in reports and errors."""

    def image(self, i: int) -> bytes:
        """Return the encoded image of sample i."""

    def captions(self) -> list[str] | None:
        """Return all N captions, or None if the data have no captions."""

    def labels(self, kind: str) -> list[str | None]:
        """Return all N labels of one kind. A sample without a label has None."""


def image_name(data: EvalDataset, i: int) -> str:
    """Return the name of a sample's image for errors. Only data whose samples share images differ from `key`."""
    name: str = getattr(data, "image_name", data.key)(i)
    return name


def open_dataset(
    path: str | tuple[Source, ...],
    split: str,
    reader: str = "auto",
    *,
    download_url: str = "",
    name: str = "",
    file: str = "",
    classes: Sequence[str] = (),
    filter: str = filters.ALL,
) -> EvalDataset:
    """Open the data at `path`: a folder of shards or its URL, a .csv, an .npz, or a folder with one folder per class.

    Args:
        path: path or URL. Or several datasets of shards: the data are all that have the split, without their weights.
        reader: one of `READERS`. `auto` chooses by the files. `pictures` takes all images of a folder without labels.
        download_url: source of the public data set, for error messages.
        name: name of the task, or of its row. It selects the data if one folder holds those of several tasks.
        file: name of the file in a folder of several.
        classes: classes of the task, for the readers `lc25000` and `dad`: names of folders, names of categories.
        filter: expression that selects samples of shards (`bclip_fast.data.filters`). `all`: none. If empty, the filter
            that the shards record.

    The split may have another spelling in the data, see `data.splits`. A folder with tables of splits, such as
    train.csv and test.csv, is read as these tables.

    Raises:
        MissingSplit: the data have other splits, but not this one.
        MissingData: the data are not there.
        UserError: missing, empty or faulty data. The message names the expected files and their source. Or a filter for
            other data than shards.
    """
    from . import labelled_images
    from .arrays import open_medmnist, open_pcam
    from .files import MissingData
    from .folder import TilDataset, UnlabelledDataset
    from .microbench import MicroBenchDataset
    from .rsna import RsnaDataset
    from .shards import ShardEvalDataset
    from .table import SUFFIXES, CsvDataset

    if isinstance(path, tuple) or "://" in str(path) or is_tar_path(str(path)):
        return ShardEvalDataset(path, split, filter)
    location = Path(path)
    source = f"; get it from {download_url}" if download_url else ""
    if not location.exists():
        raise MissingData(
            f"data {path} does not exist; pass a folder of shards, a folder of images by class, or a .csv file{source}"
        )
    if reader == "auto" and location.is_dir() and ((location / "dataset.json").is_file() or has_tar_files(location)):
        return ShardEvalDataset(path, split, filter)
    if filter not in ("", filters.ALL):
        raise UserError(f"filter={filter!r} selects samples of shards, and data {path} are none; leave filter out")
    if reader == "pcam":
        return open_pcam(location, split, download_url)
    if reader == "medmnist":
        return open_medmnist(location, split, download_url, name, file)
    if reader == "microbench":
        return MicroBenchDataset(location, split, name, download_url)
    if reader == "ham10000":
        return labelled_images.open_ham10000(location, split, download_url)
    if reader == "deepdrid":
        return labelled_images.open_deepdrid(location, split, download_url)
    if reader == "dad":
        return labelled_images.open_dad(location, split, download_url, classes)
    if reader == "lc25000":
        return labelled_images.open_lc25000(location, split, download_url, classes)
    if reader == "rsna_all":
        return labelled_images.open_rsna(location, split, download_url)
    if reader == "rsna":
        return RsnaDataset(location, split, download_url)
    if reader == "tcga_til":
        return TilDataset(location, split, download_url)
    if reader == "pictures":
        return UnlabelledDataset(location)
    if reader != "auto":
        raise UserError(f"unknown data set reader {reader!r}{choices(reader, READERS)}")
    if location.is_file():
        if location.suffix.lower() == ".npz":
            return open_medmnist(location, split, download_url)
        if location.suffix.lower() not in SUFFIXES:
            raise UserError(f"data {path} is a file but not a .csv; pass a folder or a CSV with columns path,label")
        return CsvDataset(location, split)
    try:
        return _open_folder(location, split)
    except UserError as error:
        raise type(error)(f"{error}{source}") from None


def _open_folder(root: Path, split: str) -> EvalDataset:
    from .files import ImageListing, find_split
    from .folder import FolderDataset
    from .pairs import PairDataset
    from .table import open_split_table

    if PairDataset.matches(root):
        check_whole(split, f"data {root}")
        return PairDataset(root)
    listing = ImageListing(root)
    if (table := open_split_table(listing, split)) is not None:
        return table
    place = find_split(listing, split)
    if place.path != root and PairDataset.matches(place.path):
        return PairDataset(place.path, place.split)
    return FolderDataset(listing, place)
