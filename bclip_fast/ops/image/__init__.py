"""JPEG to RGB pixels. EXIF orientation isn't applied, as in Pillow and open_clip."""

from __future__ import annotations

from torch import Tensor

from ..dispatch import Limits, choose, kernels

__all__ = ["CLIP_MEAN", "CLIP_STD", "LIMITS", "MAX_PIXELS", "decode", "peek_size"]

# What CLIP's images are normalised with, by channel, on the scale of [0, 1].
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

MAX_PIXELS = 178_956_970  # Pillow's limit against decompression bombs


def _cpu(data: bytes) -> str | None:
    from bclip_fast import _cpu

    return None if hasattr(_cpu, "decode_jpeg") else "built without libjpeg-turbo (BCLIP_JPEG=0)"


def _reference(data: bytes) -> str | None:
    from importlib.util import find_spec

    return None if find_spec("PIL") else "Pillow is not installed"


LIMITS: Limits = {"cpu": _cpu, "reference": _reference}


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS, backend: str = "auto") -> Tensor:
    """A JPEG file's pixels as RGB; grey is repeated, CMYK and YCCK are converted as Pillow converts them.

    Args:
        data: the whole file.
        max_pixels: a larger image is refused from its header, before any memory is taken.
        backend: "auto", "cpu" (libjpeg-turbo) or "reference" (Pillow).

    Returns:
        (H, W, 3) uint8.

    Raises:
        ValueError: not a JPEG, truncated, corrupt, or larger than `max_pixels`.
        BackendError: the named backend cannot run here.
    """
    return kernels("image", choose("image.decode", LIMITS, backend, data)).decode(data, max_pixels)


def peek_size(data: bytes, *, backend: str = "auto") -> tuple[int, int]:
    """(height, width) of a JPEG from its header alone. Raises as `decode` does."""
    return kernels("image", choose("image.peek_size", LIMITS, backend, data)).peek_size(data)
