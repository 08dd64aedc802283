"""The definition: Pillow's pixels, and its resizing by a filter that is stretched by the scale when shrinking."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from . import shortest_edge_size
from .call import ResizeCall


def decode(data: bytes, max_pixels: int) -> Tensor:
    """(H, W, 3) uint8 RGB pixels."""
    return torch.from_numpy(np.array(_rgb(data, max_pixels)))


def peek_size(data: bytes) -> tuple[int, int]:
    """(height, width)"""
    image = _open(data)
    return image.height, image.width


def decode_resize(call: ResizeCall) -> dict[int, str]:
    """Writes `call.out`, and returns the error of each bad file by index. It ignores `exact` and `threads`."""
    errors, size = {}, call.size
    resample = Image.Resampling[call.interpolation.upper()]
    for index, data in enumerate(call.jpegs):
        try:
            image = _rgb(data, call.max_pixels)
            if call.boxes is not None:
                image = _cut(image, *call.boxes[index].tolist())
            target = (size, size) if call.crop != "center" else shortest_edge_size(*image.size, size)
            for step in (_between(*image.size, *target), target):
                image = image if step == image.size else image.resize(step, resample)
            # torchvision rounds half to even, like Python's round.
            left, top = round((target[0] - size) / 2), round((target[1] - size) / 2)
            call.out[index] = torch.from_numpy(np.array(image.crop((left, top, left + size, top + size))))
        except (ValueError, MemoryError) as error:
            call.out[index] = 0
            errors[index] = str(error)
    return errors


def _between(width: int, height: int, new_width: int, new_height: int) -> tuple[int, int]:
    """(width, height) after the first of two passes, in Pillow 13's order. Older releases always start along rows."""
    reduced = height - new_height
    return (width, new_height) if reduced > max(0, 2 * (width - new_width)) else (new_width, height)


def _cut(image: Image.Image, top: int, left: int, height: int, width: int) -> Image.Image:
    if min(top, left, height - 1, width - 1) < 0 or top + height > image.height or left + width > image.width:
        raise ValueError(
            f"box (top {top}, left {left}, height {height}, width {width}) is not inside the image of "
            f"{image.width}x{image.height} pixels"
        )
    return image.crop((left, top, left + width, top + height))


def _rgb(data: bytes, max_pixels: int) -> Image.Image:
    image = _open(data)
    if image.width * image.height > max_pixels:
        raise ValueError(f"JPEG of {image.width}x{image.height} pixels exceeds the limit of {max_pixels} pixels")
    try:
        return image.convert("RGB")
    except (OSError, SyntaxError) as error:
        raise ValueError(f"JPEG cannot be decoded: {error}") from error


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=("JPEG",))
    except (OSError, SyntaxError) as error:
        raise ValueError(f"not a JPEG: {error}") from error
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from error
