"""Write files and folders atomically: under a temporary name, which is renamed at the end."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path, *, sync: bool = False, shared: bool = False) -> Iterator[Path]:
    """Yield a temporary path next to `path` for the caller to write. Rename it to `path` when the block ends.

    After an exception, the temporary file is removed and `path` stays as it was. The parent folder is created.

    Args:
        sync: flush the file to disk before the rename.
        shared: give each process its own temporary name, so that several can write `path` at once. If False, the
            next write overwrites the temporary file of a killed process.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    owner = f".{os.getpid()}" if shared else ""
    partial = path.with_name(f".{path.name}{owner}.partial")
    try:
        yield partial
        if sync:
            sync_to_disk(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield a new empty folder beside `path`. Flush its files to disk and rename it to `path` when the block ends.

    A folder at `path` is removed just before the rename. After an exception the partial folder is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        yield partial
        for file in partial.iterdir():
            sync_to_disk(file)
        if path.exists():
            shutil.rmtree(path)
        os.replace(partial, path)
        sync_to_disk(path.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_bytes(path: Path, data: bytes, *, sync: bool = False) -> None:
    """Write a small file through `replacing`. Several processes may write it at once."""
    with replacing(path, sync=sync, shared=True) as partial:
        partial.write_bytes(data)


def write_text(path: Path, text: str, *, sync: bool = False) -> None:
    """Write the text, encoded as UTF-8, through `write_bytes`. A lone surrogate becomes a question mark."""
    write_bytes(path, text.encode(errors="replace"), sync=sync)


def sync_to_disk(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
