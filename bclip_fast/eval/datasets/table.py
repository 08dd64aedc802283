"""A CSV file with a header: `path` and any of `label`, other label columns, `caption`, `split`."""

from __future__ import annotations

import csv
import functools
from pathlib import Path

from ...errors import UserError
from ...io.hashing import sha256, sha256_of_parts

_PATH_COLUMNS = ("path", "image")
_CAPTION_COLUMN = "caption"
_SPLIT_COLUMN = "split"


class CsvDataset:
    """Rows in file order; every column but the path, `caption` and `split` is a label kind; see `EvalDataset`.

    Paths are relative to the CSV file's folder. With a `split` column only the rows of that split are used, without
    one all rows are. An empty cell means that the sample has no such label.
    """

    def __init__(self, file: Path, split: str) -> None:
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
            raise UserError(
                f"data {file} has no column 'path' or 'image': its first line must name the columns, e.g. path,label"
            )
        for number, row in rows:
            if None in row or None in row.values():
                raise UserError(
                    f"data {file}, line {number}: {len(columns)} columns are named, but this line has fewer or more"
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
        return sha256_of_parts(
            "\0".join([sha256(self.image(i)), *(f"{name}={row[name]}" for name in sorted(row))]) + "\n"
            for i, row in enumerate(self._rows)
        )

    def key(self, i: int) -> str:
        return self._rows[i][self._path_column]

    def image(self, i: int) -> bytes:
        path = self._folder / self.key(i)
        try:
            return path.read_bytes()
        except OSError as error:
            raise UserError(f"image {path}, named in {self.path}, cannot be read: {error.strerror}") from error

    def captions(self) -> list[str] | None:
        return [row[_CAPTION_COLUMN] for row in self._rows] if self._has_captions else None

    def labels(self, kind: str) -> list[str | None]:
        if kind not in self.label_kinds:
            raise UserError(
                f"label {kind!r} is not a column of {self.path}: there are {', '.join(self.label_kinds) or 'none'}"
            )
        return [row[kind] or None for row in self._rows]
