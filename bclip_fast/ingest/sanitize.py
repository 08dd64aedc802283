"""Convert any image of an article to a baseline RGB JPEG, or refuse it with a reason.

A JPEG keeps its bytes if it is baseline, RGB, small enough, upright, and completely decodable by the decoder of the
loaders. Every other image is decoded by `data.image_files`, which has the rules for every format, and encoded once.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from bclip_fast.data.image_files import ImageError, OpenImage, decode_as_loaders, open_image

MAX_BYTES = 64 << 20
MAX_PIXELS = 64_000_000
MIN_SIDE = 2
# Limit of libjpeg.
MAX_SIDE = 65_500
JPEG_QUALITY = 90


class SanitizeError(ValueError):
    """The image is refused. The message is the reason, in one line."""


@dataclass(frozen=True)
class SanitizedImage:
    """A sanitised image.

    Attributes:
        data: baseline RGB JPEG of `width` x `height` pixels.
        source_format, source_mode, source_width, source_height: description of the original, see `OpenImage`.
        phash: perceptual hash, see `perceptual_hash`.
    """

    data: bytes
    width: int
    height: int
    source_format: str
    source_mode: str
    source_width: int
    source_height: int
    phash: str


def sanitize(data: bytes, *, max_short_side: int = 384, jpeg_quality: int = JPEG_QUALITY) -> SanitizedImage:
    """Decode `data` completely, once, and return it as a baseline RGB JPEG.

    Args:
        max_short_side: limit for the shorter side in pixels. Larger images are reduced (Lanczos). 0: no limit.
        jpeg_quality: quality of an image that is encoded again.

    Raises:
        SanitizeError: `data` is not an image in a supported format, is truncated or corrupt, or exceeds a limit.
    """
    if len(data) > MAX_BYTES:
        raise SanitizeError(f"image larger than {MAX_BYTES >> 20} MiB")
    try:
        image = open_image(data, MAX_PIXELS)
        if min(image.width, image.height) < MIN_SIDE:
            raise SanitizeError("image of a single pixel row or column")
        return _sanitize(image, data, max_short_side, jpeg_quality)
    except ImageError as error:
        reason = str(error)
        known = reason.startswith(("not an image", "image in a", "image of", "image larger"))
        raise SanitizeError(reason if known else f"image cannot be decoded: {reason}") from None
    except MemoryError:
        raise SanitizeError("image cannot be decoded: out of memory") from None


def _sanitize(image: OpenImage, data: bytes, max_short_side: int, jpeg_quality: int) -> SanitizedImage:
    width, height = image.width, image.height

    def result(data: bytes, pixels: Image.Image) -> SanitizedImage:
        phash = perceptual_hash(pixels)
        return SanitizedImage(data, *pixels.size, image.format, image.mode, width, height, phash)

    shrink = 0 < max_short_side < min(width, height)
    if not shrink and image.format == "JPEG" and image.mode == "RGB" and _is_baseline(data) and image.is_upright:
        pixels = _decoded_by_loaders(data)
        if pixels is not None:
            return result(data, pixels)
    if shrink:
        scale = max_short_side / min(width, height)
        size = max(1, round(width * scale)), max(1, round(height * scale))
        # Keep at least twice the final size for the filter.
        image.reduce_jpeg(2 * size[0], 2 * size[1])
    pixels = image.rgb()
    if shrink:
        turned = (pixels.width > pixels.height) != (width > height)
        pixels = pixels.resize(size[::-1] if turned else size, Image.Resampling.LANCZOS)
    if max(pixels.size) > MAX_SIDE:
        raise SanitizeError(f"image of more than {MAX_SIDE} pixels on a side, which JPEG cannot hold")
    buffer = io.BytesIO()
    pixels.save(buffer, "JPEG", quality=jpeg_quality)
    return result(buffer.getvalue(), pixels)


def _decoded_by_loaders(data: bytes) -> Image.Image | None:
    """Return the pixels of a JPEG, or None if a loader would refuse it, for example because its end is missing."""
    try:
        return decode_as_loaders(data)
    except ImageError:
        return None


_COSINES = np.cos(np.pi / 64 * np.outer(np.arange(16), np.arange(64) + 0.5))


def perceptual_hash(image: Image.Image) -> str:
    """Return 256 bits in hexadecimal that describe the appearance of an image.

    The image is reduced to 64 x 64 grey pixels. Each bit says whether one of the 16 x 16 lowest frequencies of their
    DCT-II is above the median.

    Measured on 558 figures: JPEG at quality 50 changes at most 12 bits. Half the size changes at most 20 bits, and 10
    bits or fewer in 9 of 10 figures. Two different figures differ in at least 18 bits. A crop of 2 % changes 38 bits
    (median), so it counts as a different image.
    """
    grey = np.asarray(image.convert("L").resize((64, 64), Image.Resampling.BOX)).astype(np.float64)
    # In an image without content, all frequencies are rounding errors. Rounding removes them.
    waves = (_COSINES @ grey @ _COSINES.T).ravel().round(6)
    return np.packbits(waves > np.median(waves[1:])).tobytes().hex()


def _is_baseline(data: bytes) -> bool:
    """Return whether the first frame header is SOF0 (8 bits a component). Pillow only detects progressive JPEGs."""
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # padding
            position += 1
        elif marker == 0x01 or 0xD0 <= marker <= 0xD8:  # no length follows
            position += 2
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return marker == 0xC0
        else:
            position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return False
