"""Folders are listed without hidden files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bclip_fast.errors import UserError
from bclip_fast.io.folders import Listing, is_hidden

HIDDEN = (
    ".DS_Store", "a/._x.jpg", "a/.ipynb_checkpoints/x-checkpoint.jpg", "a/b/.thumbnails/x.jpg", "__MACOSX/a/._x.jpg",
    "a/Thumbs.db", "a/@eaDir/x.jpg/SYNOPHOTO.jpg", "desktop.ini",
)  # fmt: skip


def test_listing_leaves_out_hidden_files_at_any_depth(tmp_path: Path, caplog) -> None:
    root = tmp_path / ".cache" / "data"  # a hidden folder above the root doesn't count
    for name in (*HIDDEN, "a/x.jpg", "a/b/y.jpg"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    (root / "linked").symlink_to(tmp_path)
    listing = Listing(root)
    assert [path.relative_to(root).as_posix() for path in listing.files_below(root)] == ["a/b/y.jpg", "a/x.jpg"]
    assert listing.folders(root) == ["a", "linked"]
    with caplog.at_level("INFO"):
        listing.log()
    assert f"left out {len(HIDDEN)} hidden files and folders: .DS_Store, __MACOSX, a/._x.jpg" in caplog.text
    assert "left out 1 links to folders: linked" in caplog.text
    hidden = root / "a" / ".ipynb_checkpoints"
    assert Listing(hidden).files_below(hidden) == [hidden / "x-checkpoint.jpg"]
    assert not is_hidden("..")


def test_listing_names_a_folder_that_cannot_be_listed(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "locked").mkdir()
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match="locked cannot be listed: Permission denied"):
        Listing(tmp_path).files_below(tmp_path)
