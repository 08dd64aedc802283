"""The definition: what Pillow decodes."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def decode(data: bytes, max_pixels: int) -> Tensor:
    image = _open(data)
    if image.width * image.height > max_pixels:
        raise ValueError(f"JPEG of {image.width}x{image.height} pixels exceeds the limit of {max_pixels} pixels")
    try:
        return torch.from_numpy(np.array(image.convert("RGB")))
    except (OSError, SyntaxError) as error:
        raise ValueError(f"JPEG cannot be decoded: {error}") from error


def peek_size(data: bytes) -> tuple[int, int]:
    image = _open(data)
    return image.height, image.width


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=("JPEG",))
    except (OSError, SyntaxError) as error:
        raise ValueError(f"not a JPEG: {error}") from error
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from error
