"""PNG files without their metadata, and the checksums of their pixels."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

from .errors import ImageError

SIGNATURE = b"\x89PNG\r\n\x1a\n"
# The chunks that decide the pixels. Others hold colour profiles and texts, which Pillow refuses if they are large, and
# the later frames of an animation.
_KEPT = frozenset((b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"eXIf"))
_MAX_EXIF = 1 << 16


def without_metadata(data: bytes) -> bytes:
    """Return a PNG with only the chunks that decide the pixels and the orientation.

    Neither a large colour profile nor a text bomb then stops the decoder. A damaged file keeps its bytes from the
    first damaged chunk on, so the decoder reports the damage.
    """
    view = memoryview(data)
    parts, kind, end = [view[:8]], b"", 8
    for kind, position, end in _chunks(data):
        if kind in _KEPT and not (kind == b"eXIf" and end - position > _MAX_EXIF):
            parts.append(view[position:end])
    return b"".join(parts if kind == b"IEND" else [*parts, view[end:]])


def check_pixels(data: bytes) -> None:
    """Compare each IDAT chunk with its CRC-32, which Pillow ignores. Pillow checks the other chunks.

    Raises:
        ImageError: a chunk is damaged.
    """
    view = memoryview(data)
    for kind, position, end in _chunks(data):
        if kind == b"IDAT" and zlib.crc32(view[position + 4 : end - 4]) != int.from_bytes(view[end - 4 : end], "big"):
            raise ImageError("PNG with a wrong checksum of its pixels")


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield kind, start and end of each complete chunk, up to IEND."""
    position, kind = 8, b""
    while position + 12 <= len(data) and kind != b"IEND":
        end = position + 12 + int.from_bytes(data[position : position + 4], "big")
        if end > len(data):
            return
        kind = data[position + 4 : position + 8]
        yield kind, position, end
        position = end
