"""libjpeg-turbo through `_cpu`: the header is read, the output allocated here, the rows decoded straight into it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bclip_fast import _cpu

from ..cuda_device import address


def decode(data: bytes, max_pixels: int) -> Tensor:
    height, width = _cpu.jpeg_size(data)
    if width * height > max_pixels:
        raise ValueError(f"JPEG of {width}x{height} pixels exceeds the limit of {max_pixels} pixels")
    pixels = torch.empty((height, width, 3), dtype=torch.uint8, device="cpu")
    _cpu.decode_jpeg(data, pixels.data_ptr(), height, width)
    return pixels


def peek_size(data: bytes) -> tuple[int, int]:
    return _cpu.jpeg_size(data)


def decode_resize(
    jpegs: Sequence[bytes],
    size: int,
    crop: str,
    boxes: Tensor | None,
    interpolation: str,
    threads: int,
    exact: bool,
    out: Tensor,
    max_pixels: int,
) -> dict[int, str]:
    """Writes `out`; see image.h."""
    return dict(
        _cpu.decode_resize(
            list(jpegs),
            size,
            getattr(_cpu.Crop, crop),
            0 if boxes is None else address(boxes, torch.int64, len(jpegs), 4),
            interpolation == "bicubic",
            exact,
            max_pixels,
            address(out, torch.uint8, len(jpegs), size, size, 3),
            threads,
        )
    )
