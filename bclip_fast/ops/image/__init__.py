"""JPEG to RGB pixels, and to squares resized as Pillow resizes. EXIF orientation isn't applied, as in Pillow and
open_clip. There are no gradients: these are plain functions, not torch operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..cuda_device import CUDA_HOST, cuda_refusal
from ..dispatch import Limits, choose, kernels

__all__ = [
    "CLIP_MEAN",
    "CLIP_STD",
    "FILE_LIMITS",
    "LIMITS",
    "MAX_PIXELS",
    "decode",
    "decode_resize",
    "decode_resize_normalize",
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


def _cuda(given: bytes | Tensor) -> str | None:
    """`given`: where the squares go, or for a file alone whether the library is there."""
    if isinstance(given, bytes):
        if CUDA_HOST is None and not torch.cuda.is_available():
            return "there is no CUDA device"
        given = torch.empty(0, device="cuda" if CUDA_HOST is None else "cpu")
    # The CPU decodes what nvJPEG refuses.
    reason = cuda_refusal(given, torch.float16) or _cpu(given)
    return reason or kernels("image", "cuda").library_refusal(given.device)


def _cpu(given: bytes | Tensor) -> str | None:
    from bclip_fast import _cpu

    return None if hasattr(_cpu, "decode_jpeg") else "built without libjpeg-turbo (BCLIP_JPEG=0)"


def _reference(given: bytes | Tensor) -> str | None:
    from importlib.util import find_spec

    return None if find_spec("PIL") else "Pillow is not installed"


# Of what reads a single file; cuda makes squares only, on a GPU.
FILE_LIMITS: Limits = {"cpu": _cpu, "reference": _reference}
LIMITS: Limits = {"cuda": _cuda, **FILE_LIMITS}


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
    return kernels("image", choose("image.decode", FILE_LIMITS, backend, data)).decode(data, max_pixels)


def peek_size(data: bytes, *, backend: str = "auto") -> tuple[int, int]:
    """(height, width) of a JPEG from its header alone. Raises as `decode` does."""
    return kernels("image", choose("image.peek_size", FILE_LIMITS, backend, data)).peek_size(data)


Crop = Literal["center", "squash"] | Tensor | Sequence[tuple[int, int, int, int]]


def decode_resize(
    jpegs: Sequence[bytes],
    size: int,
    *,
    crop: Crop = "center",
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
            and to upsample chroma without smoothing: faster, and about half a level off in the mean. The cuda backend
            always resizes exactly what nvJPEG decoded, which isn't libjpeg's to the bit.
        out: (n, size, size, 3) contiguous uint8 that is written and returned, on the CPU, pinned or a part of a batch,
            or on a GPU.
        max_pixels: a larger picture is an error, found in its header.
        threads: how many share the files; torch.get_num_threads() unless given.
        backend: "auto", "cuda" (nvJPEG and a kernel; `out` is on a GPU), "cpu" (C++ on libjpeg-turbo) or "reference"
            (Pillow, always exact and on one thread). "auto" takes cuda where `out` is on a GPU and nvJPEG is installed.

    Returns:
        The (n, size, size, 3) uint8 pixels, and the reason for each index whose file is not a JPEG, is broken or too
        large, or doesn't hold its box; its pixels are 0. The cpu backend doesn't read what lies below the part that is
        needed, so that it doesn't notice damage there; nor does cuda notice what nvJPEG lets pass.

    Raises:
        ValueError: a size, crop, interpolation, `out` or number of threads as it must not be; never for a file.
        BackendError: the named backend cannot run here.
    """
    shape = (len(jpegs), size, size, 3)
    wanted = _checked(len(jpegs), size, crop, interpolation, threads)
    if out is None:
        out = torch.empty(shape, dtype=torch.uint8, device="cpu")
    elif out.shape != shape or out.dtype != torch.uint8 or out.device.type not in _DEVICES or not out.is_contiguous():
        raise ValueError(
            f"out must be contiguous uint8 of shape {shape} on the CPU or a GPU, got {out.dtype}, {out.device}, shape "
            f"{tuple(out.shape)}, strides {out.stride()}"
        )
    chosen = choose("image.decode_resize", LIMITS, backend, out)
    if chosen == "cuda" or out.device.type == "cpu":
        errors = kernels("image", chosen).decode_resize(jpegs, size, *wanted, exact, out, max_pixels)
    else:
        pixels = torch.empty(shape, dtype=torch.uint8, device="cpu", pin_memory=True)
        errors = kernels("image", chosen).decode_resize(jpegs, size, *wanted, exact, pixels, max_pixels)
        out.copy_(pixels)
    return out, errors


def decode_resize_normalize(
    jpegs: Sequence[bytes],
    size: int,
    *,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cuda",
    crop: Crop = "center",
    interpolation: Literal["bicubic", "bilinear"] = "bicubic",
    exact: bool = True,
    max_pixels: int = MAX_PIXELS,
    threads: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, dict[int, str]]:
    """`decode_resize`'s levels as (level / 255 - mean) / std, channels first, where a model wants them.

    Args:
        mean, std: of each channel, on the scale of [0, 1].
        dtype: float32, bfloat16 or float16.
        device: of the result. The cuda backend decodes there; others decode on the CPU and normalise there.
        The rest: as of `decode_resize`.

    Returns:
        (n, 3, size, size) `dtype`, and the errors as `decode_resize` returns them; what failed is black, normalised.

    Raises:
        ValueError, BackendError: as `decode_resize`; and for a mean, std or dtype as it must not be.
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype is {dtype}; choose float32, bfloat16 or float16")
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(f"mean {tuple(mean)} and std {tuple(std)} must be three numbers each, std above 0")
    wanted = _checked(len(jpegs), size, crop, interpolation, threads)
    out = torch.empty((len(jpegs), 3, size, size), dtype=dtype, device=device)
    chosen = choose("image.decode_resize_normalize", LIMITS, backend, out)
    if chosen == "cuda":
        call = kernels("image", chosen).decode_resize
        return out, call(jpegs, size, *wanted, exact, out, max_pixels, mean, std)
    pixels = torch.empty((len(jpegs), size, size, 3), dtype=torch.uint8, device="cpu", pin_memory=out.is_cuda)
    errors = kernels("image", chosen).decode_resize(jpegs, size, *wanted, exact, pixels, max_pixels)
    levels = pixels.to(out.device).permute(0, 3, 1, 2) / 255
    means, deviations = (torch.tensor(values, device=out.device).view(3, 1, 1) for values in (mean, std))
    return out.copy_((levels - means) / deviations), errors


_DEVICES = ("cpu", "cuda")


def _checked(count: int, size: int, crop: Crop, interpolation: str, threads: int | None) -> tuple[Any, ...]:
    """(crop's name, boxes, interpolation, threads) as backends take them."""
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= 16384:
        raise ValueError(f"size is {size!r}; it must be a whole number from 1 to 16384")
    if interpolation not in ("bicubic", "bilinear"):
        raise ValueError(f"interpolation is {interpolation!r}; choose bicubic or bilinear")
    threads = torch.get_num_threads() if threads is None else threads
    if threads < 1:
        raise ValueError(f"threads={threads}: at least one is needed")
    if isinstance(crop, str):
        if crop not in ("center", "squash"):
            raise ValueError(f"crop is {crop!r}; choose center, squash or boxes")
        return crop, None, interpolation, threads
    boxes = torch.as_tensor(crop, dtype=torch.int64, device="cpu").contiguous()
    if boxes.shape != (count, 4):
        raise ValueError(f"crop has the shape {tuple(boxes.shape)}; {count} files need ({count}, 4)")
    return "boxes", boxes, interpolation, threads
