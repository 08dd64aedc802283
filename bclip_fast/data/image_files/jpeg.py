"""JPEG files through the decoder of the loaders, without torch: ingest's processes start in a fifth of the time."""

from __future__ import annotations

import importlib
import io
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np

from .errors import ImageError

if TYPE_CHECKING:
    from PIL import Image

_END, _START_OF_SCAN = b"\xff\xd9", b"\xff\xda"


def decode_as_loaders(data: bytes) -> Image.Image:
    """Decode a JPEG with the decoder that training uses, `ops.image.decode`, to RGB.

    Raises:
        ImageError: this decoder refuses the file, for example because its end is missing.
    """
    from PIL import Image

    module = importlib.import_module("bclip_fast._cpu") if find_spec("bclip_fast._cpu") else None
    try:
        if module is None or not hasattr(module, "decode_jpeg"):  # training then decodes with Pillow too
            # Pillow reads a file without an end marker after its last scan, which the compiled decoder refuses.
            if data.rfind(_END) < data.rfind(_START_OF_SCAN):
                raise ImageError("the end of the JPEG is missing")
            with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
                return image.convert("RGB")
        height, width = module.jpeg_size(data)
        pixels = np.empty((height, width, 3), np.uint8)
        module.decode_jpeg(data, pixels.ctypes.data, height, width)
    except (ValueError, OSError, SyntaxError) as error:
        raise ImageError(str(error)) from error
    return Image.fromarray(pixels)
