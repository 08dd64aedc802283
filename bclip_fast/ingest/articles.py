"""Where articles come from: a tree of folders with `.tar`, `.tar.gz`, `.tgz` packages, or an object store (`objects`).

In a tree or package an article is an XML file with the images in its folder and in those subfolders that hold no XML of
their own. Nothing of a package is extracted (a compressed one of more than 64 MiB passes through an unnamed temporary
file), links are not followed out of the tree, and sizes are checked before bytes are read.
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

# In order of preference: PMC's JPEGs are full size and its GIFs thumbnails of them.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".gif", ".webp", ".bmp")
XML_SUFFIXES = (".nxml", ".xml")
ARCHIVE_SUFFIXES = (".tar.gz", ".tgz", ".tar")
MAX_IMAGE_BYTES = 64 << 20
# A compressed package with its videos, unpacked; also what a decompression bomb may cost in time.
MAX_ARCHIVE_BYTES = 16 << 30
MAX_ARCHIVE_MEMBERS = 1_000_000
_XMLS_PER_PACKAGE = 16
# The headers of an archive are read again for each of its units.
_XMLS_PER_ARCHIVE_UNIT = 256
_MAX_UNPACKED_IN_MEMORY = 64 << 20


class SourceError(ValueError):
    """Something cannot be read; the message is the reason, in one line."""


class FetchError(Exception):
    """Something could not be read this time (network, server): to be tried again, and no fact about the article."""


@dataclass(frozen=True)
class Package:
    """A unit of work, in plain values. `kind`: folder (`items` are some of its XML files), archive (its articles from
    `first` on; -1: all), or objects (`items` are articles, `root` the address of the store or the folder of a mirror).
    """

    kind: str
    root: str
    name: str
    items: tuple[str, ...] = ()
    first: int = 0


@dataclass(frozen=True)
class ArticleFiles:
    """An article as a source knows it: images relative to the folder of the XML; `about`: what it says beside the XML
    (version, licence, retraction, citation)."""

    xml_name: str
    image_names: list[str]
    about: dict[str, Any] = field(default_factory=dict)


class Files(Protocol):
    """The contents of a package: names are paths with `/`, relative to the root of the source."""

    # What is there but unusable: (article, name, reason); complete once `articles` is exhausted.
    refused: list[tuple[str, str, str]]

    def articles(self) -> Iterable[ArticleFiles]: ...

    def read(self, name: str) -> bytes:
        """The bytes of a file that was listed. Raises SourceError, FetchError."""
        ...


def discover(root: Path) -> Iterator[Package]:
    """All packages of the tree under `root`, in an order that depends on the names alone."""
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
                number = _num_articles(Path(folder, name), root)
                for first in range(0, number, _XMLS_PER_ARCHIVE_UNIT) if number else (-1,):
                    yield Package("archive", str(root), prefix + name, first=first)


def _num_articles(path: Path, root: Path) -> int:
    """Of an archive that several units can read; 0 for a compressed or broken one, which a single unit deals with."""
    try:
        with _open_regular(path, root) as file:
            tar = tarfile.open(fileobj=_Bounded(file, os.fstat(file.fileno()).st_size), mode="r:")
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
def open_package(package: Package) -> Iterator[Files]:
    """The contents of a folder or archive. Raises SourceError: an archive that is truncated, corrupt or too large."""
    if package.kind == "folder":
        yield _Folder(package)
        return
    try:
        with _open_regular(Path(package.root, package.name), Path(package.root)) as file:
            compressed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            if not compressed:
                yield _Archive(_Bounded(file, os.fstat(file.fileno()).st_size), package)
                return
            with tempfile.SpooledTemporaryFile(_MAX_UNPACKED_IN_MEMORY) as content:
                _unpack(file, content)
                yield _Archive(_Bounded(content, MAX_ARCHIVE_BYTES), package)
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise SourceError(f"broken archive: {error}") from None


def _unpack(file: IO[bytes], content: IO[bytes]) -> None:
    """Decompressed once: a seek backwards in a gzip stream would start it again from its beginning."""
    total = 0
    with gzip.GzipFile(fileobj=file) as unzipped:
        while block := unzipped.read(1 << 20):
            total += len(block)
            if total > MAX_ARCHIVE_BYTES:
                raise SourceError(f"archive larger than {MAX_ARCHIVE_BYTES >> 30} GiB")
            content.write(block)
    content.seek(0)


def assign_images(xml_names: Iterable[str], image_names: Iterable[str]) -> dict[str, list[str]]:
    """Images by the folder of the XML they belong to, relative to it: beside it or deeper, unless one is nearer."""
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


def _open_regular(path: Path, root: Path) -> IO[bytes]:
    if not path.resolve().is_relative_to(root.resolve()):
        raise SourceError("link out of the source folder")
    # Without O_NONBLOCK, opening a pipe would wait for ever.
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise SourceError("not a regular file")
    return os.fdopen(number, "rb")


def _limit(name: str) -> int:
    return MAX_XML_BYTES if name.lower().endswith(XML_SUFFIXES) else MAX_IMAGE_BYTES


def _check_size(name: str, num_bytes: int) -> None:
    if num_bytes > _limit(name):
        raise SourceError(f"larger than {_limit(name) >> 20} MiB")


class _Folder:
    def __init__(self, package: Package) -> None:
        self._root = Path(package.root)
        self._xml_names = package.items
        self.refused: list[tuple[str, str, str]] = []
        self._images: list[str] = []
        folder_of_package = self._root / package.name
        for folder, folders, names in os.walk(folder_of_package):
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
        return read_regular(self._root / name, self._root)


def read_regular(path: Path, root: Path) -> bytes:
    """The bytes of a plain file below `root`. Raises SourceError."""
    try:
        with _open_regular(path, root) as file:
            _check_size(path.name, os.fstat(file.fileno()).st_size)
            return file.read(_limit(path.name))
    except OSError as error:
        raise SourceError(f"cannot be read: {error.strerror}") from None


class _Bounded(io.RawIOBase):
    """A stream that tarfile may not make us read beyond the limits, whatever sizes the headers claim."""

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


class _Archive:
    def __init__(self, file: _Bounded, package: Package) -> None:
        self.refused: list[tuple[str, str, str]] = []
        self._file, self._package = file, package
        # As tar does: of several members of one name the last counts.
        self._places: dict[str, tuple[int, int]] = {}
        tar = tarfile.open(fileobj=file, mode="r:")
        for number, info in enumerate(tar):
            if number >= MAX_ARCHIVE_MEMBERS:
                raise SourceError(f"archive of more than {MAX_ARCHIVE_MEMBERS} files")
            self._add(info)
            tar.members = []  # type: ignore[attr-defined]  # it keeps them all otherwise
        # tarfile takes a cut between two members for the end; the end is a block of zeros.
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise SourceError("broken archive: truncated")
        if package.first > 0:
            self.refused.clear()  # the first unit tells

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
            self._places[member] = info.offset_data, info.size

    def articles(self) -> Iterable[ArticleFiles]:
        xml_names = sorted(name for name in self._places if name.lower().endswith(XML_SUFFIXES))
        images = assign_images(xml_names, sorted(set(self._places) - set(xml_names)))
        if not xml_names:
            self.refused.append(("", self._package.name, "no article in the package"))
        first = self._package.first
        mine = xml_names[first : first + _XMLS_PER_ARCHIVE_UNIT] if first >= 0 else xml_names
        return [ArticleFiles(name, images[_folder_of(name)]) for name in mine]

    def read(self, name: str) -> bytes:
        offset, size = self._places[name]
        _check_size(name, size)
        self._file.seek(offset)
        data = self._file.read(size)
        if len(data) != size:
            raise SourceError("broken archive: truncated")
        return data
