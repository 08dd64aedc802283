"""CSV files that people write: spaces, separators, encodings, and rows of the wrong length."""

from __future__ import annotations

from pathlib import Path

import pytest

from bclip_fast.errors import UserError
from bclip_fast.io.tables import Table, read_table


def read(path: Path, content: str | bytes) -> Table:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_table(path, (("path", "image"),), ("caption", "split"), texts=("caption",), hint="path,label")


@pytest.mark.parametrize(
    ("content", "num_changed"),
    [
        ("path,label\na.png,cat\n", 0),
        ("path, label\na.png,cat \n", 2),
        ("\ufeffpath,label\r\na.png,cat\r\n", 0),
        ("Path;label\na.png;cat\n", 0),
        ("path\tlabel\na.png\tcat\n", 0),
        ("path,label\n\ufeffa.png,\xa0cat\u200b\n", 2),
        ('path, "label"\n"a.png", "cat"\n', 0),
        ('"path","label"\n\n"a.png","cat"\n', 0),
    ],
)
def test_read_table_gives_clean_cells(tmp_path: Path, caplog, content: str, num_changed: int) -> None:
    table = read(tmp_path / "t.csv", content)
    assert table.columns == ("path", "label")
    assert [row.cells for row in table.rows] == [{"path": "a.png", "label": "cat"}]
    assert (f"removed spaces around {num_changed} names and cells" in caplog.text) == bool(num_changed)


def test_read_table_keeps_texts_and_composes_labels(tmp_path: Path) -> None:
    table = read(tmp_path / "t.csv", "path,caption,o\u0308\na\u0308.png, two  words ,u\u0308\n")
    assert table.columns == ("path", "caption", "ö")
    assert table.rows[0].cells == {"path": "a\u0308.png", "caption": " two  words ", "ö": "ü"}
    table = read(tmp_path / "t.csv", ",path,label\n0,a.png,cat\n")
    assert table.columns == ("path", "label")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("path,label\na.png,x\nb.png\n", "t.csv, line 3: the header names 2 columns, the line has 1 cells"),
        ("path,label\na.png,x\n\nb.png,y,z\n", "t.csv, line 4: the header names 2 columns, the line has 3 cells"),
        ('path,caption\na.png,"two\nlines"\nb.png\n', "t.csv, line 4: "),
        ("path,label, label\na.png,x,y\n", "t.csv, line 1: two columns are named 'label'"),
        ("Path,path\na.png,x\n", "two columns are named 'path'"),
        ("name,label\na.png,x\n", "no column 'path' or 'image': its first line must name the columns, e.g. path,label"),
        ('path,label\na.png,x\n"b.png,y\n', r"t.csv is not a CSV file in UTF-8 \(line 3: "),
        ("path,label\na.png,x\nb.png,é\n".encode("latin-1"), r"t.csv is not a CSV file in UTF-8 \(line 3: "),
        ("path,label\n".encode("utf-16"), r"not a CSV file in UTF-8 \(line 1: .*save it as UTF-8"),
    ],
)
def test_read_table_errors_name_file_and_line(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path / "t.csv", content)
    assert "\n" not in str(caught.value)
