"""libjpeg-turbo through `_cpu`: the header is read, the output allocated here, the rows decoded straight into it."""

from __future__ import annotations

import torch
from torch import Tensor

from bclip_fast import _cpu


def decode(data: bytes, max_pixels: int) -> Tensor:
    height, width = _cpu.jpeg_size(data)
    if width * height > max_pixels:
        raise ValueError(f"JPEG of {width}x{height} pixels exceeds the limit of {max_pixels} pixels")
    pixels = torch.empty((height, width, 3), dtype=torch.uint8)
    _cpu.decode_jpeg(data, pixels.data_ptr(), height, width)
    return pixels


def peek_size(data: bytes) -> tuple[int, int]:
    return _cpu.jpeg_size(data)
