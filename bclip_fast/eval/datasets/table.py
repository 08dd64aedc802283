"""A CSV file with a header: `path` and any of `caption`, `split`, `label` and other label columns."""

from __future__ import annotations

import csv
import functools
from pathlib import Path

from bclip_fast.errors import UserError
from bclip_fast.io import stand_ins
from bclip_fast.io.hashing import sha256, sha256_of_parts

from .files import read_image

_PATH_COLUMNS = ("path", "image")
_CAPTION_COLUMN = "caption"
_SPLIT_COLUMN = "split"


class CsvDataset:
    """Rows in file order. Every column except the path, `caption` and `split` is a label kind. See `EvalDataset`.

    Paths are relative to the CSV file's folder. With a `split` column, only the rows of that split are used. An empty
    cell means that the sample has no such label.
    """

    def __init__(self, file: Path, split: str) -> None:
        """Read and check all rows. Raises UserError with the line number."""
        try:
            with file.open(newline="", encoding="utf-8-sig") as lines:
                reader = csv.DictReader(lines, strict=True)
                columns = list(reader.fieldnames or ())
                rows = [(reader.line_num, row) for row in reader]
        except OSError as error:
            raise UserError(f"data {file} cannot be read: {error.strerror}") from error
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"data {file} is not a CSV file in UTF-8: {error}") from error
        path_column = next((name for name in _PATH_COLUMNS if name in columns), None)
        if path_column is None:
            stand_ins.refuse(file)
            raise UserError(
                f"data {file} has no column 'path' or 'image': its first line must name the columns, e.g. path,label"
            )
        for number, row in rows:
            if None in row or None in row.values():
                raise UserError(
                    f"data {file}, line {number}: the header names {len(columns)} columns, the line has more or fewer"
                )
            if not row[path_column]:
                raise UserError(f"data {file}, line {number}: column {path_column!r} is empty")
        if _SPLIT_COLUMN in columns:
            splits = sorted({row[_SPLIT_COLUMN] for _, row in rows})
            if split not in splits:
                raise UserError(
                    f"data {file} has no split {split!r}: its column 'split' has {', '.join(splits) or 'no row'}"
                )
            rows = [(number, row) for number, row in rows if row[_SPLIT_COLUMN] == split]
        else:
            split = "all"
        if not rows:
            raise UserError(f"data {file} has no row")
        self.path = str(file)
        self.split = split
        self.label_kinds: tuple[str, ...] = tuple(
            name for name in columns if name not in (path_column, _CAPTION_COLUMN, _SPLIT_COLUMN)
        )
        self._rows = [row for _, row in rows]
        self._folder = file.parent
        self._path_column = path_column
        self._has_captions = _CAPTION_COLUMN in columns
        if self._has_captions:
            for number, row in rows:
                if not row[_CAPTION_COLUMN].strip():
                    raise UserError(f"data {file}, line {number}: the caption is empty")

    def __len__(self) -> int:
        return len(self._rows)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of images and cells."""
        return sha256_of_parts(
            "\0".join([sha256(self.image(i)), *(f"{name}={row[name]}" for name in sorted(row))]) + "\n"
            for i, row in enumerate(self._rows)
        )

    def key(self, i: int) -> str:
        """Return the path as the file has it."""
        return self._rows[i][self._path_column]

    def image(self, i: int) -> bytes:
        """Return the contents of the image file."""
        return read_image(self._folder / self.key(i), f", named in {self.path},")

    def captions(self) -> list[str] | None:
        """Return the column `caption`, or None if the file does not have it."""
        return [row[_CAPTION_COLUMN] for row in self._rows] if self._has_captions else None

    def labels(self, kind: str) -> list[str | None]:
        """Return the column `kind`, with None for empty cells."""
        if kind not in self.label_kinds:
            raise UserError(
                f"label {kind!r} is not a column of {self.path}; its labels are {', '.join(self.label_kinds) or 'none'}"
            )
        return [row[kind] or None for row in self._rows]
