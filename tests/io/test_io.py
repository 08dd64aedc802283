"""Atomic writes, hashes, JSON lines, run folders and progress bars."""

from __future__ import annotations

import hashlib
import math
import sys
import unicodedata
from pathlib import Path

import pytest

from bclip_fast.errors import UserError
from bclip_fast.io import progress, runs
from bclip_fast.io.atomic import replacing, replacing_folder, write_bytes, write_text
from bclip_fast.io.file_names import file_name, file_names
from bclip_fast.io.hashing import md5_of, sha256, sha256_of_file, sha256_of_parts
from bclip_fast.io.jsonl import JsonLinesWriter, read_lines, truncate_after_step
from bclip_fast.io.progress import track


def write_and_fail(path: Path) -> None:
    with replacing(path) as partial:
        partial.write_text("new")
        raise RuntimeError


def test_replacing_exception_keeps_the_old_file(tmp_path: Path):
    path = tmp_path / "folder/file"
    write_bytes(path, b"old")
    with pytest.raises(RuntimeError):
        write_and_fail(path)
    assert path.read_bytes() == b"old"
    with replacing(path, sync=True) as partial:
        partial.write_text("new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert list(path.parent.iterdir()) == [path]


def test_write_text_lone_surrogate_becomes_question_mark(tmp_path: Path):
    write_text(tmp_path / "file", "a\ud800\u00e9")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "a?\u00e9"


def write_folder_and_fail(path: Path) -> None:
    with replacing_folder(path) as partial:
        (partial / "file").write_text("new")
        raise RuntimeError


def test_replacing_folder_replaces_it_only_without_exception(tmp_path: Path):
    path = tmp_path / "folder"
    for text in ("old", "new"):
        with replacing_folder(path) as partial:
            (partial / text).write_text(text)
    assert [file.name for file in path.iterdir()] == ["new"]
    with pytest.raises(RuntimeError):
        write_folder_and_fail(path)
    assert [file.name for file in path.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [path]


def test_hashes_equal_those_of_hashlib(tmp_path: Path):
    data = bytes(range(256)) * 9000
    (tmp_path / "file").write_bytes(data)
    expected = hashlib.sha256(data).hexdigest()
    assert sha256(data) == sha256_of_parts([data[:1000], memoryview(data)[1000:]]) == expected
    assert sha256_of_file(tmp_path / "file") == expected
    assert sha256("\u00e9") == hashlib.sha256("\u00e9".encode()).hexdigest()
    assert md5_of(data) == hashlib.md5(data).hexdigest()


def test_json_lines_are_written_and_truncated(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = tmp_path / "lines.jsonl"
    truncate_after_step(path, 1)  # a missing file is fine
    writer = JsonLinesWriter(path)
    for step in range(4):
        writer.write({"step": step})
    writer.close()
    with path.open("a") as file:
        file.write('{"step": "1"}\n{"loss": 1}\n{"step": 1')
    truncate_after_step(path, 1)
    assert read_lines(path) == [{"step": 0}, {"step": 1}]
    assert caplog.text.count("incomplete or foreign line") == 3
    writer.write({"step": 2})
    writer.close()
    assert len(read_lines(path)) == 3


def test_read_metrics_skips_only_an_incomplete_last_line(tmp_path: Path):
    path = tmp_path / runs.METRICS
    path.write_text('{"step": 1}\n[2]\n{"step": 3')
    assert runs.read_metrics(path) == [{"step": 1}]
    path.write_text('{"step": 1\n{"step": 2}\n')
    with pytest.raises(UserError, match="line 1: not JSON"):
        runs.read_metrics(path)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("batch_size = 1024", (math.log(1024), "chance, ln 1,024")),
        ("batch_size = 1", None),
        ("batch_size = 'x'", None),
        ("", None),
        ("not toml", None),
    ],
)
def test_chance_loss_needs_a_batch_size(tmp_path: Path, config: str, expected: tuple[float, str] | None):
    (tmp_path / "config.toml").write_text(config)
    assert runs.chance_loss(tmp_path) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [(1, True), (0.5, True), (math.inf, False), (math.nan, False), (True, False), ("1", False), (None, False)],
)
def test_is_finite(value: object, expected: bool):
    assert runs.is_finite(value) is expected


@pytest.mark.parametrize("total", [3, None])
def test_track_counts_items_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, total: int | None
):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with track("items", total) as advance:
        advance(2)
        advance()
    output = capsys.readouterr()
    assert output.out == ""
    assert "items" in output.err
    assert "3" in output.err and "/s" in output.err


@pytest.mark.parametrize(("total", "rest"), [(4, " of 4, "), (None, ", ")])
def test_track_logs_number_and_rate_without_a_terminal(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, total: int | None, rest: str
):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr(progress.time, "monotonic", iter([10.0, 11.0, 12.0]).__next__)
    with caplog.at_level("INFO"), track("items", total) as advance:
        advance(2)
        advance(1, "rows")
    left = [", 0:00:01 left", ", 0:00:01 left"] if total else ["", ""]
    start = ["items: 4"] if total else []
    assert caplog.messages == [*start, f"items: 2{rest}2/s{left[0]}", f"rows: 3{rest}1.5/s{left[1]}"]


def test_track_hidden_prints_nothing(capsys: pytest.CaptureFixture[str]):
    with track("items", 3, show=False) as advance:
        advance(3)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "names",
    [
        ("病变", "部位"),
        ("", "-", "...", "/", "\u2603", "\u2604"),
        ("Cat", "cat", "CAT"),
        ("a b", "a/b", "a-b", "../a/b", "a\0b", "a\nb"),
        ("\u00e9", "e\u0301", "E\u0301", "\u212b", "\u00c5"),
        ("\udcff", "\udcfe", "ﬁ", "fi"),
        (*("x" * length for length in (100, 121, 255, 256, 4096)), "医" * 100, "医" * 101),
        ("con", "CON.csv", "lpt1", "nul"),
        ("cat", "cat-77af778b51ab", f"cat-{sha256('Cat')[:12]}", "Cat"),
    ],
)
def test_file_names_differ_on_every_file_system(names: tuple[str, ...], tmp_path: Path) -> None:
    result = file_names(names)
    assert list(result) == list(names)
    folded = {unicodedata.normalize("NFKC", name).casefold() for name in result.values()}
    assert len(folded) == len(names)
    for name in result.values():
        (tmp_path / f"{name}.csv").write_text("")
        assert name.partition(".")[0].lower() not in ("con", "lpt1", "nul")
    assert len(list(tmp_path.iterdir())) == len(names)
    assert file_names(names) == result


def test_file_name_of_readable_text_stays_readable() -> None:
    readable = {
        "zero_shot/colour": "zero_shot-colour",
        "hf-hub:ORG/NAME": "hf-hub-ORG-NAME",
        "runs/x_1.5": "runs-x_1.5",
    }
    assert {name: file_name(name) for name in readable} == readable
    assert file_names(readable) == readable
