"""A call of the resizing operators, as every backend receives it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ResizeCall:
    """Files to decode, crop and resize into squares of pixels."""

    jpegs: Sequence[bytes]  # n files
    size: int  # side of the squares in pixels
    crop: str  # "center", "squash" or "boxes"
    boxes: Tensor | None  # (n, 4) int64 on the CPU: top, left, height, width
    interpolation: str  # "bicubic" or "bilinear"
    threads: int
    exact: bool
    max_pixels: int
    out: Tensor  # (n, size, size, 3) uint8, or, with mean and std, (n, 3, size, size)
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
