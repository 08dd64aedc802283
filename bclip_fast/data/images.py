"""Decode an image file of any common format."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING

from bclip_fast.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_IMAGE_PIXELS = 200_000_000
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")


def open_image(data: bytes, name: Callable[[], str]) -> Image:
    """Return the decoded image in the mode of its file. Preprocessing converts it to RGB.

    Args:
        name: function that returns the image's name for an error message. It is called only then: it may read a file.

    Raises:
        UserError: the image has an unknown format, is broken, or exceeds `MAX_IMAGE_PIXELS`.
    """
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
        if image.width * image.height > MAX_IMAGE_PIXELS:
            raise UserError(
                f"image {name()} has {image.width} x {image.height} pixels, more than {MAX_IMAGE_PIXELS}; scale it down"
            )
        image.load()
    except UserError:
        raise
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"image {name()} cannot be decoded: {reason}") from error
    return image
