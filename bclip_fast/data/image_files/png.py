"""PNG files without their metadata."""

from __future__ import annotations

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
    parts, position = [view[:8]], 8
    while position + 12 <= len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        end = position + 12 + length
        if end > len(data):
            break
        kind = data[position + 4 : position + 8]
        if kind in _KEPT and not (kind == b"eXIf" and length > _MAX_EXIF):
            parts.append(view[position:end])
        position = end
        if kind == b"IEND":
            return b"".join(parts)
    return b"".join([*parts, view[position:]])
