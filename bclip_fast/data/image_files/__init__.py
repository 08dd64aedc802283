"""The one way from an image file to 8-bit RGB pixels. Ingest, training, evaluation and search all use it.

The result is what a reader of the article sees. `docs/images.md` lists the rules for every format.
"""

from .decode import (
    FORMATS,
    IMAGE_SUFFIXES,
    MAX_BYTES,
    MAX_PIXELS,
    RULES,
    ImageConversion,
    ImageError,
    OpenImage,
    is_upright_jpeg,
    open_image,
    read_rgb,
)
from .formats import UNREAD_SUFFIXES
from .jpeg import decode_as_loaders

__all__ = [
    "FORMATS",
    "IMAGE_SUFFIXES",
    "MAX_BYTES",
    "MAX_PIXELS",
    "RULES",
    "UNREAD_SUFFIXES",
    "ImageConversion",
    "ImageError",
    "OpenImage",
    "decode_as_loaders",
    "is_upright_jpeg",
    "open_image",
    "read_rgb",
]
