"""Read the files of a tar file that can come from anybody, in one pass over its bytes.

No file is extracted and links are not followed. A header that takes much memory, and any damage, ends the pass.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass

from bclip_fast.data.image_files import IMAGE_SUFFIXES, MAX_BYTES
from bclip_fast.data.storage import Storage
from bclip_fast.io import stand_ins
from bclip_fast.io.file_names import printable

from .checksum import crc32c

_PIECE = 8 << 20
# Limit for the bytes of one header, with extended headers. Real ones have 512 to 2048 bytes.
_MAX_HEADER = 1 << 20
_MAX_TEXT = 4 << 20
IMAGES = [suffix[1:] for suffix in IMAGE_SUFFIXES]
TEXTS = ("txt", "json")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class TarProblem(Exception):
    """Why the rest of a tar file cannot be used."""


@dataclass
class Member:
    """A file in a tar file. `content` is that of a .txt or .json, and `problem` says why the file cannot be used."""

    offset: int
    size: int
    checksum: int = 0
    content: bytes = b""
    problem: str = ""


class Stream:
    """A file that tarfile reads. All bytes pass through the hash once, in order.

    budget: bytes that tarfile may still read for the current header.
    """

    def __init__(self, storage: Storage, name: str, size: int) -> None:
        self._storage, self._name, self.size = storage, name, size
        self._pieces: dict[int, bytes] = {}
        self._num_hashed = 0
        self._position = 0
        self.sha256 = hashlib.sha256()
        self.budget = 0

    def _piece(self, number: int) -> bytes:
        while number not in self._pieces:
            wanted = min(number, self._num_hashed)
            start = wanted * _PIECE
            data = self._storage.read(self._name, start, min(start + _PIECE, self.size))
            if wanted == self._num_hashed:
                self.sha256.update(data)
                self._num_hashed += 1
            # tarfile goes back by one byte, possibly to the piece before.
            self._pieces = {key: piece for key, piece in self._pieces.items() if key >= wanted - 1} | {wanted: data}
        return self._pieces[number]

    def content(self, start: int, end: int) -> bytes:
        """Return the bytes [start, end), or fewer at the end of the file."""
        end = min(end, self.size)
        parts = [
            self._piece(number)[max(0, start - number * _PIECE) : end - number * _PIECE]
            for number in range(start // _PIECE, -(-end // _PIECE))
        ]
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read(self, size: int = -1) -> bytes:
        """Read for tarfile."""
        self.budget -= size
        if size < 0 or self.budget < 0:
            raise TarProblem(f"a header of more than {_MAX_HEADER >> 10} KiB")
        data = self.content(self._position, self._position + size) if self._position < self.size else b""
        self._position += len(data)
        return data

    def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
        """Set the position. tarfile only seeks from the start."""
        self._position = position
        return position

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def finish(self) -> str:
        """Read the rest of the file, and return the SHA-256 of the whole."""
        for number in range(self._num_hashed, -(-self.size // _PIECE)):
            self._piece(number)
        return self.sha256.hexdigest()


def members(stream: Stream) -> Iterator[tuple[str, Member, str]]:
    """Yield path, member and extension of each regular file. Raises TarProblem at the first damage."""
    start = stream.content(0, 512)
    if name := next((name for magic, name in _COMPRESSED.items() if start.startswith(magic)), None):
        raise TarProblem(f"is compressed ({name}), so single samples cannot be read; decompress it")
    if reason := stand_ins.describe(start):
        raise TarProblem(reason)
    last = -1
    try:
        stream.budget = _MAX_HEADER
        with tarfile.open(fileobj=stream, mode="r:") as tar:  # type: ignore[call-overload]
            while True:
                stream.budget = _MAX_HEADER
                info = tar.next()
                if info is None:
                    break
                tar.members = []
                if info.size < 0 or info.offset_data <= last:
                    raise TarProblem(f"has a header with an impossible size at byte {info.offset}")
                last = info.offset_data
                if info.isreg() and (parts := _split_name(info.name)):
                    yield parts[0], _read_member(stream, info, parts[1]), parts[1]
            # tarfile takes a damaged header after the first one as the end of the file.
            if any(stream.content(tar.offset, tar.offset + 512)):
                raise TarProblem(f"has a damaged header at byte {tar.offset}")
    except (tarfile.TarError, ValueError, IndexError, KeyError, ArithmeticError, RecursionError, OSError) as error:
        raise TarProblem(f"is not an intact tar file: {printable(str(error)) or type(error).__name__}") from None


def _split_name(name: str) -> tuple[str, str] | None:
    """Return the path up to the first dot of the file's name, and the extension. None for a file of no sample."""
    folder, slash, file = name.rpartition("/")
    stem, dot, extension = file.partition(".")
    if not stem or not dot or (name.startswith("__") and name.endswith("__")):
        return None
    extension = extension.lower()
    kind = extension.rpartition(".")[2]
    return (f"{folder}{slash}{stem}", extension) if kind in TEXTS or kind in IMAGES else None


def _read_member(stream: Stream, info: tarfile.TarInfo, extension: str) -> Member:
    member = Member(info.offset_data, info.size)
    is_text = extension.endswith(TEXTS)
    if info.issparse():
        member.problem = "is stored as a sparse file"
    elif info.size > (_MAX_TEXT if is_text else MAX_BYTES):
        member.problem = f"has {info.size} bytes, more than {(_MAX_TEXT if is_text else MAX_BYTES) >> 20} MiB"
    elif info.offset_data + info.size > stream.size:
        member.problem = "is cut short by the end of the tar file"
    elif not info.size and not is_text:
        member.problem = "is empty"
    else:
        content = stream.content(info.offset_data, info.offset_data + info.size)
        member.checksum = crc32c(content)
        member.content = content if is_text else b""
    return member
