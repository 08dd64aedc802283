"""Read tables that people write: CSV files with a header, from spreadsheets and scripts.

Columns are separated by commas, semicolons or tabs. Spaces and invisible characters around names and cells are
removed, and text is brought to Unicode's form NFC, except in texts and paths. The log counts the changes.
"""

from __future__ import annotations

import contextlib
import csv
import io
import logging
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bclip_fast.errors import UserError

from . import stand_ins

log = logging.getLogger(__name__)

SUFFIXES = (".csv", ".tsv")
PATH_COLUMNS = ("path", "image")
"""Columns with paths. Their cells keep their Unicode form, which a file system may tell apart."""
_MAX_HEADER_BYTES = 1 << 16
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}
# Not spaces for str.strip: byte order mark, zero-width space, joiners and word joiner.
_INVISIBLE = "\ufeff\u200b\u200c\u200d\u2060"
_QUOTE_AFTER_SPACE = {delimiter: re.compile(rf'{re.escape(delimiter)}[ \t]+"') for delimiter in _DELIMITERS}


@dataclass(frozen=True)
class Row:
    """The cells of a row by column. line: number of its first line in the file, from 1."""

    line: int
    cells: dict[str, str]


@dataclass(frozen=True)
class Table:
    """A table. `columns` are the names in the file's order."""

    path: Path
    columns: tuple[str, ...]
    rows: list[Row]


def stripped(text: str) -> str:
    """Return the text without spaces, non-breaking spaces and invisible characters at its ends."""
    while (shorter := text.strip().strip(_INVISIBLE)) != text:
        text = shorter
    return text


def read_header(path: Path, names: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the columns. Those among `names` may differ in case. Raises UserError."""
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_HEADER_BYTES).decode("utf-8-sig", "replace")
    except OSError as error:
        raise UserError(f"data {path} cannot be read: {error.strerror}") from error
    return _header(path, text, names)[1]


def read_table(
    path: Path, needed: Sequence[Sequence[str]], optional: Sequence[str] = (), *, texts: Sequence[str] = (), hint: str
) -> Table:
    """Read a table.

    Args:
        needed: alternative names of each column that the table must have. Upper and lower case of these and of the
            optional columns are equal. The table has them as they are here.
        texts: columns whose cells are kept as they are.
        hint: the first line of such a table, for errors.

    Raises:
        UserError: the file cannot be read, its first line lacks a column or names one twice, or a row has too few or
            too many cells. The message names the file and the line.
    """
    text = _decoded(path)
    delimiter, columns, num_changed = _header(path, text, [name for names in (*needed, optional) for name in names])
    for names in needed:
        if not any(name in columns for name in names):
            stand_ins.refuse(path)
            raise UserError(
                f"data {path} has no column {' or '.join(map(repr, names))}: its first line must name the columns, "
                f"e.g. {hint}"
            )
    if delimiter != ",":
        log.info("%s: the columns are separated by %s", path, _DELIMITERS[delimiter])
    kept = [name in texts for name in columns]
    is_path = [name in PATH_COLUMNS for name in columns]
    rows = []
    num_unnamed = columns.count("")
    for line, cells in _rows(path, text, delimiter):
        if line == 0:
            continue
        if len(cells) != len(columns):
            raise UserError(
                f"data {path}, line {line}: the header names {len(columns)} columns, the line has {len(cells)} cells"
            )
        clean = [
            cell if keep else stripped(cell) if path_like else unicodedata.normalize("NFC", stripped(cell))
            for cell, keep, path_like in zip(cells, kept, is_path, strict=True)
        ]
        num_changed += sum(new != old for new, old in zip(clean, cells, strict=True))
        rows.append(Row(line, {name: cell for name, cell in zip(columns, clean, strict=True) if name}))
    if num_changed:
        text = "%s: removed spaces around %d names and cells, or brought them to Unicode's form NFC"
        log.warning(text, path, num_changed)
    if num_unnamed:
        log.warning("%s: left out %d columns without a name", path, num_unnamed)
    return Table(path, tuple(filter(None, columns)), rows)


def _decoded(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"data {path} cannot be read: {error.strerror}") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        stand_ins.refuse(path)
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"data {path} is not a CSV file in UTF-8 (line {line}: {error.reason}); save it as UTF-8"
        ) from error


def _reader(text: str, delimiter: str) -> Any:
    # In `a.png, "red, plain"` the quotes count although they follow a space.
    spaced = _QUOTE_AFTER_SPACE[delimiter].search(text) is not None
    return csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=spaced, strict=True)


def _header(path: Path, text: str, names: Sequence[str]) -> tuple[str, tuple[str, ...], int]:
    """Return the separator, the names of the columns, and the number of names that were changed."""
    lower = {name.casefold(): name for name in names}
    best: tuple[int, str, tuple[str, ...], int] = (-1, ",", (), 0)
    for delimiter in _DELIMITERS:
        cells: list[str] = []
        with contextlib.suppress(csv.Error):
            cells = next(_reader(text, delimiter), [])
        columns = [unicodedata.normalize("NFC", stripped(cell)) for cell in cells]
        num_changed = sum(new != old for new, old in zip(columns, cells, strict=True))
        columns = [lower.get(name.casefold(), name) for name in columns]
        num_known = sum(name in names for name in columns)
        if num_known > best[0]:
            best = num_known, delimiter, tuple(columns), num_changed
    _, delimiter, header, num_changed = best
    if repeated := next((name for name in header if name and header.count(name) > 1), None):
        raise UserError(f"data {path}, line 1: two columns are named {repeated!r}; rename one of them")
    return delimiter, header, num_changed


def _rows(path: Path, text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield (number of the first line, cells) of the header, with number 0, and of each row that is not blank."""
    reader = _reader(text, delimiter)
    line = 1
    try:
        for number, cells in enumerate(reader):
            if number == 0:
                yield 0, cells
            elif any(map(stripped, cells)) or len(cells) > 1:
                yield line, cells
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"data {path} is not a CSV file in UTF-8 (line {line}: {error})") from error
