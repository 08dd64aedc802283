"""Several writers of one path, files that a killed process left, and file systems without locks or exchanges."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import types
from pathlib import Path

import pytest

from bclip_fast.errors import UserError
from bclip_fast.io.atomic import replacing, replacing_files, replacing_folder, settle, write_text


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("has_locks", [True, False])
def test_replacing_two_writers_have_separate_files(
    tmp_path: Path, has_locks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second writer is in the same process, and even the same thread: each call has its own lock."""
    if not has_locks:
        monkeypatch.setattr(fcntl, "flock", fail_without_locks)
        monkeypatch.setattr("threading.get_native_id", iter(range(9)).__next__)
    path = tmp_path / "file"
    with replacing(path) as first:
        first.write_text("first")
        with replacing(path) as second:
            assert second != first
            second.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first"
    assert names(tmp_path) == ["file"]


def fail_without_locks(*_: object) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def test_replacing_takes_over_what_a_killed_process_left(tmp_path: Path) -> None:
    (tmp_path / ".file.partial/deep").mkdir(parents=True)
    (tmp_path / ".file.partial/deep/half").write_text("hal")
    write_text(tmp_path / "file", "new")
    assert names(tmp_path) == ["file"]


def test_failed_write_names_the_path_not_the_temporary_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for problem in (OSError(errno.ENOSPC, "full"), OSError(errno.ENOSPC, "full", str(tmp_path / ".file.partial/file"))):
        with pytest.raises(OSError, match=rf"No space left on device: '{path}'$"), replacing(path):
            raise problem
    # Another file, such as the input of the write.
    with pytest.raises(OSError, match="input"), replacing(path):
        raise OSError(errno.EIO, "bad", "input")


@pytest.mark.parametrize("can_exchange", [True, False])
def test_replacing_folder_takes_the_old_ones_place(
    tmp_path: Path, can_exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not can_exchange:
        monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: types.SimpleNamespace())
    for text in ("old", "new"):
        with replacing_folder(tmp_path / "folder") as partial:
            write_text(partial / text, text)
    assert names(tmp_path) == ["folder", "folder/new"]


def test_replacing_files_exception_keeps_all_old_files(tmp_path: Path) -> None:
    write_text(tmp_path / "kept", "kept")
    with replacing_files(tmp_path) as partial:
        write_text(partial / "deep/file", "old")
    with pytest.raises(OSError, match="exists|directory"):
        write_new_files(tmp_path)
    assert names(tmp_path) == ["deep", "deep/file", "kept"]
    assert (tmp_path / "deep/file").read_text() == "old"


def write_new_files(folder: Path) -> None:
    with replacing_files(folder) as partial:
        write_text(partial / "deep/file", "new")
        write_text(partial / "deep/file/below", "new")


def test_settle_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "folder"
    outside.mkdir()
    write_text(folder / ".files.written/deep/file", "malicious")
    (folder / "deep").symlink_to(outside)
    with pytest.raises(UserError, match="deep is a link"):
        settle(folder)
    assert names(outside) == []
    write_text(outside / "file", "kept")
    other = tmp_path / "other"
    other.mkdir()
    (other / ".files.written").symlink_to(outside)
    with pytest.raises(UserError, match="is a link"):
        settle(other)
    assert names(outside) == ["file"]
