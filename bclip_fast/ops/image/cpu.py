"""libjpeg-turbo through `_cpu`, which decodes rows straight into memory that is allocated here."""

from __future__ import annotations

import torch
from torch import Tensor

from bclip_fast import _cpu
from bclip_fast.ops.pointers import address

from .call import ResizeCall


def decode(data: bytes, max_pixels: int) -> Tensor:
    """(H, W, 3) uint8 RGB pixels."""
    height, width = _cpu.jpeg_size(data)
    if width * height > max_pixels:
        raise ValueError(f"JPEG of {width}x{height} pixels exceeds the limit of {max_pixels} pixels")
    pixels = torch.empty((height, width, 3), dtype=torch.uint8, device="cpu")
    _cpu.decode_jpeg(data, pixels.data_ptr(), height, width)
    return pixels


def peek_size(data: bytes) -> tuple[int, int]:
    """(height, width)"""
    return _cpu.jpeg_size(data)


def decode_resize(call: ResizeCall) -> dict[int, str]:
    """Writes `call.out` (csrc/image.h), and returns the error of each bad file by index."""
    number, size = len(call.jpegs), call.size
    return dict(
        _cpu.decode_resize(
            list(call.jpegs),
            size,
            getattr(_cpu.Crop, call.crop),
            0 if call.boxes is None else address(call.boxes, torch.int64, number, 4),
            call.interpolation == "bicubic",
            call.exact,
            call.max_pixels,
            address(call.out, torch.uint8, number, size, size, 3),
            call.threads,
        )
    )
