"""Write files and folders atomically: under a temporary name, which is renamed at the end.

A failure raises OSError with the reason and the path that was to be written, whichever library found it. After a
failure or an exception, the old files are unchanged and the temporary ones are removed. A killed process leaves its
temporary files. The next write of the same path takes them over.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import os
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

from bclip_fast.errors import UserError

from . import system

# File systems that have no locks, or cannot swap two names, answer with these.
_UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)
_RENAME_EXCHANGE, _AT_FDCWD = 2, -100
_FINISHED = ".files.written"
# How Rust names an error of the system.
_SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")


@contextlib.contextmanager
def replacing(path: Path, *, sync: bool = False) -> Iterator[Path]:
    """Yield a temporary path next to `path` for the caller to write. Rename it to `path` when the block ends.

    Several processes and threads may write `path` at once. The parent folder is created.

    Args:
        sync: flush the file to disk before the rename.
    """
    with explained(path), _temporary_folder(path) as folder:
        # In a folder, because libraries write under further temporary names beside the file.
        partial = folder / f".{path.name}.partial"
        yield partial
        if sync:
            sync_to_disk(partial)
        os.replace(partial, path)


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield a new empty folder beside `path`. Flush its files to disk and rename it to `path` when the block ends.

    It takes the place of a folder at `path` in one step, and the old folder is then removed.
    """
    with explained(path), _temporary_folder(path) as folder:
        yield folder
        for file in folder.rglob("*"):
            if file.is_file():
                sync_to_disk(file)
        put_in_place(folder, path)
        shutil.rmtree(folder, ignore_errors=True)  # the old one
        sync_to_disk(path.parent)


@contextlib.contextmanager
def replacing_files(folder: Path) -> Iterator[Path]:
    """Yield a new empty folder. When the block ends, its files take the places of those in `folder`, all or none.

    Other files in `folder` stay. Subfolders may be used. If the process is killed between two of the final renames,
    the next reader or writer makes the others (`settle`).
    """
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with _temporary_folder(folder / ".files") as partial:
            yield partial
            settle(folder)
            os.rename(partial, folder / _FINISHED)
        settle(folder)


def settle(folder: Path) -> None:
    """Move the files that a killed process had finished with `replacing_files` into place. Readers call this first.

    Raises:
        UserError: the files cannot be moved, or a link leads out of the folder.
    """
    finished = folder / _FINISHED
    if not finished.is_dir():
        return
    if finished.is_symlink():
        raise UserError(f"{finished} is a link, so its files belong to another folder; delete the link")
    try:
        # os.walk ignores folders that another process has just removed.
        for place, _, names in os.walk(finished):
            target = folder / Path(place).relative_to(finished)
            target.mkdir(parents=True, exist_ok=True)
            if target.resolve() != folder.resolve() / target.relative_to(folder):
                raise UserError(f"{target} is a link, so it cannot take the files of {place}; delete one of them")
            for name in sorted(names):
                with contextlib.suppress(FileNotFoundError):
                    os.replace(Path(place) / name, target / name)
        shutil.rmtree(finished, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"{finished} holds files of a killed process that cannot be moved to {folder}: {error.strerror}; make the "
            "folder writable"
        ) from error


def put_in_place(folder: Path, path: Path) -> None:
    """Rename a folder to `path`. A folder at `path` then has the name `folder`, if it was not empty."""
    if not path.is_dir() or not any(path.iterdir()):
        if path.is_dir() and os.name == "nt":  # there, no folder replaces another
            path.rmdir()
        os.replace(folder, path)
        return
    try:
        swap = system.c_library().renameat2
    except AttributeError:
        problem = errno.ENOSYS
    else:
        places = _AT_FDCWD, os.fsencode(folder), _AT_FDCWD, os.fsencode(path)
        problem = ctypes.get_errno() if swap(*places, _RENAME_EXCHANGE) else 0
    if problem in _UNSUPPORTED:
        old = path.with_name(f".{path.name}.old")
        os.rename(path, old)
        os.rename(folder, path)
        os.rename(old, folder)
    elif problem:
        raise OSError(problem, os.strerror(problem), str(path))


def write_bytes(path: Path, data: bytes, *, sync: bool = False) -> None:
    """Write a small file through `replacing`."""
    with replacing(path, sync=sync) as partial:
        partial.write_bytes(data)


def write_text(path: Path, text: str, *, sync: bool = False) -> None:
    """Write the text, encoded as UTF-8, through `write_bytes`. A lone surrogate becomes a question mark."""
    write_bytes(path, text.encode(errors="replace"), sync=sync)


def sync_to_disk(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    if not system.HAS_FOLDER_DESCRIPTORS and path.is_dir():
        return
    # Windows flushes only files that are open for writing.
    descriptor = os.open(path, os.O_RDONLY if system.HAS_FOLDER_DESCRIPTORS else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _temporary_folder(path: Path) -> Iterator[Path]:
    """Yield a new empty folder for the files of `path`, and remove it at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder, descriptor = _claim(path)
    try:
        _empty(folder)
        yield folder
    finally:
        if descriptor is None or _is_at(descriptor, folder):  # it was not renamed
            shutil.rmtree(folder, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def _claim(path: Path) -> tuple[Path, int | None]:
    """Create and lock the temporary folder of `path`, or take over that of a killed process. The lock ends with us.

    The names are numbered, so that several writers of `path` have different ones. In a file system without locks, the
    names hold the numbers of process and thread. So do they on Windows, where folders have no descriptor (None).
    """
    name, has_locks = path.name.removeprefix("."), system.HAS_FOLDER_DESCRIPTORS
    for number in itertools.count(1):
        label = (f".{number}" if number > 1 else "") if has_locks else f".{os.getpid()}-{threading.get_native_id()}"
        folder = path.with_name(f".{name}{label}.partial")
        folder.mkdir(exist_ok=True)
        if not system.HAS_FOLDER_DESCRIPTORS:
            return folder, None
        try:
            descriptor = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # another writer has just removed it
            continue
        try:
            if has_locks:
                system.lock(descriptor, wait=False)
            if _is_at(descriptor, folder):
                return folder, descriptor
        except BlockingIOError:  # another writer has it
            pass
        except OSError as error:
            has_locks = error.errno not in _UNSUPPORTED
            if has_locks:
                os.close(descriptor)
                raise
            with contextlib.suppress(OSError):
                folder.rmdir()
        os.close(descriptor)
    raise AssertionError


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn a failed write into an OSError that names `path`. Libraries have other classes, and see temporary names."""
    try:
        yield
    except OSError as error:
        is_temporary = error.filename is None or ".partial" in str(error.filename)
        if error.errno is None or not is_temporary:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
    except Exception as error:
        found = _SYSTEM_ERROR.search(str(error)) if type(error).__name__ == "SafetensorError" else None
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error
