"""Read image files of a data set."""

from __future__ import annotations

from pathlib import Path

from bclip_fast.errors import UserError


def read_image(path: Path, remark: str = "") -> bytes:
    """Return the bytes of an image file. Raises UserError; `remark` follows the path in the message."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"image {path}{remark} cannot be read: {error.strerror}") from error
