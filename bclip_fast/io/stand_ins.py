"""Files that stand in for another file: pointers of git-lfs and Xet, web pages, empty and unfinished files.

Their names promise weights, an image or a table, so a parser reports a broken file. The true reason has a remedy.
"""

from __future__ import annotations

import re
from pathlib import Path

from bclip_fast.errors import UserError

NUM_BYTES = 512
"""Number of bytes from which `describe` recognises a stand-in. Pointers are shorter."""

_PAGE = re.compile(rb"(\xef\xbb\xbf)?\s*(<!--.*?-->\s*)*<(!doctype\s+html|html|head)\b", re.IGNORECASE | re.DOTALL)
_STORAGE_ERROR = re.compile(rb"\s*(<\?xml[^>]*\?>)?\s*<Error>\s*<Code>")
_HUB_FOLDER = ".cache/huggingface/download"
# Browsers, curl, aria2 and the hub's client append these to the name of a file that isn't complete.
_UNFINISHED = (".incomplete", ".part", ".partial", ".crdownload", ".download", ".aria2", ".tmp")


def describe(start: bytes) -> str | None:
    """The reason why a file with these first bytes is only a stand-in, and its remedy. None if it isn't one."""
    if not start.strip(b"\0 \t\r\n"):
        return "is empty or holds only zeros, as after an interrupted copy: copy or download it again"
    if start.startswith((b"version https://git-lfs.github.com/spec/", b"version https://hawser.github.com/spec/")):
        return "is a git-lfs pointer, not the file: run git lfs pull"
    if start.startswith(b"# xet version"):
        return "is a Xet pointer, not the file: run git xet checkout, or download the file with hf download"
    if _PAGE.match(start):
        return "is a web page, not the file: the server answered with a page; log in and download it again"
    if _STORAGE_ERROR.match(start):
        return "is the error message of a storage server, not the file: download it again"
    return None


def of_file(path: Path) -> str | None:
    """`describe` of a file. None for a file that can't be read."""
    try:
        with path.open("rb") as file:
            return describe(file.read(NUM_BYTES))
    except OSError:
        return None


def refuse(path: Path) -> None:
    """Raise UserError if the file is a stand-in. Call it where a parser has refused the file."""
    if reason := of_file(path):
        raise UserError(f"{path} {reason}")


def unfinished(folder: Path, name: str) -> Path | None:
    """A download of the file `name` into `folder` that isn't complete. The hub's client hides the name."""
    candidates = [folder / f"{name}{suffix}" for suffix in _UNFINISHED]
    candidates += sorted((folder / _HUB_FOLDER).rglob("*.incomplete"))
    return next((path for path in candidates if path.is_file()), None)
