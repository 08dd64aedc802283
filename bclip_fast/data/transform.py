"""Images to model input: open_clip's evaluation transform on Pillow alone, and the random crop of training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..ops.image import CLIP_MEAN, CLIP_STD, shortest_edge_size

if TYPE_CHECKING:
    from PIL import Image

# A strip one pixel high would be resized to any width: this is 400 MB as RGB.
_MAX_RESIZED_PIXELS = 1 << 27


@dataclass(frozen=True)
class PreprocessConfig:
    """What `preprocess_cfg` of an open_clip_config.json says; the defaults are BiomedCLIP's."""

    size: int = 224
    """Side of the square result in pixels."""
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    resize_mode: Literal["shortest", "squash"] = "shortest"
    """shortest: the shorter edge becomes `size`, then a centre crop; squash: both edges become `size`."""

    def __post_init__(self) -> None:
        if isinstance(self.size, bool) or not isinstance(self.size, int) or not 1 <= self.size <= 16384:
            raise UserError(f"preprocess size is {self.size!r}; it must be a whole number from 1 to 16384")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if len(values) != 3 or not all(isinstance(v, int | float) and math.isfinite(v) for v in values):
                raise UserError(f"preprocess {name} is {values!r}; it must be three numbers")
        if not all(self.std):
            raise UserError(f"preprocess std is {self.std!r}; none of its numbers may be 0")
        if self.interpolation not in ("bicubic", "bilinear"):
            raise UserError(f"preprocess interpolation is {self.interpolation!r}; choose bicubic or bilinear")
        if self.resize_mode not in ("shortest", "squash"):
            raise UserError(f"preprocess resize_mode is {self.resize_mode!r}; choose shortest or squash")


class Preprocess:
    """open_clip's evaluation transform: resize, centre crop, scale to [0, 1], normalise.

    The image is converted to RGB first. open_clip converts after the resize; for RGB images there is no difference,
    but a palette (P), bilevel (1) or 16-bit (I;16) image resized before the conversion is resized in colour indices,
    without antialiasing, or clipped: a wrong picture, which is why the order here differs for those modes.
    """

    def __init__(self, config: PreprocessConfig | None = None) -> None:
        self.config = config or PreprocessConfig()

    def __call__(self, image: Image.Image) -> Tensor:
        """A picture of any size and mode -> (3, size, size) float32.

        Raises:
            UserError: the picture is so long and narrow that its resized form wouldn't fit in memory.
        """
        pixels = self.to_uint8(image)
        # The operations of torchvision's ToTensor and Normalize in their order, so that results are equal bit for bit.
        scaled = pixels.permute(2, 0, 1).contiguous().float().div(255)
        return scaled.sub_(_channels(self.config.mean)).div_(_channels(self.config.std))

    def to_uint8(self, image: Image.Image) -> Tensor:
        """The resized and cropped picture before scaling: (size, size, 3) uint8."""
        from PIL import Image as Pillow

        size = self.config.size
        image = to_rgb(image)
        height, width, top, left = self.place(image.height, image.width)
        target = (width, height)
        if target != image.size:
            bicubic = self.config.interpolation == "bicubic"
            image = image.resize(target, Pillow.Resampling.BICUBIC if bicubic else Pillow.Resampling.BILINEAR)
        image = image.crop((left, top, left + size, top + size))
        return torch.from_numpy(np.array(image))

    def place(self, height: int, width: int) -> tuple[int, int, int, int]:
        """(height, width) to which a picture of this size is resized, and (top, left) of the square that is cut out.

        Raises:
            UserError: it is so long and narrow that its resized form wouldn't fit in memory.
        """
        size = self.config.size
        if self.config.resize_mode == "squash":
            return size, size, 0, 0
        wide, high = shortest_edge_size(width, height, size)
        if wide * high > _MAX_RESIZED_PIXELS:
            raise UserError(f"a picture of {width} x {height} pixels is too narrow to be resized to {size}")
        # torchvision rounds half to even, as Python's round does.
        return high, wide, round((high - size) / 2), round((wide - size) / 2)


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture in mode RGB; 16-bit and float greys are scaled to 8 bits by their own range, not clipped."""
    if image.mode.startswith("I") or image.mode == "F":
        image = _grey_to_8_bits(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _grey_to_8_bits(image: Image.Image) -> Image.Image:
    from PIL import Image as Pillow

    values = np.asarray(image, dtype=np.float64)
    values = np.nan_to_num(values, posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    scaled = (values - low) * (255.0 / (high - low)) if high > low else np.zeros_like(values)
    return Pillow.fromarray(scaled.round().astype(np.uint8))


def random_resized_crop_box(
    height: int,
    width: int,
    seed: int,
    epoch: int,
    sample: int,
    scale: tuple[float, float] = (0.9, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
    """The crop of torchvision's RandomResizedCrop, as a function of (seed, epoch, sample) alone.

    Ten attempts draw an area of `scale` times the image's and an aspect ratio, log-uniform in `ratio`; if none fits,
    the largest centre crop whose ratio is allowed. The random numbers are those of the counter-based Philox generator
    keyed by seed and epoch at position `sample`, so the order of calls, workers and ranks don't matter.

    Returns:
        (top, left, height, width) in pixels, inside the image.

    Raises:
        UserError: a size, scale or ratio that is not positive or not in rising order.
    """
    if height < 1 or width < 1:
        raise UserError(f"an image of {height} x {width} pixels cannot be cropped")
    if not 0 < scale[0] <= scale[1] or not 0 < ratio[0] <= ratio[1]:
        raise UserError(f"crop scale {scale} and ratio {ratio} must be positive and rising")
    mask = 0xFFFFFFFFFFFFFFFF
    bits = np.random.Philox(key=[seed & mask, epoch & mask], counter=[0, 0, sample & mask, 0])
    # One draw of all 40 numbers costs less than many small ones.
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
    """(b, H, W, 3) uint8 -> (b, 3, H, W) of dtype on the same device; computed in float32."""
    scaled = images.permute(0, 3, 1, 2).float().div(255)
    centred = scaled.sub(_channels(mean).to(images.device)).div(_channels(std).to(images.device))
    return centred.to(dtype=dtype, memory_format=torch.contiguous_format)


def _channels(values: tuple[float, float, float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).view(3, 1, 1)
