"""Where articles come from: a tree of folders, and `.tar`, `.tar.gz`, `.tgz` packages that are read in place.

An article is an XML file with the images in its folder and in those subfolders that hold no XML of their own.
Nothing is extracted to disk, links are not followed out of the tree, and sizes are checked before bytes are read.
"""

from __future__ import annotations

import gzip
import io
import os
import re
import stat
import tarfile
import urllib.parse
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from .xml_safe import MAX_XML_BYTES

# In order of preference: PMC's JPEGs are full size and its GIFs thumbnails of them.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".gif", ".webp", ".bmp")
XML_SUFFIXES = (".nxml", ".xml")
ARCHIVE_SUFFIXES = (".tar.gz", ".tgz", ".tar")
MAX_IMAGE_BYTES = 64 << 20
# A package with its videos; also what a decompression bomb may cost in time.
MAX_ARCHIVE_BYTES = 16 << 30
MAX_ARCHIVE_MEMBERS = 100_000
_XMLS_PER_PACKAGE = 16
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


class SourceError(ValueError):
    """Something cannot be read; the message is the reason, in one line."""


@dataclass(frozen=True)
class Package:
    """A unit of work: an archive (`xml_names` is empty), or some of the XML files of one folder."""

    root: Path
    name: str
    xml_names: tuple[str, ...] = ()


class Files(Protocol):
    """The contents of a package: names are paths with `/`, relative to the root of the source."""

    xml_names: list[str]
    image_names: list[str]
    # What is there but unusable: (name, reason).
    refused: list[tuple[str, str]]

    def read(self, name: str) -> bytes:
        """The bytes of a file that is listed. Raises SourceError."""
        ...


def discover(root: Path) -> Iterator[Package]:
    """All packages under `root`, in an order that depends on the names alone."""
    for folder, folders, names in os.walk(root):
        folders.sort()
        relative = Path(folder).relative_to(root).as_posix()
        prefix = "" if relative == "." else f"{relative}/"
        xml_names = sorted(prefix + name for name in names if name.lower().endswith(XML_SUFFIXES))
        for start in range(0, len(xml_names), _XMLS_PER_PACKAGE):
            yield Package(root, prefix.rstrip("/"), tuple(xml_names[start : start + _XMLS_PER_PACKAGE]))
        for name in sorted(names):
            if name.lower().endswith(ARCHIVE_SUFFIXES):
                yield Package(root, prefix + name)


@contextmanager
def open_package(package: Package) -> Iterator[Files]:
    """The contents of a package. Raises SourceError for an archive that is truncated, corrupt or too large."""
    if package.xml_names:
        yield _Folder(package)
        return
    path = package.root / package.name
    try:
        with _open_regular(path, package.root) as file:
            compressed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            with gzip.GzipFile(fileobj=file) if compressed else file as content:
                yield _Archive(_Bounded(content), package.name)
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise SourceError(f"broken archive: {error}") from None


def images_of(xml_name: str, image_names: Iterable[str], xml_names: Iterable[str]) -> list[str]:
    """The images of an article, relative to its folder: beside it or deeper, unless another XML is nearer."""
    folder = _folder_of(xml_name)
    xml_folders = {_folder_of(name) for name in xml_names}
    found = []
    for name in image_names:
        nearest = _folder_of(name)
        while nearest and nearest not in xml_folders:
            nearest = _folder_of(nearest[:-1])
        if nearest == folder:
            found.append(name[len(folder) :])
    return found


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
        self._root = package.root
        self.xml_names = list(package.xml_names)
        self.image_names: list[str] = []
        self.refused: list[tuple[str, str]] = []
        for folder, folders, names in os.walk(package.root / package.name):
            relative = Path(folder).relative_to(package.root).as_posix()
            prefix = "" if relative == "." else f"{relative}/"
            if relative != (package.name or ".") and any(name.lower().endswith(XML_SUFFIXES) for name in names):
                folders.clear()
                continue
            folders.sort()
            self.image_names += [prefix + name for name in sorted(names) if name.lower().endswith(IMAGE_SUFFIXES)]

    def read(self, name: str) -> bytes:
        try:
            with _open_regular(self._root / name, self._root) as file:
                _check_size(name, os.fstat(file.fileno()).st_size)
                return file.read(_limit(name))
        except OSError as error:
            raise SourceError(f"cannot be read: {error.strerror}") from None


class _Bounded(io.RawIOBase):
    """A stream that tarfile may not make us read beyond the limits, whatever sizes the headers claim."""

    def __init__(self, file: IO[bytes] | gzip.GzipFile) -> None:
        self._file = file

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_IMAGE_BYTES:
            raise SourceError("broken archive: a header claims too many bytes")
        return self._file.read(size)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence != os.SEEK_SET or not 0 <= offset <= MAX_ARCHIVE_BYTES:
            raise SourceError(f"archive larger than {MAX_ARCHIVE_BYTES >> 30} GiB")
        return self._file.seek(offset)

    def tell(self) -> int:
        return self._file.tell()


class _Archive:
    def __init__(self, file: _Bounded, name: str) -> None:
        self.xml_names: list[str] = []
        self.image_names: list[str] = []
        self.refused: list[tuple[str, str]] = []
        self._members: dict[str, tarfile.TarInfo] = {}
        self._tar = tarfile.open(fileobj=file, mode="r:")
        for number, info in enumerate(self._tar):
            if number >= MAX_ARCHIVE_MEMBERS:
                raise SourceError(f"archive of more than {MAX_ARCHIVE_MEMBERS} files")
            self._add(info, f"{name}/")
        # tarfile takes a cut between two members for the end; the end is a block of zeros.
        file.seek(self._tar.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise SourceError("broken archive: truncated")
        self.xml_names.sort()
        self.image_names.sort()

    def _add(self, info: tarfile.TarInfo, prefix: str) -> None:
        lower = info.name.lower()
        if info.isdir() or not lower.endswith(XML_SUFFIXES + IMAGE_SUFFIXES):
            return
        member = prefix + info.name.removeprefix("./")
        if info.name.startswith("/") or ".." in info.name.split("/"):
            self.refused.append((member, "unsafe name in an archive"))
        elif not info.isreg() or info.issparse():
            self.refused.append((member, "not a regular file"))
        else:
            names = self.xml_names if lower.endswith(XML_SUFFIXES) else self.image_names
            if member not in self._members:
                names.append(member)
            # As tar does: of several members of one name the last counts.
            self._members[member] = info

    def read(self, name: str) -> bytes:
        info = self._members[name]
        _check_size(name, info.size)
        content = self._tar.extractfile(info)
        data = content.read() if content else b""
        if len(data) != info.size:
            raise SourceError("broken archive: truncated")
        return data


class ImageNames:
    """Finds the image that an href means among the files of its article; it never makes up a path.

    The rule: the href's path, else its last part, with an image suffix on either side disregarded; else without a
    leading `journal.` (PLOS packages); else the same regardless of case. Of several types of one image the first in
    IMAGE_SUFFIXES is taken.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._by_path: dict[str, list[str]] = defaultdict(list)
        self._by_stem: dict[str, list[str]] = defaultdict(list)
        for name in names:
            path = _without_suffix(name)
            for stem in dict.fromkeys((path, path.rpartition("/")[2])):
                table = self._by_path if stem == path else self._by_stem
                table[stem].append(name)
                table[_regardless_of_case(stem)].append(name)

    def find(self, hrefs: Iterable[str]) -> str:
        """The file for an image given by the hrefs of its versions. Raises SourceError with the reason."""
        found: list[str] = []
        for href in hrefs:
            found += self._find(href)
        if not found:
            raise SourceError("image missing")
        return min(found, key=lambda name: (_preference(name), name))

    def _find(self, href: str) -> list[str]:
        paths = list(dict.fromkeys((href, urllib.parse.unquote(href))))
        # An address says nothing about folders of ours: only its last part is looked up.
        paths = [path.rpartition("/")[2] if _SCHEME.match(path) else path.removeprefix("./") for path in paths]
        if any(path.startswith("/") or "\\" in path or ".." in path.split("/") for path in paths):
            raise SourceError("unsafe href")
        for path in paths:
            last = path.rpartition("/")[2]
            stems = [path, _without_suffix(path), last, _without_suffix(last)]
            stems += [stem.removeprefix("journal.") for stem in stems[2:] if stem.startswith("journal.")]
            for key in [*filter(None, stems), *(_regardless_of_case(stem) for stem in stems if stem)]:
                for table in (self._by_path, self._by_stem):
                    if key not in table:
                        continue
                    if len({_without_suffix(name) for name in table[key]}) > 1:
                        raise SourceError("ambiguous href")
                    return table[key]
        return []


def _regardless_of_case(stem: str) -> str:
    # A key that no href can be.
    return f"\0{stem.casefold()}"


def _without_suffix(name: str) -> str:
    stem, dot, suffix = name.rpartition(".")
    return stem if dot and f".{suffix.lower()}" in IMAGE_SUFFIXES else name


def _preference(name: str) -> int:
    return IMAGE_SUFFIXES.index("." + name.rpartition(".")[2].lower())
