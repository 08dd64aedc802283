"""JPEG files to RGB pixels, and to squares resized exactly as Pillow resizes.

Like Pillow and open_clip, the functions don't apply the EXIF orientation. They have no gradients: they are plain
functions, not torch operators.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from bclip_fast.ops.cuda_device import CUDA_HOST, cuda_refusal
from bclip_fast.ops.dispatch import MISSING, Limits, choose, load_backend

from .call import ResizeCall

__all__ = [
    "CLIP_MEAN",
    "CLIP_STD",
    "FILE_LIMITS",
    "LIMITS",
    "MAX_PIXELS",
    "SIGLIP_MEAN",
    "SIGLIP_STD",
    "decode",
    "decode_resize",
    "decode_resize_normalize",
    "peek_size",
    "shortest_edge_size",
]

# CLIP's normalisation of images, by channel, on the scale of [0, 1].
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# SigLIP's, which maps pixels to [-1, 1].
SIGLIP_MEAN = SIGLIP_STD = (0.5, 0.5, 0.5)

MAX_PIXELS = 178_956_970  # Pillow's limit against decompression bombs


def shortest_edge_size(width: int, height: int, size: int) -> tuple[int, int]:
    """(width, height) with the shorter edge `size` and the longer edge truncated to whole pixels, as in torchvision."""
    if width <= height:
        return size, int(size * height / width)
    return int(size * width / height), size


# A limit takes the tensor for the squares, or a file for the operators that read a single file.


def _cuda_limits(target: bytes | Tensor) -> str | None:
    if isinstance(target, bytes):
        if CUDA_HOST is None and not torch.cuda.is_available():
            return "this machine has no CUDA device"
        target = torch.empty(0, device="cuda" if CUDA_HOST is None else "cpu")
    if reason := cuda_refusal(target, torch.float16):
        return reason
    if host_backend() is None:
        return "neither libjpeg-turbo nor Pillow is there, to decode what nvJPEG refuses"
    return load_backend("image", "cuda").library_refusal(target.device)


def host_backend() -> str | None:
    """The backend that decodes the files that nvJPEG refuses, or None if no backend can."""
    limits = {"cpu": _cpu_limits, "reference": _reference_limits}
    return next((name for name, limit in limits.items() if limit(b"") is None), None)


def _cpu_limits(target: bytes | Tensor) -> str | None:
    if reason := MISSING.get("cpu"):
        return reason
    from bclip_fast import _cpu

    return None if hasattr(_cpu, "decode_jpeg") else "built without libjpeg-turbo (BCLIP_JPEG=0)"


def _reference_limits(target: bytes | Tensor) -> str | None:
    return None if find_spec("PIL") else "Pillow is not installed"


# The limits of operators that read a single file. The cuda backend only makes squares, on a GPU.
FILE_LIMITS: Limits = {"cpu": _cpu_limits, "reference": _reference_limits}
LIMITS: Limits = {"cuda": _cuda_limits, **FILE_LIMITS}


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS, backend: str = "auto") -> Tensor:
    """The RGB pixels of a JPEG file. Grey is repeated. CMYK and YCCK are converted as Pillow converts them.

    Args:
        data: the complete file.
        max_pixels: limit of the image's pixels. A larger image is refused from its header, before memory is allocated.
        backend: "auto", "cpu" (libjpeg-turbo) or "reference" (Pillow).

    Returns:
        (H, W, 3) uint8.

    Raises:
        ValueError: the file is not a JPEG, is truncated or corrupt, or has more than `max_pixels`.
        BackendError: the named backend cannot run here.
    """
    return load_backend("image", choose("image.decode", FILE_LIMITS, backend, data)).decode(data, max_pixels)


def peek_size(data: bytes, *, backend: str = "auto") -> tuple[int, int]:
    """(height, width) of a JPEG file, from its header. Errors are those of `decode`."""
    return load_backend("image", choose("image.peek_size", FILE_LIMITS, backend, data)).peek_size(data)


Crop = Literal["center", "squash"] | Tensor | Sequence[tuple[int, int, int, int]]
OnBad = Literal["raise", "report"]


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
    on_bad: OnBad = "raise",
    backend: str = "auto",
) -> tuple[Tensor, dict[int, str]]:
    """JPEG files to squares of RGB pixels, bit for bit those of `decode` and Pillow 13's antialiased `resize`.

    Args:
        jpegs: n complete files.
        size: side of the squares in pixels, 1 to 16384.
        crop: "center", "squash" or n boxes (top, left, height, width) in pixels. "center" resizes the shorter edge to
            `size` and the longer edge in proportion, truncated to whole pixels. Then it crops both ends of the longer
            edge, like torchvision's Resize and CenterCrop. "squash" resizes both edges to `size`. Each box is cut out
            before it is resized.
        exact: False allows decoding an image at 1/2, 1/4 or 1/8 of its size if it is much larger than the square, and
            upsampling chroma without smoothing. This is faster, with a mean error of about half a level. The cuda
            backend always resizes exactly, but nvJPEG's pixels are not bit for bit libjpeg's.
        out: (n, size, size, 3) contiguous uint8 tensor to write and return. It may be on a GPU or on the CPU, pinned,
            or part of a batch.
        max_pixels: limit of an image's pixels, checked in its header. A larger image is an error.
        threads: number of threads that share the files. torch.get_num_threads() by default.
        on_bad: "raise" raises ValueError for a bad file, after all files have been read. "report" returns its error
            instead, and its pixels are 0.
        backend: "auto", "cuda" (nvJPEG and a kernel, for `out` on a GPU), "cpu" (C++ on libjpeg-turbo) or "reference"
            (Pillow, always exact and on one thread). "auto" takes cuda if `out` is on a GPU and nvJPEG is installed.

    Returns:
        The (n, size, size, 3) uint8 pixels, and a dict with the error message of each bad file by index. A bad file is
        not a JPEG, damaged, too large, or smaller than its box. docs/images.md lists the signs of damage. The cpu
        backend doesn't read the file below the part that it needs, so it doesn't notice damage there. The cuda backend
        doesn't notice damage that nvJPEG accepts, and the reference none that Pillow accepts.

    Raises:
        ValueError: size, crop, interpolation, `out`, threads or `on_bad` is invalid, or a file is bad.
        BackendError: the named backend cannot run here.
    """
    _check_size(size)
    _check_on_bad(on_bad)
    shape = (len(jpegs), size, size, 3)
    if out is None:
        out = torch.empty(shape, dtype=torch.uint8, device="cpu")
    elif out.shape != shape or out.dtype != torch.uint8 or out.device.type not in _DEVICES or not out.is_contiguous():
        raise ValueError(
            f"out must be contiguous uint8 of shape {shape} on the CPU or a GPU, got {out.dtype}, {out.device}, shape "
            f"{tuple(out.shape)}, strides {out.stride()}"
        )
    call = _checked(jpegs, size, crop, interpolation, threads, exact, max_pixels, out)
    chosen = choose("image.decode_resize", LIMITS, backend, out)
    if chosen == "cuda" or out.device.type == "cpu":
        return out, _reported(load_backend("image", chosen).decode_resize(call), len(jpegs), on_bad)
    pixels = torch.empty(shape, dtype=torch.uint8, device="cpu", pin_memory=True)
    errors = load_backend("image", chosen).decode_resize(replace(call, out=pixels))
    return out.copy_(pixels), _reported(errors, len(jpegs), on_bad)


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
    on_bad: OnBad = "raise",
    backend: str = "auto",
) -> tuple[Tensor, dict[int, str]]:
    """The levels of `decode_resize` as (level / 255 - mean) / std, channels first, on the model's device.

    Args:
        mean, std: mean and standard deviation of each channel, on the scale of [0, 1].
        dtype: float32, bfloat16 or float16.
        device: device of the result. The cuda backend decodes on it. Other backends decode on the CPU and normalise on
            the device.
        Other arguments: as in `decode_resize`.

    Returns:
        (n, 3, size, size) in `dtype`, and the errors of `decode_resize`. A bad file's pixels are normalised black.

    Raises:
        ValueError: an argument of `decode_resize`, mean, std or dtype is invalid, or a file is bad.
        BackendError: the named backend cannot run here.
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype is {dtype}; choose float32, bfloat16 or float16")
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(f"mean {tuple(mean)} and std {tuple(std)} must be three numbers each, std above 0")
    _check_size(size)
    _check_on_bad(on_bad)
    out = torch.empty((len(jpegs), 3, size, size), dtype=dtype, device=device)
    call = _checked(jpegs, size, crop, interpolation, threads, exact, max_pixels, out)
    chosen = choose("image.decode_resize_normalize", LIMITS, backend, out)
    if chosen == "cuda":
        errors = load_backend("image", chosen).decode_resize(replace(call, mean=mean, std=std))
        return out, _reported(errors, len(jpegs), on_bad)
    pixels = torch.empty((len(jpegs), size, size, 3), dtype=torch.uint8, device="cpu", pin_memory=out.is_cuda)
    errors = load_backend("image", chosen).decode_resize(replace(call, out=pixels))
    levels = pixels.to(out.device).permute(0, 3, 1, 2) / 255
    means, deviations = (torch.tensor(values, device=out.device).view(3, 1, 1) for values in (mean, std))
    return out.copy_((levels - means) / deviations), _reported(errors, len(jpegs), on_bad)


_DEVICES = ("cpu", "cuda")


def _check_size(size: int) -> None:
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= 16384:
        raise ValueError(f"size is {size!r}; it must be a whole number from 1 to 16384")


def _check_on_bad(on_bad: str) -> None:
    if on_bad not in ("raise", "report"):
        raise ValueError(f"on_bad is {on_bad!r}; choose raise or report")


def _reported(errors: dict[int, str], num_files: int, on_bad: OnBad) -> dict[int, str]:
    if not errors or on_bad == "report":
        return errors
    index, reason = next(iter(errors.items()))
    others = f" (and {len(errors) - 1} others)" if len(errors) > 1 else ""
    raise ValueError(f'file {index} of {num_files}{others}: {reason}; on_bad="report" returns the errors instead')


def _checked(
    jpegs: Sequence[bytes],
    size: int,
    crop: Crop,
    interpolation: str,
    threads: int | None,
    exact: bool,
    max_pixels: int,
    out: Tensor,
) -> ResizeCall:
    if interpolation not in ("bicubic", "bilinear"):
        raise ValueError(f"interpolation is {interpolation!r}; choose bicubic or bilinear")
    threads = torch.get_num_threads() if threads is None else threads
    if threads < 1:
        raise ValueError(f"threads={threads} must be at least 1")
    boxes = None
    if not isinstance(crop, str):
        boxes = torch.as_tensor(crop, dtype=torch.int64, device="cpu").contiguous()
        if boxes.shape != (len(jpegs), 4):
            raise ValueError(f"crop has the shape {tuple(boxes.shape)}; {len(jpegs)} files need ({len(jpegs)}, 4)")
        crop = "boxes"  # type: ignore[assignment]
    elif crop not in ("center", "squash"):
        raise ValueError(f"crop is {crop!r}; choose center, squash or boxes")
    return ResizeCall(jpegs, size, str(crop), boxes, interpolation, threads, exact, max_pixels, out)
