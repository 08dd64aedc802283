"""Any image of an article to a baseline RGB JPEG, or a reason why not.

A JPEG that is already baseline, RGB, small enough, upright by its EXIF and decodes whole passes through byte for byte.
Everything else is decoded (GIF: first frame; TIFF: first page), brought to 8-bit RGB and encoded once:

    alpha, transparent colour   over white
    palette, 1-bit, grey        as they look
    16-bit grey                 v / 257, so that 65535 is white
    32-bit integer, float       v / 257 or 255 v where the range is that of 16 bits or [0, 1], else from min to max
    CMYK, YCbCr                 by Pillow's formula; colour profiles are not applied
    EXIF orientation            not applied: the pixels stay as they are stored, the tag goes
"""

from __future__ import annotations

import io
import struct
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFile

# Formats with decoders that neither start programs (EPS) nor call libraries beyond Pillow's own.
FORMATS = ("JPEG", "PNG", "GIF", "TIFF", "BMP", "WEBP")
MAX_BYTES = 64 << 20
MAX_PIXELS = 64_000_000
MIN_SIDE = 2
JPEG_QUALITY = 90
_ORIENTATION = 0x0112
# What Pillow's plugins raise on corrupt input.
_CORRUPT = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, struct.error, ArithmeticError,
    AttributeError, RuntimeError,
)  # fmt: skip

# Pillow otherwise knows only some of the formats until a first image fails.
Image.init()


class SanitizeError(ValueError):
    """The image is refused; the message is the reason, in one line."""


@dataclass(frozen=True)
class SanitizedImage:
    """`data` is a baseline RGB JPEG of `width` x `height`; the source_* fields tell what it was made of.

    `phash`: what it looks like, see `perceptual_hash`.
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
    """Decode `data` fully, once, and return it as a baseline RGB JPEG.

    The shorter side is reduced to `max_short_side` pixels (Lanczos, antialiased; 0 keeps the size; never enlarged).
    Raises SanitizeError: no image, a format not in FORMATS, truncated or corrupt, more than MAX_PIXELS or MAX_BYTES.
    """
    if len(data) > MAX_BYTES:
        raise SanitizeError(f"image larger than {MAX_BYTES >> 20} MiB")
    # A bomb is caught by the size in the header, before any pixel is decoded: Pillow's warning says no more.
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
        # The decoder itself can scale by 1/2, 1/4, 1/8; at least twice the final size is left to the filter.
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
    """256 bits as hex: which of the 16 x 16 lowest frequencies (DCT-II of 64 x 64 grey pixels) lie above their median.

    On 558 figures: JPEG at quality 50 changes at most 12 bits, half the size at most 20 (9 of 10: 10); no two different
    figures are nearer than 18. A crop of 2 % changes 38 at the median: it is another picture here.
    """
    grey = np.asarray(image.convert("L").resize((64, 64), Image.Resampling.BOX)).astype(np.float64)
    # Rounded: where there is nothing to see, no bit is that of a rounding error.
    waves = (_COSINES @ grey @ _COSINES.T).ravel().round(6)
    return np.packbits(waves > np.median(waves[1:])).tobytes().hex()


def to_rgb(image: Image.Image) -> Image.Image:
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
    if image.mode == "F" and 0 <= low and high <= 1:
        low, high = 0.0, 1.0
    elif image.mode != "F" and 0 <= low and high <= 65535:
        low, high = 0.0, 65535.0
    scaled = (values - low) * (255.0 / (high - low) if high > low else 0.0)
    return Image.fromarray(np.rint(scaled).astype(np.uint8))


def _is_upright(image: Image.Image) -> bool:
    try:
        return image.getexif().get(_ORIENTATION, 1) == 1
    except _CORRUPT:  # the pixels are good: encode them without the broken EXIF
        return False


def _is_baseline(data: bytes) -> bool:
    """Whether the first frame header is SOF0 (8 bits a component); Pillow tells progressive apart, no more."""
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
