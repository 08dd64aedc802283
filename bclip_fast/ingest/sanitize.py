"""Convert any image of an article to a baseline RGB JPEG, or refuse it with a reason.

A JPEG keeps its bytes if it is baseline, RGB, small enough, upright according to its EXIF, and completely decodable.
Every other image is decoded (GIF: first frame, TIFF: first page), converted to 8-bit RGB, and encoded once:

    alpha, transparent colour   over white
    palette, 1-bit, grey        same appearance
    16-bit grey                 v / 257, so that 65535 is white
    32-bit integer, float       v / 257 within the range of 16 bits, 255 v within [0, 1], else from minimum to maximum
    CMYK, YCbCr                 by Pillow's formula, without colour profiles
    EXIF orientation            not applied: the pixels keep their order, the tag is removed
"""

from __future__ import annotations

import io
import struct
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFile

# Formats whose decoders start no programs (as EPS does) and call only libraries that Pillow includes.
FORMATS = ("JPEG", "PNG", "GIF", "TIFF", "BMP", "WEBP")
MAX_BYTES = 64 << 20
MAX_PIXELS = 64_000_000
MIN_SIDE = 2
JPEG_QUALITY = 90
_ORIENTATION = 0x0112
# Exceptions of Pillow's plugins for corrupt input.
_CORRUPT = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, struct.error, ArithmeticError,
    AttributeError, RuntimeError,
)  # fmt: skip

# Without this call, Pillow loads some formats only after an image has failed to open.
Image.init()


class SanitizeError(ValueError):
    """The image is refused. The message is the reason, in one line."""


@dataclass(frozen=True)
class SanitizedImage:
    """A sanitised image.

    Attributes:
        data: baseline RGB JPEG of `width` x `height` pixels.
        source_format, source_mode, source_width, source_height: Pillow's description of the original.
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
        SanitizeError: `data` is not an image in one of FORMATS, is truncated or corrupt, or exceeds a limit.
    """
    if len(data) > MAX_BYTES:
        raise SanitizeError(f"image larger than {MAX_BYTES >> 20} MiB")
    # `_sanitize` refuses a decompression bomb by the size in its header, so Pillow's warning adds nothing.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                return _sanitize(image, data, max_short_side, jpeg_quality)
        except Image.UnidentifiedImageError:
            raise SanitizeError("not an image of a known format") from None
        except Image.DecompressionBombError:
            raise SanitizeError("image of too many pixels") from None
        except MemoryError:
            raise SanitizeError("image cannot be decoded: out of memory") from None
        except SanitizeError:
            raise
        except _CORRUPT as error:
            reason = " ".join(str(error).split())[:150] or type(error).__name__
            raise SanitizeError(f"image cannot be decoded: {reason}") from None


def _sanitize(image: ImageFile.ImageFile, data: bytes, max_short_side: int, jpeg_quality: int) -> SanitizedImage:
    source_format, source_mode = image.format or "", image.mode
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise SanitizeError("image of too many pixels")
    if min(width, height) < MIN_SIDE:
        raise SanitizeError("image of a single pixel row or column")
    shrink = 0 < max_short_side < min(width, height)
    scale = max_short_side / min(width, height) if shrink else 1.0
    size = max(1, round(width * scale)), max(1, round(height * scale))
    if shrink and image.format == "JPEG" and image.mode in ("RGB", "L"):
        # The decoder can scale by 1/2, 1/4 or 1/8. Keep at least twice the final size for the filter.
        image.draft(None, (2 * size[0], 2 * size[1]))
    image.load()
    if not shrink and image.format == "JPEG" and image.mode == "RGB" and _is_baseline(data) and _is_upright(image):
        return SanitizedImage(data, width, height, source_format, source_mode, width, height, perceptual_hash(image))
    result = to_rgb(image)
    if shrink:
        result = result.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    result.save(buffer, "JPEG", quality=jpeg_quality)
    phash = perceptual_hash(result)
    return SanitizedImage(buffer.getvalue(), *result.size, source_format, source_mode, width, height, phash)


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


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to 8-bit RGB. Raises SanitizeError for pixels that are not finite numbers."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _to_8_bit(image).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        opaque = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", opaque.size, "white"), opaque).convert("RGB")
    return image.convert("RGB") if image.mode != "RGB" else image


def _to_8_bit(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.float64)
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        raise SanitizeError("image holds values that are no numbers")
    if image.mode == "F" and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    elif image.mode != "F" and low >= 0 and high <= 65535:
        low, high = 0.0, 65535.0
    scaled = (values - low) * (255.0 / (high - low) if high > low else 0.0)
    return Image.fromarray(np.rint(scaled).astype(np.uint8))


def _is_upright(image: Image.Image) -> bool:
    try:
        return image.getexif().get(_ORIENTATION, 1) == 1
    except _CORRUPT:  # the pixels are intact, so encode them without the broken EXIF
        return False


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
