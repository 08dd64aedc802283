"""What an evaluation reads: images with captions, labels or both, from shards, a folder of classes or a CSV file."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ...errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_IMAGE_PIXELS = 200_000_000
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")


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


def open_dataset(path: str, split: str) -> EvalDataset:
    """The data at `path`: shards (a folder with dataset.json, or its URL), a `.csv`, or a folder with one per class.

    Raises:
        UserError: nothing there, nothing in it, a split it doesn't have.
    """
    from .folder import FolderDataset
    from .shards import ShardEvalDataset
    from .table import CsvDataset

    if "://" in path:
        return ShardEvalDataset(path, split)
    place = Path(path)
    if not place.exists():
        raise UserError(
            f"data {path} does not exist: give a folder of shards, a folder of images by class, or a .csv file"
        )
    if place.is_file():
        if place.suffix.lower() != ".csv":
            raise UserError(f"data {path} is a file but not a .csv: give a folder or a CSV with columns path,label")
        return CsvDataset(place, split)
    if (place / "dataset.json").is_file():
        return ShardEvalDataset(place, split)
    return FolderDataset(place, split)


def open_image(data: bytes, name: Callable[[], str]) -> Image:
    """The decoded picture, in the mode of its file: conversion to RGB is the preprocess's business.

    `name` says which picture it is; it is asked in case of an error only, since asking may cost a read.

    Raises:
        UserError: not an image of a known format, broken, or over `MAX_IMAGE_PIXELS`.
    """
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
        if image.width * image.height > MAX_IMAGE_PIXELS:
            raise UserError(
                f"image {name()} has {image.width} x {image.height} pixels, more than {MAX_IMAGE_PIXELS}: scale it down"
            )
        image.load()
    except UserError:
        raise
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"image {name()} cannot be decoded: {reason}") from error
    return image
