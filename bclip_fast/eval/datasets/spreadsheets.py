"""Tables of labels as CSV or XLSX files."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bclip_fast.errors import UserError, first_line
from bclip_fast.io import stand_ins
from bclip_fast.io.tables import SUFFIXES, Row, Table, read_table, stripped

TABLE_SUFFIXES = (*SUFFIXES, ".xlsx")
_MAX_BYTES = 64 << 20
# A sheet of a few kilobytes can state places far apart, between which openpyxl returns empty rows and cells.
_MAX_ROWS, _MAX_CELLS = 1 << 20, 1 << 22


def read_any_table(path: Path, needed: Sequence[Sequence[str]], *, hint: str) -> Table:
    """Read a table as `read_table` does, also the first sheet of an XLSX file. Raises UserError as it does.

    needed: alternative names of each column. hint: the first line of such a table, for errors.
    """
    if path.suffix.lower() != ".xlsx":
        return read_table(path, needed, hint=hint)
    rows = _read_sheet(path)
    names = {name.casefold(): name for alternatives in needed for name in alternatives}
    columns = [names.get(cell.casefold(), cell) for cell in rows[0]] if rows else []
    for alternatives in needed:
        if not any(name in columns for name in alternatives):
            raise UserError(
                f"data {path} has no column {' or '.join(map(repr, alternatives))}: the first row of its first sheet "
                f"must name the columns, e.g. {hint}"
            )
    if repeated := next((name for name in columns if name and columns.count(name) > 1), None):
        raise UserError(f"data {path}, row 1: two columns are named {repeated!r}; rename one of them")
    table = []
    for line, cells in enumerate(rows[1:], 2):
        if any(cells):
            padded = [*cells, *[""] * (len(columns) - len(cells))]
            table.append(Row(line, {name: cell for name, cell in zip(columns, padded, strict=False) if name}))
    return Table(path, tuple(filter(None, columns)), table)


def _read_sheet(path: Path) -> list[list[str]]:
    """Return the cells of the first sheet as text."""
    from openpyxl import load_workbook

    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if sum(member.file_size for member in members) > _MAX_BYTES:
                raise UserError(f"data {path} unpacks to more than {_MAX_BYTES >> 20} MiB; save the sheet as .csv")
            for member in members:
                # Without its zero bytes, the document type of a part in UTF-16 is found too.
                if b"<!DOCTYPE" in archive.read(member).replace(b"\0", b""):
                    raise UserError(f"data {path} holds a document type, which no spreadsheet needs; save it as .csv")
        workbook = load_workbook(path, read_only=True, data_only=True)
        try:
            return _rows(workbook.worksheets[0], path)
        finally:
            workbook.close()
    except UserError:
        raise
    except Exception as error:  # openpyxl passes on the exceptions of its parts
        stand_ins.refuse(path)
        raise UserError(f"data {path} is not an XLSX file ({first_line(error)}); save it again, or as .csv") from error


def _rows(sheet: Any, path: Path) -> list[list[str]]:
    """Return the rows of a sheet without the empty cells at their ends. Raises UserError if they are too many."""
    sheet.reset_dimensions()  # openpyxl would fill each row up to the size that the file states
    rows, num_cells = [], 0
    for row in sheet.iter_rows(values_only=True):
        cells = [_text(value) for value in row]
        while cells and not cells[-1]:
            cells.pop()
        rows.append(cells)
        num_cells += len(cells)
        if len(rows) > _MAX_ROWS or num_cells > _MAX_CELLS:
            raise UserError(
                f"data {path} has more than {_MAX_ROWS:,} rows or {_MAX_CELLS:,} cells; save its rows alone as .csv"
            )
    return rows


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return stripped(str(value))
