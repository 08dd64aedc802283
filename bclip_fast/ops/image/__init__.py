"""JPEG to RGB pixels, and to squares resized as Pillow resizes. EXIF orientation isn't applied, as in Pillow and
open_clip. There are no gradients: these are plain functions, not torch operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ..dispatch import Limits, choose, kernels

__all__ = [
    "CLIP_MEAN",
    "CLIP_STD",
    "LIMITS",
    "MAX_PIXELS",
    "decode",
    "decode_resize",
    "peek_size",
    "shortest_edge_size",
]

# What CLIP's images are normalised with, by channel, on the scale of [0, 1].
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

MAX_PIXELS = 178_956_970  # Pillow's limit against decompression bombs


def shortest_edge_size(width: int, height: int, size: int) -> tuple[int, int]:
    """(width, height) with the shorter edge `size` and the longer one cut to whole pixels: torchvision's rule."""
    if width <= height:
        return size, int(size * height / width)
    return int(size * width / height), size


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


def decode_resize(
    jpegs: Sequence[bytes],
    size: int,
    *,
    crop: Literal["center", "squash"] | Tensor | Sequence[tuple[int, int, int, int]] = "center",
    interpolation: Literal["bicubic", "bilinear"] = "bicubic",
    exact: bool = True,
    out: Tensor | None = None,
    max_pixels: int = MAX_PIXELS,
    threads: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, dict[int, str]]:
    """JPEG files to squares of RGB pixels, as `decode` and the antialiased `resize` of Pillow 13 give them, to the bit.

    Args:
        jpegs: n whole files.
        size: side of the squares in pixels, 1 to 16384.
        crop: "center" resizes the shorter edge to `size`, the longer one in proportion (cut to whole pixels), and cuts
            off what that has too much at both ends, as torchvision's Resize and CenterCrop do; "squash" resizes both
            edges to `size`; or n boxes (top, left, height, width) in pixels, each cut out before it is resized.
        exact: False allows to decode a picture at 1/2, 1/4 or 1/8 of its size where it is much larger than the result,
            and to upsample chroma without smoothing: faster, and about half a level off in the mean.
        out: (n, size, size, 3) contiguous uint8 on the CPU that is written and returned, pinned or a part of a batch.
        max_pixels: a larger picture is an error, found in its header.
        threads: how many share the files; torch.get_num_threads() unless given.
        backend: "auto", "cpu" (C++ on libjpeg-turbo) or "reference" (Pillow, always exact and on one thread).

    Returns:
        The (n, size, size, 3) uint8 pixels, and the reason for each index whose file is not a JPEG, is broken or too
        large, or doesn't hold its box; its pixels are 0. The cpu backend doesn't read what lies below the part that is
        needed, so that it doesn't notice damage there.

    Raises:
        ValueError: a size, crop, interpolation, `out` or number of threads as it must not be; never for a file.
        BackendError: the named backend cannot run here.
    """
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= 16384:
        raise ValueError(f"size is {size!r}; it must be a whole number from 1 to 16384")
    if interpolation not in ("bicubic", "bilinear"):
        raise ValueError(f"interpolation is {interpolation!r}; choose bicubic or bilinear")
    threads = torch.get_num_threads() if threads is None else threads
    if threads < 1:
        raise ValueError(f"threads={threads}: at least one is needed")
    boxes = None
    if not isinstance(crop, str):
        boxes = torch.as_tensor(crop, dtype=torch.int64, device="cpu").contiguous()
        if boxes.shape != (len(jpegs), 4):
            raise ValueError(f"crop has the shape {tuple(boxes.shape)}; {len(jpegs)} files need ({len(jpegs)}, 4)")
    elif crop not in ("center", "squash"):
        raise ValueError(f"crop is {crop!r}; choose center, squash or boxes")
    shape = (len(jpegs), size, size, 3)
    if out is None:
        out = torch.empty(shape, dtype=torch.uint8)
    elif out.shape != shape or out.dtype != torch.uint8 or out.device.type != "cpu" or not out.is_contiguous():
        raise ValueError(
            f"out must be contiguous uint8 of shape {shape} on the CPU, got {out.dtype}, {out.device}, shape "
            f"{tuple(out.shape)}, strides {out.stride()}"
        )
    chosen = kernels("image", choose("image.decode_resize", LIMITS, backend, b""))
    mode = crop if isinstance(crop, str) else "boxes"
    return out, chosen.decode_resize(jpegs, size, mode, boxes, interpolation, exact, out, max_pixels, threads)
