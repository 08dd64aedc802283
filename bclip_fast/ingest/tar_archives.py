"""Packages of articles: `.tar`, `.tar.gz` and `.tgz` files, read without extracting them.

Only a compressed package of more than 64 MiB passes through an unnamed temporary file.
"""

from __future__ import annotations

import gzip
import io
import os
import tarfile
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from bclip_fast.io import stand_ins
from bclip_fast.io.folders import is_hidden_path

from .articles import (
    ARCHIVE_SUFFIXES,
    MAX_IMAGE_BYTES,
    UNREAD_SUFFIXES,
    XML_SUFFIXES,
    ArticleArchive,
    ArticleFiles,
    Package,
    SourceError,
    assign_images,
    check_size,
    folder_of,
    open_regular_file,
)
from .image_formats import may_be_image, suffix_of

# Limit for a decompressed package, videos included. It also bounds the time that a decompression bomb takes.
MAX_ARCHIVE_BYTES = 16 << 30
MAX_ARCHIVE_MEMBERS = 1_000_000
# Every unit reads all headers of its archive again, so a unit of an archive has more articles than one of a folder.
XMLS_PER_UNIT = 256
_MAX_BYTES_IN_MEMORY = 64 << 20


def num_articles(path: Path, root: Path) -> int:
    """Return the number of articles of an archive that several units can read.

    0 for a compressed, broken or oversized archive: a single unit reads it.
    """
    try:
        with open_regular_file(path, root) as file:
            stream = _BoundedStream(file, os.fstat(file.fileno()).st_size)
            with tarfile.open(fileobj=stream, mode="r:") as tar:
                count = 0
                for number, info in enumerate(tar):
                    count += info.name.lower().endswith(XML_SUFFIXES) and not is_hidden_path(info.name)
                    tar.members = []  # type: ignore[attr-defined]
                    if number > MAX_ARCHIVE_MEMBERS:
                        return 0
                return count
    except (tarfile.TarError, OSError, EOFError, SourceError):
        return 0


@contextmanager
def open_archive(package: Package) -> Iterator[ArticleArchive]:
    """Open an archive. Raises SourceError if it is truncated, corrupt or too large."""
    start = b"?"
    try:
        with open_regular_file(Path(package.root, package.name), Path(package.root)) as file:
            start = file.read(stand_ins.NUM_BYTES)
            is_compressed = start.startswith(b"\x1f\x8b")
            file.seek(0)
            if not is_compressed:
                yield _TarArchive(_BoundedStream(file, os.fstat(file.fileno()).st_size), package)
                return
            with tempfile.SpooledTemporaryFile(_MAX_BYTES_IN_MEMORY) as content:
                _decompress(file, content)
                yield _TarArchive(_BoundedStream(content, MAX_ARCHIVE_BYTES), package)
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        if reason := stand_ins.describe(start):
            raise SourceError(f"broken archive: the file {reason}") from None
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
        self._archives: list[str] = []
        self._num_hidden = 0
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
        member = f"{self._package.name}/{info.name.removeprefix('./')}"
        lower = info.name.lower()
        if info.isdir():
            return
        if is_hidden_path(info.name):
            self._num_hidden += 1
            return
        if lower.endswith(ARCHIVE_SUFFIXES + UNREAD_SUFFIXES):
            self._archives.append(member)
            return
        is_wanted = lower.endswith(XML_SUFFIXES) or bool(suffix_of(info.name))
        if not (is_wanted or may_be_image(info.name)):
            return
        if info.name.startswith("/") or ".." in info.name.split("/"):
            self.refused.append(("", member, "unsafe name in an archive"))
        elif info.islnk() and (target := f"{self._package.name}/{info.linkname.removeprefix('./')}") in self._members:
            self._members[member] = self._members[target]
        elif info.isreg() and not info.issparse():
            self._members[member] = info.offset_data, info.size
        elif is_wanted or info.issym() or info.islnk():
            self.refused.append(("", member, "not a regular file"))

    def _unread_archives(self, folders: Iterable[str]) -> Iterator[tuple[str, str, str]]:
        """Yield the archives inside this one, except the supplements in the folder of an article or below it."""
        folders = set(folders)
        for member in self._archives:
            folder = folder_of(member)
            while folder and folder not in folders:
                folder = folder_of(folder[:-1])
            if not folder:
                yield "", member, "archive inside an archive: not read"

    def articles(self) -> Iterable[ArticleFiles]:
        xml_names = sorted(name for name in self._members if name.lower().endswith(XML_SUFFIXES))
        images = assign_images(xml_names, sorted(set(self._members) - set(xml_names)))
        if self._package.first <= 0:
            self.refused += self._unread_archives(images)
            if self._num_hidden:
                self.refused.append(("", self._package.name, f"hidden files left out: {self._num_hidden}"))
        if not xml_names:
            self.refused.append(("", self._package.name, "no article in the package"))
        first = self._package.first
        unit = xml_names[first : first + XMLS_PER_UNIT] if first >= 0 else xml_names
        return [ArticleFiles(name, images[folder_of(name)]) for name in unit]

    def read(self, name: str) -> bytes:
        offset, size = self._members[name]
        check_size(name, size)
        self._file.seek(offset)
        data = self._file.read(size)
        if len(data) != size:
            raise SourceError("broken archive: truncated")
        return data
