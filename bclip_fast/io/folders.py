"""List folders without the hidden files that editors, file managers and file servers leave in them."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from bclip_fast.errors import UserError

from .file_names import printable

log = logging.getLogger(__name__)

NUM_SHOWN = 20
_HIDDEN = frozenset(
    (
        "__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information",
        "@eadir", "#recycle",
    )
)  # fmt: skip


def is_hidden(name: str) -> bool:
    """Return whether a name is that of a hidden file or folder: `.DS_Store`, `.ipynb_checkpoints`, `Thumbs.db`."""
    return (name.startswith(".") and name not in (".", "..")) or name.casefold() in _HIDDEN


def is_hidden_path(path: str) -> bool:
    """Return whether a part of a path with `/`, as in an archive, is hidden."""
    return any(map(is_hidden, path.split("/")))


def shown(names: Sequence[str]) -> str:
    """Return the first names of a list for a message, printable."""
    return ", ".join(map(printable, names[:NUM_SHOWN])) + (", ..." if len(names) > NUM_SHOWN else "")


class Listing:
    """Lists folders at and below `root`. It leaves out hidden files and folders and links to folders, and counts them.

    Only names below `root` can be hidden: a hidden folder that the user names as the root is listed.
    """

    def __init__(self, root: Path) -> None:
        """root: folder that the names in the log start from."""
        self.root = root
        self._hidden: set[str] = set()
        self._links: set[str] = set()

    def walk(
        self, folder: Path | None = None, onerror: Callable[[OSError], object] | None = None
    ) -> Iterator[tuple[str, list[str], list[str]]]:
        """Yield (folder, names of its folders, names of its files), sorted, from `folder` or the root downwards.

        Links to folders are among the folders, but aren't followed. The caller may remove names of folders.

        Raises:
            UserError: a folder cannot be listed, and `onerror` is None.
        """
        for path, folders, files in os.walk(folder or self.root, onerror=onerror or _refuse):
            folders[:], files[:] = self._visible(path, folders), self._visible(path, files)
            yield path, folders, files

    def _visible(self, folder: str, names: list[str]) -> list[str]:
        hidden = [name for name in names if is_hidden(name)]
        self._hidden.update(os.path.relpath(os.path.join(folder, name), self.root) for name in hidden)
        return sorted(name for name in names if not is_hidden(name)) if hidden else sorted(names)

    def folders(self, folder: Path) -> list[str]:
        """Return the names of the folders in `folder`, with links to folders."""
        return next(self.walk(folder))[1]

    def files(self, folder: Path) -> list[Path]:
        """Return the files in `folder`."""
        path, _, names = next(self.walk(folder))
        return [Path(path, name) for name in names]

    def files_below(self, folder: Path) -> list[Path]:
        """Return the files in `folder` and below it, in the order of their paths."""
        files = []
        for path, folders, names in self.walk(folder):
            links = (os.path.join(path, name) for name in folders if os.path.islink(os.path.join(path, name)))
            self._links.update(os.path.relpath(link, self.root) for link in links)
            files += [os.path.join(path, name) for name in names]
        return [Path(file) for file in sorted(files, key=lambda file: file.split(os.sep))]

    def log(self) -> None:
        """Log the number of hidden files and folders, and of links to folders, that were left out."""
        if self._hidden:
            log.info("%s: left out %d hidden files and folders: %s", self.root, len(self._hidden), _shown(self._hidden))
        if self._links:
            log.warning("%s: left out %d links to folders: %s", self.root, len(self._links), _shown(self._links))


def _shown(names: set[str]) -> str:
    return shown(sorted(names))


def _refuse(error: OSError) -> None:
    raise UserError(f"folder {error.filename} cannot be listed: {error.strerror}") from error
