"""Pixels of any mode as 8-bit RGB."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .errors import ImageError

if TYPE_CHECKING:
    from PIL import Image

_ALPHA_MODES = ("RGBA", "LA", "PA", "RGBa", "La")
# Depths of the devices whose values are stored in 16 bits.
_DEPTHS = (8, 10, 12, 14, 16)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a decoded image of any mode to RGB.

    alpha, transparent colour  over white, as in a browser. An alpha of zero everywhere is ignored
    grey of up to 16 bits      from 0 to 2^b - 1, for the smallest b of 8, 10, 12, 14 and 16 that holds all values
    other integers, float      float within [0, 1] from 0 to 1, everything else from its minimum to its maximum
    CMYK, YCbCr, palette       Pillow's formula, without colour profiles
    CIELAB                     to sRGB, by littlecms

    Raises ImageError for pixels that are not finite numbers.
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _grey_to_8_bits(image).convert("RGB")
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        return _over_white(image)
    return image.convert("RGB") if image.mode != "RGB" else image


def _over_white(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode == "La":  # Pillow converts it only to LA
        image = image.convert("LA")
    rgba = image if image.mode == "RGBA" else image.convert("RGBA")
    alpha = rgba.getchannel("A").getextrema()
    if alpha == (255, 255) or (image.mode in _ALPHA_MODES and alpha == (0, 0)):
        return rgba.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _grey_to_8_bits(image: Image.Image) -> Image.Image:
    from PIL import Image

    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        raise ImageError("pixels that are not finite numbers")
    return Image.fromarray(scaled_to_8_bits(values, *_range(image.mode, low, high)))


def _range(mode: str, low: float, high: float) -> tuple[float, float]:
    """Return the values that become black and white."""
    if mode == "F":
        return (0.0, 1.0) if low >= 0 and high <= 1 else (low, high)
    if low >= 0 and high <= 65535:
        return 0.0, float(next(2**depth - 1 for depth in _DEPTHS if high < 2**depth))
    return low, high


def scaled_to_8_bits(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Return values from `low` to `high` as uint8 from 0 to 255, rounded and clipped. A single value becomes 0."""
    scale = 255.0 / (high - low) if high > low else 0.0
    return np.rint(np.clip((values.astype(np.float64) - low) * scale, 0, 255)).astype(np.uint8)
