"""MicroBench (uBench): images with questions, each of which has its own options.

Source: the Hugging Face dataset jnirschl/uBench. Its files are Parquet or Arrow files with these columns:

    image_id   name of the image (or `id`)
    image      {bytes, path}
    dataset    name of the subset
    captions   {classification_0: {options, answer_idx}, classification_1: {options, answer_idx}}

`options` are sentences in random order, and `answer_idx` is the position of the right one. The benchmark asks both
questions.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bclip_fast.errors import UserError, first_line
from bclip_fast.io import stand_ins
from bclip_fast.io.folders import Listing
from bclip_fast.io.hashing import sha256, sha256_of_parts

from .files import MissingData

QUESTIONS = ("classification_0", "classification_1")
SUFFIXES = (".parquet", ".arrow")
_NEEDS = "a column image {bytes}, dataset, and captions {classification_0 {options, answer_idx}, classification_1}"


@dataclass(frozen=True)
class OptionQuestion:
    """A question of an image. answer: position of the right option."""

    kind: str
    options: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class _Place:
    """Place of an image: number of the file, of its batch of rows, and of the row in the batch."""

    file: int
    batch: int
    row: int


class MicroBenchDataset:
    """The images of one subset, in the order of the files. See `EvalDataset`. They have questions, and no labels."""

    label_kinds: tuple[str, ...] = ()

    def __init__(self, root: Path, split: str, subset: str, download_url: str) -> None:
        """Read the questions of a subset.

        Args:
            root: folder with the files, at any depth.
            subset: name in the column `dataset`.

        Raises:
            MissingData: no files, or no image of the subset.
            UserError: a file that cannot be read or lacks a column, or a question without its right option.
        """
        self.path, self.split, self._subset = str(root), split, subset
        listing = Listing(root)
        paths = [path for path in listing.files_below(root) if path.suffix in SUFFIXES]
        if not paths:
            raise MissingData(f"{root} holds no .parquet or .arrow file of MicroBench; get them from {download_url}")
        self._files = [_File(path) for path in paths]
        self._places: list[_Place] = []
        self._keys: list[str] = []
        self.questions: list[tuple[OptionQuestion, ...]] = []
        available: set[str] = set()
        for number, file in enumerate(self._files):
            for batch, rows in file.questions():
                available.update(row["dataset"] for row in rows)
                for i, row in enumerate(rows):
                    if row["dataset"] == subset:
                        self._places.append(_Place(number, batch, i))
                        self._keys.append(row["key"] or f"{file.path.stem}/{batch}/{i}")
                        self.questions.append(_questions(row["captions"], f"{file.path}, image {self._keys[-1]}"))
        if not self._places:
            names = ", ".join(sorted(available)[:30])
            raise MissingData(f"{root} holds no image of the subset {subset!r} of MicroBench; it holds {names}")

    def __len__(self) -> int:
        return len(self._places)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of keys, questions and images."""
        return sha256_of_parts(
            f"{self.key(i)}\0{self.questions[i]}\0{sha256(self.image(i))}\n" for i in range(len(self))
        )

    def key(self, i: int) -> str:
        """Return the image's name."""
        return self._keys[i]

    def image(self, i: int) -> bytes:
        """Return the encoded image."""
        place = self._places[i]
        return self._files[place.file].image(place.batch, place.row)

    def captions(self) -> None:
        """Return None: options are not captions."""
        return None

    def labels(self, kind: str) -> list[str | None]:
        """Raise UserError: the images have questions and no labels."""
        raise UserError(f"label {kind!r} is unknown; {self.path} holds questions with options; use protocol medpmc")


def _questions(captions: Any, name: str) -> tuple[OptionQuestion, ...]:
    questions = []
    for kind in QUESTIONS:
        content = captions.get(kind) if isinstance(captions, dict) else None
        options = content.get("options") if isinstance(content, dict) else None
        answer = content.get("answer_idx") if isinstance(content, dict) else None
        if not isinstance(options, list) or not all(isinstance(option, str) for option in options) or len(options) < 2:
            raise UserError(f"{name}: captions.{kind}.options must be at least two texts, not {options!r}")
        if not isinstance(answer, int) or not 0 <= answer < len(options):
            raise UserError(f"{name}: captions.{kind}.answer_idx is {answer!r}, but must be 0 to {len(options) - 1}")
        questions.append(OptionQuestion(kind, tuple(options), answer))
    return tuple(questions)


class _File:
    """A Parquet or Arrow file. The images of one batch of rows at a time are in memory."""

    def __init__(self, path: Path) -> None:
        self.path, self._lock = path, threading.Lock()
        self._number, self._images = -1, None

    def questions(self) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """Yield the number of each batch, and its rows: key, dataset and captions."""
        try:
            names = self._names()
            if missing := [name for name in ("image", "dataset", "captions") if name not in names]:
                raise UserError(f"{self.path} has no column {missing[0]}; MicroBench needs {_NEEDS}")
            key = next((name for name in ("image_id", "id") if name in names), None)
            for batch, table in self._batches(["dataset", "captions", *([key] if key else [])]):
                columns = {name: table.column(name).to_pylist() for name in table.schema.names}
                keys = columns[key] if key else [None] * table.num_rows
                rows = zip(keys, columns["dataset"], columns["captions"], strict=True)
                yield (
                    batch,
                    [
                        {"key": "" if name is None else str(name), "dataset": str(subset), "captions": captions}
                        for name, subset, captions in rows
                    ],
                )
        except UserError:
            raise
        except Exception as error:  # pyarrow raises exceptions of many classes
            raise self._unreadable(error) from error

    def image(self, batch: int, row: int) -> bytes:
        """Return the bytes of an image."""
        with self._lock:
            if batch != self._number:
                try:
                    self._images, self._number = self._read(batch).column("image"), batch
                except Exception as error:
                    raise self._unreadable(error) from error
            value = self._images[row].as_py()  # type: ignore[index]
        content = value.get("bytes") if isinstance(value, dict) else None
        if not isinstance(content, bytes):
            raise UserError(f"{self.path}, row {row} of batch {batch}: image has no bytes; MicroBench needs {_NEEDS}")
        return content

    def _unreadable(self, error: Exception) -> UserError:
        stand_ins.refuse(self.path)
        return UserError(f"{self.path} cannot be read ({first_line(error)}); MicroBench needs {_NEEDS}")

    @functools.cached_property
    def _parquet(self) -> Any:
        from pyarrow.parquet import ParquetFile

        return ParquetFile(self.path)

    @functools.cached_property
    def _arrow(self) -> Any:
        """The batches of an Arrow file. `datasets` writes streams, and other programs files."""
        import pyarrow as pa

        source = pa.memory_map(str(self.path))
        try:
            return list(pa.ipc.open_stream(source))
        except pa.ArrowInvalid:
            reader = pa.ipc.open_file(source)
            return [reader.get_batch(i) for i in range(reader.num_record_batches)]

    @property
    def _is_parquet(self) -> bool:
        return self.path.suffix == ".parquet"

    def _names(self) -> list[str]:
        if self._is_parquet:
            return list(self._parquet.schema_arrow.names)
        return list(self._arrow[0].schema.names) if self._arrow else []

    def _batches(self, columns: list[str]) -> Iterator[tuple[int, Any]]:
        if self._is_parquet:
            for batch in range(self._parquet.num_row_groups):
                yield batch, self._parquet.read_row_group(batch, columns=columns)
        else:
            yield from enumerate(self._arrow)

    def _read(self, batch: int) -> Any:
        return self._parquet.read_row_group(batch, columns=["image"]) if self._is_parquet else self._arrow[batch]
