"""Articles on disk: a tree of folders with `.tar`, `.tar.gz` and `.tgz` packages. `object_store` reads buckets.

In a tree or package, an article is an XML file with the images in its folder, or in subfolders without an XML file.
`tar_archives` reads packages. The reader follows no link to a folder and no link out of the tree, and checks the size
of a file before reading it. Every folder and archive that it doesn't read becomes a package of kind "unread", which
gives a reject with the reason.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

from bclip_fast.io import system
from bclip_fast.io.folders import Listing

from .image_formats import may_be_image
from .safe_xml import MAX_XML_BYTES

XML_SUFFIXES = (".nxml", ".xml")
ARCHIVE_SUFFIXES = (".tar.gz", ".tgz", ".tar")
# Archives that may hold articles, but aren't read.
UNREAD_SUFFIXES = (
    ".zip", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".7z", ".rar", ".nxml.gz", ".xml.gz", ".nxml.bz2",
    ".xml.bz2", ".nxml.xz", ".xml.xz",
)  # fmt: skip
MAX_IMAGE_BYTES = 64 << 20


class SourceError(ValueError):
    """A file or article is unusable. The message is the reason, in one line."""


class FetchError(Exception):
    """A network or server fault prevented a read. It says nothing about the article, so another attempt may succeed."""


@dataclass(frozen=True)
class Package:
    """A unit of work, as values that JSON can hold.

    Attributes:
        kind: "folder", "archive", "objects" or "unread".
        root: folder of the tree or mirror, or address of the store.
        name: folder or archive, relative to `root`. Empty for objects.
        items: XML files of a folder, articles of a store, or the reason of "unread".
        first: number of the unit's first article in an archive. -1: the unit has all articles.
    """

    kind: str
    root: str
    name: str
    items: tuple[str, ...] = ()
    first: int = 0


@dataclass(frozen=True)
class ArticleFiles:
    """The files of an article.

    Attributes:
        xml_name: path of the XML file, relative to the source's root.
        image_names: paths of the images, relative to the XML's folder.
        metadata: facts that the source states outside the XML: version, licence, retraction, citation.
    """

    xml_name: str
    image_names: list[str]
    metadata: dict[str, Any] = field(default_factory=dict)


class ArticleArchive(Protocol):
    """The contents of a package. Names are paths with `/`, relative to the source's root."""

    # Unusable entries: (article, name, reason). The list is complete once `articles` is exhausted.
    refused: list[tuple[str, str, str]]

    def articles(self) -> Iterable[ArticleFiles]:
        """Yield the articles of the package."""
        ...

    def read(self, name: str) -> bytes:
        """Return the bytes of a listed file. Raises SourceError or FetchError."""
        ...


def assign_images(xml_names: Iterable[str], image_names: Iterable[str]) -> dict[str, list[str]]:
    """Return the images of each folder that holds an XML file, as paths relative to that folder.

    An image belongs to the nearest such folder: its own, or the closest one above it.
    """
    folders: dict[str, list[str]] = {folder_of(name): [] for name in xml_names}
    for name in image_names:
        nearest = folder_of(name)
        while nearest and nearest not in folders:
            nearest = folder_of(nearest[:-1])
        if nearest in folders:
            folders[nearest].append(name[len(nearest) :])
    return folders


def folder_of(name: str) -> str:
    """Return the folder of a path, with the `/` at its end. Empty for a path without a folder."""
    return name[: name.rfind("/") + 1]


def open_regular_file(path: Path, root: Path) -> IO[bytes]:
    """Open a regular file below `root`. Raises SourceError, or OSError if the system refuses it."""
    if not path.resolve().is_relative_to(root.resolve()):
        raise SourceError("link out of the source folder")
    # Without O_NONBLOCK, opening a pipe would wait until another process writes to it.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | system.O_BINARY)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise SourceError("not a regular file")
    return os.fdopen(descriptor, "rb")


def _size_limit(name: str) -> int:
    return MAX_XML_BYTES if name.lower().endswith(XML_SUFFIXES) else MAX_IMAGE_BYTES


def check_size(name: str, num_bytes: int) -> None:
    """Raise SourceError if a file is larger than the limit for its kind."""
    if num_bytes > _size_limit(name):
        raise SourceError(f"larger than {_size_limit(name) >> 20} MiB")


class FolderArchive:
    """The articles of a folder, which `package` lists, and the images in it and below it."""

    refused: list[tuple[str, str, str]]

    def __init__(self, package: Package) -> None:
        self._root = Path(package.root)
        self._xml_names = package.items
        self.refused = []
        self._images: list[str] = []
        # `discover` has logged the hidden files, and named the folders that cannot be listed.
        for folder, folders, names in Listing(self._root).walk(self._root / package.name, onerror=_ignore):
            relative = Path(folder).relative_to(self._root).as_posix()
            prefix = "" if relative == "." else f"{relative}/"
            if relative != (package.name or ".") and any(name.lower().endswith(XML_SUFFIXES) for name in names):
                folders.clear()
                continue
            self._images += [prefix + name for name in names if may_be_image(name)]

    def articles(self) -> Iterable[ArticleFiles]:
        """Yield the articles of the package."""
        images = assign_images(self._xml_names, self._images)
        return [ArticleFiles(name, images[folder_of(name)]) for name in self._xml_names]

    def read(self, name: str) -> bytes:
        """Return the bytes of a file. Raises SourceError."""
        return read_regular_file(self._root / name, self._root)


def _ignore(error: OSError) -> None:
    """Skip a folder that cannot be listed."""


def read_regular_file(path: Path, root: Path) -> bytes:
    """Return the bytes of a regular file below `root`. Raises SourceError."""
    try:
        with open_regular_file(path, root) as file:
            check_size(path.name, os.fstat(file.fileno()).st_size)
            return file.read(_size_limit(path.name))
    except OSError as error:
        raise SourceError(f"cannot be read: {error.strerror}") from None
