"""nvJPEG and the kernels of csrc/cuda/image/ on NVIDIA GPUs from sm_80 on. They have not run on a GPU yet.

nvJPEG decodes, in one batch, all baseline files whose colours it reads like libjpeg (csrc/cuda/image/nvjpeg.h). The CPU
decodes the other files and those that nvJPEG refuses, with libjpeg-turbo, or with Pillow in a build without it. nvJPEG
is the file BCLIP_NVJPEG, or else comes from a wheel, from CUDA_HOME or from the system.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bclip_fast.ops.cuda_device import cuda_module, cuda_stream
from bclip_fast.ops.pointers import address, cuda_address

from . import decode, host_backend
from .call import ResizeCall

# Limit of the decoded pixels in memory, in bytes. A single image may exceed it.
BATCH_BYTES = 2**30

# nvJPEG documents no alignment, so use the alignment of CUDA's allocations.
ALIGNMENT = 256

# Either the size (height, width) that nvJPEG will decode to, or pixels that the CPU decoded.
Source = tuple[int, int] | Tensor


def library_refusal(device: torch.device) -> str | None:
    """The reason why nvJPEG is not available on this device, or None."""
    library = _library(device)
    return library if isinstance(library, str) else None


def decode_resize(call: ResizeCall) -> dict[int, str]:
    """Write `call.out`, and return the error of each bad file by index. It ignores `exact`."""
    files = list(call.jpegs)
    errors: dict[int, str] = {}
    sources: dict[int, Source] = {}
    for index, (height, width) in enumerate(cuda_module().plain_jpegs(files)):
        if height * width > call.max_pixels:
            errors[index] = f"JPEG of {width}x{height} pixels exceeds the limit of {call.max_pixels} pixels"
        elif height:
            sources[index] = height, width
    with ThreadPoolExecutor(call.threads) as pool, torch.cuda.device_of(call.out):
        others = [index for index in range(len(files)) if index not in sources and index not in errors]
        _decode_on_cpu(pool, files, others, call.max_pixels, sources, errors)
        for batch in _batches(len(files), sources):
            squares = _Squares(call, slice(batch.start, batch.stop), pool)
            batch_sources = {i - batch.start: sources.pop(i) for i in batch if i in sources}
            try:
                squares.write(files[batch.start : batch.stop], batch_sources)
            finally:
                # nvJPEG may still read the files, which belong to the caller.
                if call.out.is_cuda:
                    torch.cuda.current_stream(call.out.device).synchronize()
            errors |= {batch.start + index: reason for index, reason in squares.errors.items()}
    return dict(sorted(errors.items()))


class _Squares:
    """Consecutive files of a call that the device processes together."""

    def __init__(self, call: ResizeCall, part: slice, pool: ThreadPoolExecutor) -> None:
        self.call, self.pool, self.bicubic = call, pool, call.interpolation == "bicubic"
        self.boxes = None if call.boxes is None else call.boxes[part]
        self.out, self.errors = call.out[part], dict[int, str]()
        self.factor, self.shift = [0.0] * 3, [0.0] * 3
        if call.mean is not None and call.std is not None:
            self.factor = [1 / (255 * deviation) for deviation in call.std]
            self.shift = [-center / deviation for center, deviation in zip(call.mean, call.std, strict=True)]

    def write(self, files: list[bytes], sources: dict[int, Source]) -> None:
        """Decode and resize the files into `out`."""
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
        undecoded = [index for index, source in sources.items() if not isinstance(source, Tensor)]
        refused = _library_of(device).decode(
            [files[index] for index in undecoded],
            [pixels.data_ptr() + places[index][0] for index in undecoded],
            [places[index][2] for index in undecoded],
            self.call.threads,
            stream,
        )
        again = [undecoded[position] for position in refused]
        _decode_on_cpu(self.pool, files, again, self.call.max_pixels, sources, self.errors)
        for index, source in sources.items():
            offset, height, width = places[index]
            if index in self.errors:
                places[index] = -1, 0, 0
            elif isinstance(source, Tensor):
                if source.shape != (height, width, 3):
                    raise RuntimeError(
                        f"a JPEG has the size {tuple(source.shape[:2])}, but its header says {height, width}"
                    )
                pixels[offset : offset + source.numel()].copy_(source.flatten())
        plan, words, _ = self._plan(places)
        table = torch.frombuffer(bytearray(plan), dtype=torch.uint8).to(device)
        weights = torch.empty(words, dtype=torch.int32, device=device)
        module.resize_images(
            pixels.data_ptr(),
            table.data_ptr(),
            weights.data_ptr(),
            len(files),
            self.call.size,
            self.bicubic,
            self.factor,
            self.shift,
            cuda_address(self.out, self.out.dtype, device, *self.out.shape),
            str(self.out.dtype).removeprefix("torch."),
            stream,
        )

    def _plan(self, places: list[tuple[int, int, int]]) -> Any:
        boxes = 0 if self.boxes is None else address(self.boxes, torch.int64, len(places), 4)
        return cuda_module().plan_images(places, self.call.size, self.call.crop, boxes, self.bicubic)


def _batches(count: int, sources: dict[int, Source]) -> Iterator[range]:
    """Ranges of files whose pixels fit into BATCH_BYTES."""
    start, num_bytes = 0, 0
    for index in range(count):
        source = sources.get(index, (0, 0))
        size = source.numel() if isinstance(source, Tensor) else 3 * source[0] * source[1]
        if num_bytes and num_bytes + size > BATCH_BYTES:
            yield range(start, index)
            start, num_bytes = index, 0
        num_bytes += size
    if start < count:
        yield range(start, count)


def _decode_on_cpu(
    pool: ThreadPoolExecutor,
    files: list[bytes],
    indices: list[int],
    max_pixels: int,
    sources: dict[int, Source],
    errors: dict[int, str],
) -> None:
    backend = host_backend() or "cpu"

    def decoded(index: int) -> Tensor | str:
        try:
            return decode(files[index], max_pixels=max_pixels, backend=backend)
        except (ValueError, MemoryError) as error:
            return str(error)

    for index, result in zip(indices, pool.map(decoded, indices), strict=True):
        if isinstance(result, str):
            errors[index] = result
        else:
            sources[index] = result


def _library_of(device: torch.device) -> Any:
    library = _library(device)
    if isinstance(library, str):
        raise RuntimeError(library)
    return library


@cache
def _library(device: torch.device) -> Any:
    """nvJPEG on this device, or the reason why it is not available."""
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
    paths = []
    for major in majors:
        name = f"libnvjpeg.so.{major}"
        places = [folder / part / "lib" for folder in folders for part in (f"cu{major}", "nvjpeg")]
        paths += [str(place / name) for place in (*places, home / "lib64") if (place / name).exists()]
        paths.append(name)
    return paths
