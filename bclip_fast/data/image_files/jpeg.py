"""JPEG files through the decoder of the loaders, without torch: ingest's processes start in a fifth of the time.

Pillow ignores libjpeg's warnings, so it decodes damaged files to wrong pixels. It decodes here only what the compiled
decoder cannot: builds without it, and lossless files.
"""

from __future__ import annotations

import importlib
import io
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import ImageError

if TYPE_CHECKING:
    from PIL import Image

_END, _START_OF_SCAN = b"\xff\xd9", b"\xff\xda"
_PREFIXES = ("JPEG cannot be decoded: ", "not a JPEG: ")


def decode_as_loaders(data: bytes) -> Image.Image:
    """Decode a JPEG with the decoder that training uses, `ops.image.decode`, to RGB.

    Raises:
        ImageError: this decoder refuses the file, for example because its end is missing.
    """
    from PIL import Image

    pixels = _decode(data, 1, True)
    if pixels is not None:
        return pixels
    # Training then decodes with Pillow too. Pillow reads a file without an end marker after its last scan.
    if data.rfind(_END) < data.rfind(_START_OF_SCAN):
        raise ImageError("the end of the JPEG is missing")
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            return image.convert("RGB")
    except (ValueError, OSError, SyntaxError) as error:
        raise ImageError(str(error)) from error


def decode_intact(data: bytes, reduced: int = 1) -> Image.Image | None:
    """Decode a JPEG whose pixels are intact to RGB, even if the end marker after its only scan is missing.

    reduced: divisor of the size: 1, 2, 4 or 8.

    Returns:
        None if only Pillow can decode it: a build without libjpeg-turbo, or a lossless file.

    Raises:
        ImageError: the file is damaged. The message is libjpeg's.
    """
    try:
        return _decode(data, reduced, False)
    except ImageError as error:
        if "Unsupported JPEG process" in str(error):
            return None
        raise


def _decode(data: bytes, reduced: int, needs_end: bool) -> Image.Image | None:
    """None: this build has no compiled decoder."""
    from PIL import Image

    module: Any = importlib.import_module("bclip_fast._cpu") if find_spec("bclip_fast._cpu") else None
    if module is None or not hasattr(module, "decode_jpeg"):
        return None
    try:
        height, width = (-(-side // reduced) for side in module.jpeg_size(data))
        pixels = np.empty((height, width, 3), np.uint8)
        module.decode_jpeg(data, pixels.ctypes.data, height, width, reduced, needs_end)
    except ValueError as error:
        reason = str(error)
        for prefix in _PREFIXES:
            reason = reason.removeprefix(prefix)
        raise ImageError(reason) from error
    return Image.fromarray(pixels)
