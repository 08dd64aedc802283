"""What an evaluation reads: images with captions, labels or both, from shards, a folder of classes or a CSV file."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from ...errors import UserError

READERS = ("auto", "pcam", "medmnist", "rsna", "tcga_til", "pictures")


class EvalDataset(Protocol):
    """N samples in a fixed order. Raises UserError, naming the file, for what cannot be read."""

    path: str
    split: str

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what is in it: the same data, wherever it lies, has the same fingerprint."""

    @property
    def label_kinds(self) -> tuple[str, ...]:
        """The names that `labels` knows."""

    def __len__(self) -> int: ...

    def key(self, i: int) -> str:
        """The name of sample i in reports and errors."""

    def image(self, i: int) -> bytes:
        """The encoded image."""

    def captions(self) -> list[str] | None:
        """All N captions; None where the data have none."""

    def labels(self, kind: str) -> list[str | None]:
        """All N labels of one kind; None for a sample without."""


def open_dataset(path: str, split: str, reader: str = "auto", *, where: str = "", name: str = "") -> EvalDataset:
    """The data at `path`: shards (a folder with dataset.json, or its URL), a .csv or .npz, a folder with one per class.

    Args:
        reader: one of `READERS`; auto tells by what lies there, `pictures` takes all below a folder, without labels.
        where: where the public data set can be had, for the error.
        name: of the task, where one folder may hold the data of several.

    Raises:
        UserError: nothing there, nothing in it, a split it doesn't have; one line that says what was expected and where
            to get it.
    """
    from .arrays import open_medmnist, open_pcam
    from .folder import FolderDataset, PictureDataset, TilDataset
    from .pairs import PairDataset
    from .rsna import RsnaDataset
    from .shards import ShardEvalDataset
    from .table import CsvDataset

    if "://" in str(path):
        return ShardEvalDataset(path, split)
    place = Path(path)
    if not place.exists():
        source = f"; get it from {where}" if where else ""
        raise UserError(
            f"data {path} does not exist: give a folder of shards, a folder of images by class, or a .csv file{source}"
        )
    if reader == "pcam":
        return open_pcam(place, split, where)
    if reader == "medmnist":
        return open_medmnist(place, split, where, name)
    if reader == "rsna":
        return RsnaDataset(place, split, where)
    if reader == "tcga_til":
        return TilDataset(place, split, where)
    if reader == "pictures":
        return PictureDataset(place)
    if reader != "auto":
        raise UserError(f"unknown data set reader {reader!r}: use one of {', '.join(READERS)}")
    if place.is_file():
        if place.suffix.lower() == ".npz":
            return open_medmnist(place, split, where)
        if place.suffix.lower() != ".csv":
            raise UserError(f"data {path} is a file but not a .csv: give a folder or a CSV with columns path,label")
        return CsvDataset(place, split)
    if (place / "dataset.json").is_file():
        return ShardEvalDataset(place, split)
    if PairDataset.is_one(place):
        return PairDataset(place)
    try:
        return FolderDataset(place, split)
    except UserError as error:
        raise UserError(f"{error}; get it from {where}" if where else str(error)) from None
