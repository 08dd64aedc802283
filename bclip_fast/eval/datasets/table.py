"""A CSV file with a header: `path` and any of `caption`, `split`, `label` and other label columns."""

from __future__ import annotations

import functools
import logging
from pathlib import Path

from bclip_fast.data import splits
from bclip_fast.errors import UserError
from bclip_fast.io.folders import Listing
from bclip_fast.io.hashing import sha256, sha256_of_parts
from bclip_fast.io.tables import PATH_COLUMNS, SUFFIXES, Row, Table, read_header, read_table

from .files import file_of_split, read_image, split_files

log = logging.getLogger(__name__)

_CAPTION_COLUMN = "caption"
_SPLIT_COLUMN = "split"
# Other names of a column of splits, if every cell spells one.
_SPLIT_COLUMNS = ("set", "subset", "partition", "phase", "fold", "usage", "data_split", "dataset")


class CsvDataset:
    """Rows in file order. Every column except the path, `caption` and `split` is a label kind. See `EvalDataset`.

    Paths are relative to the CSV file's folder. With a `split` column, only the rows of that split are used. An empty
    cell means that the sample has no such label.
    """

    def __init__(self, file: Path, split: str, name: str = "all") -> None:
        """Read and check all rows.

        Args:
            name: split of all rows, if the file does not have a column of splits.

        Raises:
            UserError: a row that is invalid, with its line number.
        """
        table = read_table(
            file, (PATH_COLUMNS,), (_CAPTION_COLUMN, _SPLIT_COLUMN), texts=(_CAPTION_COLUMN,), hint="path,label"
        )
        path_column = next(name for name in PATH_COLUMNS if name in table.columns)
        for row in table.rows:
            if not row.cells[path_column]:
                raise UserError(f"data {file}, line {row.line}: column {path_column!r} is empty")
        self.path = str(file)
        rows, self.split, split_column = rows_of_split(table, split, name, path_column)
        if not rows:
            raise UserError(f"data {file} has no row")
        self.label_kinds: tuple[str, ...] = tuple(
            name for name in table.columns if name not in (path_column, _CAPTION_COLUMN, split_column)
        )
        self._rows = [row.cells for row in rows]
        self._lines = [row.line for row in rows]
        self._folder = file.parent
        self._path_column = path_column
        self._has_captions = _CAPTION_COLUMN in table.columns
        if self._has_captions:
            for row in rows:
                if not row.cells[_CAPTION_COLUMN].strip():
                    raise UserError(f"data {file}, line {row.line}: the caption is empty")

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

    def line(self, i: int) -> int:
        """Return the number of the row's first line in the file, from 1."""
        return self._lines[i]

    def file(self, i: int) -> Path:
        """Return the absolute path of the image file."""
        return (self._folder / self.key(i)).resolve()

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

    def check_one_label(self, kind: str) -> None:
        """Raise UserError if two rows give one image different labels."""
        first: dict[str, int] = {}
        for i, label in enumerate(self.labels(kind)):
            j = first.setdefault(self.key(i), i)
            if label != (other := self._rows[j][kind] or None):
                raise UserError(
                    f"data {self.path}: lines {self._lines[j]} and {self._lines[i]} give {self.key(i)} the labels "
                    f"{other!r} and {label!r} in column {kind!r}; keep one row of each image, or join its classes "
                    "with '|' for a task with multi_label = true"
                )


def rows_of_split(table: Table, split: str, name: str, path_column: str) -> tuple[list[Row], str, str]:
    """Return the rows of a split, the split's name, and the column of splits. Without a column: all rows, `name`, "".

    Raises:
        MissingSplit: no row belongs to the split.
        UserError: two columns may name the splits, or a column spells the split in two ways.
    """
    column = _split_column(table)
    if not column:
        if name == "all":
            splits.check_whole(split, f"data {table.path}")
            log.info("%s: no column of splits, so all rows are used", table.path)
        return table.rows, name, ""
    cells = [row.cells[column] for row in table.rows]
    names = sorted(set(cells) - {""})
    subject = f"data {table.path}: its column {column!r}"
    value = splits.resolve(split, names, subject, certain=True)
    found = splits.by_split(names, certain=True).get(value, value)
    log.info("%s: split %s has the rows with %s = %s", table.path, found, column, value)
    if num_empty := cells.count(""):
        log.warning("%s: %d rows have no split, because column %r is empty", table.path, num_empty, column)
    rows = [row for row in table.rows if row.cells[column] == value]
    chosen = {row.cells[path_column] for row in rows}
    shared = sorted({row.cells[path_column] for row in table.rows if row.cells[column] not in ("", value)} & chosen)
    if shared:
        text = "%s: %d images of split %s are also in another split, the first is %s"
        log.warning(text, table.path, len(shared), found, shared[0])
    return rows, found, column


def _split_column(table: Table) -> str:
    if _SPLIT_COLUMN in table.columns:
        return _SPLIT_COLUMN
    columns = []
    for name in table.columns:
        if name.casefold() in _SPLIT_COLUMNS:
            cells = {row.cells[name] for row in table.rows} - {""}
            if cells and all(map(splits.canonical, cells)):
                columns.append(name)
    if len(columns) > 1:
        raise UserError(
            f"data {table.path}: the columns {' and '.join(map(repr, columns))} both name splits; "
            "rename the right one to split"
        )
    return columns[0] if columns else ""


def open_split_table(listing: Listing, split: str) -> CsvDataset | None:
    """Open the table of a split in a folder with tables of splits, such as train.csv. None: it has none.

    Raises:
        MissingSplit: the folder has tables of other splits only.
        UserError: several tables may stand for the split, or there are folders of splits too.
    """
    tables = {
        stem: file
        for stem, file in split_files(listing, SUFFIXES).items()
        if set(read_header(file, PATH_COLUMNS)) & {*PATH_COLUMNS}
    }
    if not tables:
        return None
    root = listing.root
    if folders := splits.by_split(listing.folders(root)):
        raise UserError(
            f"data {root} has the tables {', '.join(file.name for file in tables.values())} and folders of splits: "
            f"{splits.described(folders)}; pass one table as the data, or move the tables away"
        )
    file, found = file_of_split(tables, split, root)
    return CsvDataset(file, split, found)
