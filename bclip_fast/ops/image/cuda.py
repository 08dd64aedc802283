"""nvJPEG and the kernels of csrc/cuda/image/ on NVIDIA GPUs from sm_80 on; not yet run on one.

nvJPEG is given baseline files whose colours it reads as libjpeg does (csrc/cuda/image/nvjpeg.h), all at once; the CPU
decodes the rest and what nvJPEG refuses. The library is BCLIP_NVJPEG's file, or one of a wheel, of CUDA_HOME or of the
system.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..cuda_device import address, cuda_address, cuda_module, cuda_stream
from . import decode

# Decoded pixels that are held at a time, unless one picture has more.
BATCH_BYTES = 2**30

# nvJPEG's own alignment isn't documented; this is that of CUDA's allocations.
ALIGNMENT = 256


def library_refusal(device: torch.device) -> str | None:
    """The reason why there is no nvJPEG on this device, or None."""
    found = _library(device)
    return found if isinstance(found, str) else None


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
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> dict[int, str]:
    """Writes `out`, (n, size, size, 3) uint8 or, with mean and std, (n, 3, size, size); `exact` doesn't matter."""
    files = list(jpegs)
    errors: dict[int, str] = {}
    # Either the size that nvJPEG will decode to, or what the CPU decoded.
    sources: dict[int, tuple[int, int] | Tensor] = {}
    for index, (height, width) in enumerate(cuda_module().plain_jpegs(files)):
        if height * width > max_pixels:
            errors[index] = f"JPEG of {width}x{height} pixels exceeds the limit of {max_pixels} pixels"
        elif height:
            sources[index] = height, width
    with ThreadPoolExecutor(threads) as pool, torch.cuda.device_of(out):
        others = [index for index in range(len(files)) if index not in sources and index not in errors]
        _decode_on_cpu(pool, files, others, max_pixels, sources, errors)
        for own in _batches(len(files), sources):
            part = slice(own.start, own.stop)
            square = _Squares(size, crop, None if boxes is None else boxes[part], interpolation, out[part], mean, std)
            held = {i - own.start: sources.pop(i) for i in own if i in sources}
            try:
                square.write(files[part], held, pool, max_pixels, threads)
            finally:
                # nvJPEG may still read the files, which are the caller's.
                if out.is_cuda:
                    torch.cuda.current_stream(out.device).synchronize()
            errors |= {own.start + index: reason for index, reason in square.errors.items()}
    return dict(sorted(errors.items()))


class _Squares:
    """A batch of neighbours on its way through the device."""

    def __init__(
        self,
        size: int,
        crop: str,
        boxes: Tensor | None,
        interpolation: str,
        out: Tensor,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
    ) -> None:
        self.size, self.crop, self.boxes, self.bicubic = size, crop, boxes, interpolation == "bicubic"
        self.out, self.errors = out, dict[int, str]()
        self.factor, self.shift = [0.0] * 3, [0.0] * 3
        if mean is not None and std is not None:
            self.factor = [1 / (255 * deviation) for deviation in std]
            self.shift = [-center / deviation for center, deviation in zip(mean, std, strict=True)]

    def write(
        self,
        files: list[bytes],
        sources: dict[int, tuple[int, int] | Tensor],
        pool: ThreadPoolExecutor,
        max_pixels: int,
        threads: int,
    ) -> None:
        module, device, stream = cuda_module(), self.out.device, cuda_stream(self.out)
        places, total = [(-1, 0, 0)] * len(files), 0
        for index, source in sources.items():
            height, width = source.shape[:2] if isinstance(source, Tensor) else source
            places[index] = total, height, width
            total += -(-height * width * 3 // ALIGNMENT) * ALIGNMENT
        _, _, misplaced = self._plan(places)
        for index, reason in misplaced:
            self.errors[index] = reason
            places[index] = -1, 0, 0
            del sources[index]
        pixels = torch.empty(total, dtype=torch.uint8, device=device)
        given = [index for index, source in sources.items() if not isinstance(source, Tensor)]
        refused = _library_of(device).decode(
            [files[index] for index in given],
            [pixels.data_ptr() + places[index][0] for index in given],
            [places[index][2] for index in given],
            threads,
            stream,
        )
        again = [given[position] for position in refused]
        _decode_on_cpu(pool, files, again, max_pixels, sources, self.errors)
        for index, source in sources.items():
            offset, height, width = places[index]
            if index in self.errors:
                places[index] = -1, 0, 0
            elif isinstance(source, Tensor):
                if source.shape != (height, width, 3):
                    raise RuntimeError(f"a JPEG whose size is {source.shape[:2]}, or {height, width}")
                pixels[offset : offset + source.numel()].copy_(source.flatten())
        plan, words, _ = self._plan(places)
        table = torch.frombuffer(bytearray(plan), dtype=torch.uint8).to(device)
        weights = torch.empty(words, dtype=torch.int32, device=device)
        module.resize_images(
            pixels.data_ptr(),
            table.data_ptr(),
            weights.data_ptr(),
            len(files),
            self.size,
            self.bicubic,
            self.factor,
            self.shift,
            cuda_address(self.out, self.out.dtype, device, *self.out.shape),
            str(self.out.dtype).removeprefix("torch."),
            stream,
        )

    def _plan(self, places: list[tuple[int, int, int]]) -> Any:
        boxes = 0 if self.boxes is None else address(self.boxes, torch.int64, len(places), 4)
        return cuda_module().plan_images(places, self.size, self.crop, boxes, self.bicubic)


def _batches(count: int, sources: dict[int, tuple[int, int] | Tensor]) -> Iterator[range]:
    start, held = 0, 0
    for index in range(count):
        source = sources.get(index, (0, 0))
        own = source.numel() if isinstance(source, Tensor) else 3 * source[0] * source[1]
        if held and held + own > BATCH_BYTES:
            yield range(start, index)
            start, held = index, 0
        held += own
    if start < count:
        yield range(start, count)


def _decode_on_cpu(
    pool: ThreadPoolExecutor,
    files: list[bytes],
    indices: list[int],
    max_pixels: int,
    sources: dict[int, tuple[int, int] | Tensor],
    errors: dict[int, str],
) -> None:
    def decoded(index: int) -> Tensor | str:
        try:
            return decode(files[index], max_pixels=max_pixels, backend="cpu")
        except (ValueError, MemoryError) as error:
            return str(error)

    for index, result in zip(indices, pool.map(decoded, indices), strict=True):
        if isinstance(result, str):
            errors[index] = result
        else:
            sources[index] = result


def _library_of(device: torch.device) -> Any:
    found = _library(device)
    if isinstance(found, str):
        raise RuntimeError(found)
    return found


@cache
def _library(device: torch.device) -> Any:
    """nvJPEG on this device, or the reason why there is none."""
    refusals = []
    for path in _paths():
        try:
            with torch.cuda.device(device.index if device.type == "cuda" else -1):
                return cuda_module().NvJpeg(path)
        except RuntimeError as error:
            refusals.append(f"{path}: {error}")
    return f"nvJPEG cannot be used (pip install nvidia-nvjpeg, or BCLIP_NVJPEG=its file): {'; '.join(refusals)}"


def _paths() -> list[str]:
    if "BCLIP_NVJPEG" in os.environ:
        return [os.environ["BCLIP_NVJPEG"]]
    majors = ("12", "13") if (torch.version.cuda or "").startswith("12.") else ("13", "12")
    wheels = find_spec("nvidia")
    folders = [Path(place) for place in (wheels.submodule_search_locations or ())] if wheels else []
    home = Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda")
    found = []
    for major in majors:
        name = f"libnvjpeg.so.{major}"
        places = [folder / part / "lib" for folder in folders for part in (f"cu{major}", "nvjpeg")]
        found += [str(place / name) for place in (*places, home / "lib64") if (place / name).exists()]
        found.append(name)
    return found
