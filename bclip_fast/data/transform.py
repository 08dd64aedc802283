"""Convert images to model input: open_clip's evaluation transform with Pillow only, and the random crop of training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from bclip_fast.errors import UserError
from bclip_fast.ops.image import CLIP_MEAN, CLIP_STD, shortest_edge_size

from .image_files import ImageConversion
from .image_files.colours import to_rgb

if TYPE_CHECKING:
    from PIL import Image

# Limit for very long images, whose shorter side is enlarged. As RGB, these pixels take 400 MB.
_MAX_RESIZED_PIXELS = 1 << 27


@dataclass(frozen=True)
class PreprocessConfig:
    """The `preprocess_cfg` of an open_clip_config.json. The defaults are BiomedCLIP's."""

    size: int = 224
    """Side of the square result, in pixels."""
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    resize_mode: Literal["shortest", "squash"] = "shortest"
    """shortest: the shorter edge becomes `size`, then a centre crop follows. squash: both edges become `size`."""
    conversion: ImageConversion = "standard"
    """standard: the rules of `data.image_files`, before the resize. open_clip: Pillow's convert("RGB") after the resize
    and the crop, to repeat open_clip's published results. They differ for palettes, transparency, 1-bit and 16-bit
    images, and turned photographs."""

    def __post_init__(self) -> None:
        if isinstance(self.size, bool) or not isinstance(self.size, int) or not 1 <= self.size <= 16384:
            raise UserError(f"preprocess size={self.size!r} must be a whole number from 1 to 16384")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if len(values) != 3 or not all(isinstance(v, int | float) and math.isfinite(v) for v in values):
                raise UserError(f"preprocess {name}={values!r} must be three finite numbers")
        if not all(self.std):
            raise UserError(f"preprocess std={self.std!r} must not contain 0")
        if self.interpolation not in ("bicubic", "bilinear"):
            raise UserError(f"preprocess interpolation={self.interpolation!r} must be bicubic or bilinear")
        if self.resize_mode not in ("shortest", "squash"):
            raise UserError(f"preprocess resize_mode={self.resize_mode!r} must be shortest or squash")
        if self.conversion not in ("standard", "open_clip"):
            raise UserError(f"preprocess conversion={self.conversion!r} must be standard or open_clip")


class Preprocess:
    """open_clip's evaluation transform: resize, centre crop, scale to [0, 1], normalise.

    This class converts to RGB first, and open_clip converts after the resize. RGB images give the same result. Some
    other modes come out wrong in open_clip. It resizes the colour indices of a palette image (P), does not antialias
    a bilevel image (1), and clips a 16-bit image (I;16). `PreprocessConfig.conversion` selects open_clip's order.
    """

    def __init__(self, config: PreprocessConfig | None = None) -> None:
        self.config = config or PreprocessConfig()

    def __call__(self, image: Image.Image) -> Tensor:
        """Convert an image of any size and mode to (3, size, size) float32.

        Raises:
            UserError: the image is so narrow that its resized form would not fit in memory.
        """
        pixels = self.to_uint8(image)
        # Use the same operations in the same order as torchvision's ToTensor and Normalize, for bitwise equal results.
        scaled = pixels.permute(2, 0, 1).contiguous().float().div(255)
        return scaled.sub_(_channels(self.config.mean)).div_(_channels(self.config.std))

    def to_uint8(self, image: Image.Image, box: tuple[int, int, int, int] | None = None) -> Tensor:
        """Resize and crop an image, without scaling its values: (size, size, 3) uint8.

        box: (top, left, height, width) in pixels, to cut out and resize to the square. None: the evaluation transform.
        """
        from PIL import Image as Pillow

        size = self.config.size
        resampling = getattr(Pillow.Resampling, self.config.interpolation.upper())
        if self.config.conversion == "standard":
            image = to_rgb(image)
        if box is not None:
            top, left, height, width = box
            image = image.crop((left, top, left + width, top + height)).resize((size, size), resampling)
            return torch.from_numpy(np.array(image.convert("RGB")))
        height, width, top, left = self.geometry(image.height, image.width)
        if (width, height) != image.size:
            image = image.resize((width, height), resampling)
        image = image.crop((left, top, left + size, top + size)).convert("RGB")
        return torch.from_numpy(np.array(image))

    def geometry(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Return (height, width) after the resize of an image of this size, and (top, left) of its square crop.

        Raises:
            UserError: the image is so narrow that its resized form would not fit in memory.
        """
        size = self.config.size
        if self.config.resize_mode == "squash":
            return size, size, 0, 0
        wide, high = shortest_edge_size(width, height, size)
        if wide * high > _MAX_RESIZED_PIXELS:
            raise UserError(f"an image of {width} x {height} pixels is too narrow to be resized to {size}")
        # Like torchvision, Python's round() rounds half to even.
        return high, wide, round((high - size) / 2), round((wide - size) / 2)


def random_resized_crop_box(
    height: int,
    width: int,
    seed: int,
    epoch: int,
    sample: int,
    scale: tuple[float, float] = (0.9, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
    """Return the crop of torchvision's RandomResizedCrop, as a function of (seed, epoch, sample).

    Each of ten attempts draws an area, uniform in `scale` times the image's area, and an aspect ratio, log-uniform in
    `ratio`. If no attempt fits, the result is the largest centre crop with an allowed ratio. The random numbers come
    from the counter-based Philox generator, keyed by seed and epoch, at position `sample`. The order of calls, workers
    and ranks therefore doesn't matter.

    Returns:
        (top, left, height, width) in pixels, inside the image.

    Raises:
        UserError: a size, scale or ratio is not positive, or a range is not increasing.
    """
    if height < 1 or width < 1:
        raise UserError(f"an image of {height} x {width} pixels cannot be cropped")
    if not 0 < scale[0] <= scale[1] or not 0 < ratio[0] <= ratio[1]:
        raise UserError(f"crop scale {scale} and ratio {ratio} must be positive and increasing")
    mask = 0xFFFFFFFFFFFFFFFF
    bits = np.random.Philox(key=[seed & mask, epoch & mask], counter=[0, 0, sample & mask, 0])
    # One draw of 40 numbers is faster than many small draws.
    draws = np.random.Generator(bits).random((10, 4))
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    for area_draw, ratio_draw, top_draw, left_draw in draws.tolist():
        area = height * width * (scale[0] + (scale[1] - scale[0]) * area_draw)
        aspect = math.exp(log_low + (log_high - log_low) * ratio_draw)
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(top_draw * (height - crop_height + 1))
            left = int(left_draw * (width - crop_width + 1))
            return top, left, crop_height, crop_width
    crop_width, crop_height = width, height
    if width / height < ratio[0]:
        crop_height = min(height, max(1, round(width / ratio[0])))
    elif width / height > ratio[1]:
        crop_width = min(width, max(1, round(height * ratio[1])))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def normalize(
    images: Tensor,
    mean: tuple[float, float, float] = CLIP_MEAN,
    std: tuple[float, float, float] = CLIP_STD,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Normalise (b, H, W, 3) uint8 to (b, 3, H, W) of `dtype` on the same device, computed in float32."""
    scaled = images.permute(0, 3, 1, 2).float().div(255)
    centred = scaled.sub(_channels(mean).to(images.device)).div(_channels(std).to(images.device))
    return centred.to(dtype=dtype, memory_format=torch.contiguous_format)


def denormalize(images: Tensor, config: PreprocessConfig) -> Tensor:
    """The pixels (b, H, W, 3) uint8 of images (b, 3, H, W) that were normalised by `config`. Exact in float32."""
    scaled = images.float() * _channels(config.std).to(images.device) + _channels(config.mean).to(images.device)
    return scaled.mul_(255).round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _channels(values: tuple[float, float, float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).view(3, 1, 1)
