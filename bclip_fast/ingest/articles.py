"""Articles on disk: a tree of folders with `.tar`, `.tar.gz` and `.tgz` packages. `object_store` reads buckets.

In a tree or package, an article is an XML file with the images in its folder, or in subfolders without an XML file.
Packages are read without extracting them. Only a compressed package of more than 64 MiB passes through an unnamed
temporary file. The reader follows no link out of the tree, and checks the size of a file before reading it.
"""

from __future__ import annotations

import gzip
import io
import os
import stat
import tarfile
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

from .safe_xml import MAX_XML_BYTES

# In order of preference. PMC's GIFs are thumbnails of its full-size JPEGs.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".gif", ".webp", ".bmp")
XML_SUFFIXES = (".nxml", ".xml")
ARCHIVE_SUFFIXES = (".tar.gz", ".tgz", ".tar")
MAX_IMAGE_BYTES = 64 << 20
# Limit for a decompressed package, videos included. It also bounds the time that a decompression bomb takes.
MAX_ARCHIVE_BYTES = 16 << 30
MAX_ARCHIVE_MEMBERS = 1_000_000
_XMLS_PER_PACKAGE = 16
# Every unit reads all headers of its archive again, so a unit of an archive has more articles.
_XMLS_PER_ARCHIVE_UNIT = 256
_MAX_BYTES_IN_MEMORY = 64 << 20


class SourceError(ValueError):
    """A file or article is unusable. The message is the reason, in one line."""


class FetchError(Exception):
    """A network or server fault prevented a read. It says nothing about the article, so another attempt may succeed."""


@dataclass(frozen=True)
class Package:
    """A unit of work, as values that JSON can hold.

    Attributes:
        kind: "folder", "archive" or "objects".
        root: folder of the tree or mirror, or address of the store.
        name: folder or archive, relative to `root`. Empty for objects.
        items: XML files of a folder, or articles of a store.
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


def discover(root: Path) -> Iterator[Package]:
    """Yield all packages of the tree under `root`. Their order depends only on the names."""
    for folder, folders, names in os.walk(root):
        folders.sort()
        relative = Path(folder).relative_to(root).as_posix()
        prefix = "" if relative == "." else f"{relative}/"
        xml_names = sorted(prefix + name for name in names if name.lower().endswith(XML_SUFFIXES))
        for start in range(0, len(xml_names), _XMLS_PER_PACKAGE):
            items = tuple(xml_names[start : start + _XMLS_PER_PACKAGE])
            yield Package("folder", str(root), prefix.rstrip("/"), items)
        for name in sorted(names):
            if name.lower().endswith(ARCHIVE_SUFFIXES):
                count = _num_articles(Path(folder, name), root)
                for first in range(0, count, _XMLS_PER_ARCHIVE_UNIT) if count else (-1,):
                    yield Package("archive", str(root), prefix + name, first=first)


def _num_articles(path: Path, root: Path) -> int:
    """Return the number of articles of an archive that several units can read.

    0 for a compressed, broken or oversized archive: a single unit reads it.
    """
    try:
        with _open_regular_file(path, root) as file:
            stream = _BoundedStream(file, os.fstat(file.fileno()).st_size)
            with tarfile.open(fileobj=stream, mode="r:") as tar:
                count = 0
                for number, info in enumerate(tar):
                    count += info.name.lower().endswith(XML_SUFFIXES)
                    tar.members = []  # type: ignore[attr-defined]
                    if number > MAX_ARCHIVE_MEMBERS:
                        return 0
                return count
    except (tarfile.TarError, OSError, EOFError, SourceError):
        return 0


@contextmanager
def open_package(package: Package) -> Iterator[ArticleArchive]:
    """Open a folder or archive. Raises SourceError for an archive that is truncated, corrupt or too large."""
    if package.kind == "folder":
        yield _FolderArchive(package)
        return
    try:
        with _open_regular_file(Path(package.root, package.name), Path(package.root)) as file:
            is_compressed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            if not is_compressed:
                yield _TarArchive(_BoundedStream(file, os.fstat(file.fileno()).st_size), package)
                return
            with tempfile.SpooledTemporaryFile(_MAX_BYTES_IN_MEMORY) as content:
                _decompress(file, content)
                yield _TarArchive(_BoundedStream(content, MAX_ARCHIVE_BYTES), package)
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise SourceError(f"broken archive: {error}") from None


def _decompress(file: IO[bytes], content: IO[bytes]) -> None:
    """Decompress `file` into `content`, once. In a gzip stream, each seek backwards would start from its beginning."""
    total = 0
    with gzip.GzipFile(fileobj=file) as decompressed:
        while block := decompressed.read(1 << 20):
            total += len(block)
            if total > MAX_ARCHIVE_BYTES:
                raise SourceError(f"archive larger than {MAX_ARCHIVE_BYTES >> 30} GiB")
            content.write(block)
    content.seek(0)


def assign_images(xml_names: Iterable[str], image_names: Iterable[str]) -> dict[str, list[str]]:
    """Return the images of each folder that holds an XML file, as paths relative to that folder.

    An image belongs to the nearest such folder: its own, or the closest one above it.
    """
    folders: dict[str, list[str]] = {_folder_of(name): [] for name in xml_names}
    for name in image_names:
        nearest = _folder_of(name)
        while nearest and nearest not in folders:
            nearest = _folder_of(nearest[:-1])
        if nearest in folders:
            folders[nearest].append(name[len(nearest) :])
    return folders


def _folder_of(name: str) -> str:
    return name[: name.rfind("/") + 1]


def _open_regular_file(path: Path, root: Path) -> IO[bytes]:
    if not path.resolve().is_relative_to(root.resolve()):
        raise SourceError("link out of the source folder")
    # Without O_NONBLOCK, opening a pipe would wait until another process writes to it.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise SourceError("not a regular file")
    return os.fdopen(descriptor, "rb")


def _size_limit(name: str) -> int:
    return MAX_XML_BYTES if name.lower().endswith(XML_SUFFIXES) else MAX_IMAGE_BYTES


def _check_size(name: str, num_bytes: int) -> None:
    if num_bytes > _size_limit(name):
        raise SourceError(f"larger than {_size_limit(name) >> 20} MiB")


class _FolderArchive:
    def __init__(self, package: Package) -> None:
        self._root = Path(package.root)
        self._xml_names = package.items
        self.refused: list[tuple[str, str, str]] = []
        self._images: list[str] = []
        for folder, folders, names in os.walk(self._root / package.name):
            relative = Path(folder).relative_to(self._root).as_posix()
            prefix = "" if relative == "." else f"{relative}/"
            if relative != (package.name or ".") and any(name.lower().endswith(XML_SUFFIXES) for name in names):
                folders.clear()
                continue
            folders.sort()
            self._images += [prefix + name for name in sorted(names) if name.lower().endswith(IMAGE_SUFFIXES)]

    def articles(self) -> Iterable[ArticleFiles]:
        images = assign_images(self._xml_names, self._images)
        return [ArticleFiles(name, images[_folder_of(name)]) for name in self._xml_names]

    def read(self, name: str) -> bytes:
        return read_regular_file(self._root / name, self._root)


def read_regular_file(path: Path, root: Path) -> bytes:
    """Return the bytes of a regular file below `root`. Raises SourceError."""
    try:
        with _open_regular_file(path, root) as file:
            _check_size(path.name, os.fstat(file.fileno()).st_size)
            return file.read(_size_limit(path.name))
    except OSError as error:
        raise SourceError(f"cannot be read: {error.strerror}") from None


class _BoundedStream(io.RawIOBase):
    """A stream that stops tarfile from reading beyond the limits, no matter which sizes the headers claim."""

    def __init__(self, file: IO[bytes], num_bytes: int) -> None:
        self._file, self._num_bytes = file, num_bytes

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_IMAGE_BYTES:
            raise SourceError("broken archive: a header claims too many bytes")
        return self._file.read(size)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence != os.SEEK_SET or not 0 <= offset <= self._num_bytes:
            raise SourceError("broken archive: truncated")
        return self._file.seek(offset)

    def tell(self) -> int:
        return self._file.tell()


class _TarArchive:
    def __init__(self, file: _BoundedStream, package: Package) -> None:
        self.refused: list[tuple[str, str, str]] = []
        self._file, self._package = file, package
        # (offset, size) by name. If a name repeats, the last member counts, as for tar.
        self._members: dict[str, tuple[int, int]] = {}
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for number, info in enumerate(tar):
                if number >= MAX_ARCHIVE_MEMBERS:
                    raise SourceError(f"archive of more than {MAX_ARCHIVE_MEMBERS} files")
                self._add(info)
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every header in memory
        # An archive ends with a block of zeros. Without this check, a cut between two members would pass for the end.
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise SourceError("broken archive: truncated")
        if package.first > 0:
            self.refused.clear()  # the archive's first unit reports them

    def _add(self, info: tarfile.TarInfo) -> None:
        lower = info.name.lower()
        if info.isdir() or not lower.endswith(XML_SUFFIXES + IMAGE_SUFFIXES):
            return
        member = f"{self._package.name}/{info.name.removeprefix('./')}"
        if info.name.startswith("/") or ".." in info.name.split("/"):
            self.refused.append(("", member, "unsafe name in an archive"))
        elif not info.isreg() or info.issparse():
            self.refused.append(("", member, "not a regular file"))
        else:
            self._members[member] = info.offset_data, info.size

    def articles(self) -> Iterable[ArticleFiles]:
        xml_names = sorted(name for name in self._members if name.lower().endswith(XML_SUFFIXES))
        images = assign_images(xml_names, sorted(set(self._members) - set(xml_names)))
        if not xml_names:
            self.refused.append(("", self._package.name, "no article in the package"))
        first = self._package.first
        unit = xml_names[first : first + _XMLS_PER_ARCHIVE_UNIT] if first >= 0 else xml_names
        return [ArticleFiles(name, images[_folder_of(name)]) for name in unit]

    def read(self, name: str) -> bytes:
        offset, size = self._members[name]
        _check_size(name, size)
        self._file.seek(offset)
        data = self._file.read(size)
        if len(data) != size:
            raise SourceError("broken archive: truncated")
        return data
