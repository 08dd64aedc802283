"""The loader's batches with images that NVIDIA DALI decodes and resizes, on the CPU or on a GPU.

DALI gets the bytes of each batch through `fn.external_source`, and keeps no state between batches. Order, resume,
crops, tokens, fallbacks and time limits are those of `Loader`, so a state of one loader works for the other.

DALI's own WebDataset reader has none of these properties. It shuffles within a buffer, splits keys at their first dot,
and loses a whole batch to one bad image. It silently restores a checkpoint with another batch size or number of shards.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bclip_fast.errors import UserError
from bclip_fast.ops import image as image_ops

from .batch import Batch
from .loader import Box, Loader
from .sampler import ShardSampler
from .shards.mixed import Dataset
from .transform import Preprocess

log = logging.getLogger(__name__)

# One thread runs DALI, which starts further threads. The other thread reads and tokenises the next batch.
_NUM_FEEDERS = 2


class DaliLoader(Loader):
    """A `Loader` that decodes with DALI, with the same arguments and batches.

    The pixels differ by 0.2 of 255 levels (mean), because DALI resamples in floating point and `Loader` in fixed point.

    One bad image makes DALI fail the whole batch. `Loader` then decodes this batch, reports the damaged images, and
    replaces them. If DALI accepts a batch, its images count as intact, even those that `Loader` would refuse.

    Args:
        device_id: number of the GPU that decodes and resizes. None: the CPU. The GPU also holds `Batch.images`, unless
            the rank's part of the batch is divided into micro-batches. GradCache keeps these on the host between its
            two passes, so they come in the host's memory.
        num_threads: number of DALI's threads.

    Raises:
        UserError: DALI isn't installed.
    """

    def __init__(
        self,
        dataset: Dataset,
        tokenize: Callable[[list[str]], list[list[int]]],
        sampler: ShardSampler,
        preprocess: Preprocess,
        *,
        device_id: int | None = None,
        num_threads: int = 2,
        **options: Any,
    ) -> None:
        try:
            import nvidia.dali  # noqa: F401
        except ModuleNotFoundError as error:
            raise UserError(f"the DALI loader needs pip install 'bclip_fast[dali]': {error}") from error
        if num_threads < 1:
            raise UserError(f"num_threads={num_threads} must be at least 1")
        self._device = None if device_id is None else torch.device("cuda", device_id)
        # The trainer's stream would make each batch wait for the step in progress.
        self._stream: Any = None if self._device is None else torch.cuda.Stream(self._device)
        self._dali_threads = num_threads
        self._lock = threading.Lock()
        self._pipeline: Any = None
        super().__init__(dataset, tokenize, sampler, preprocess, num_threads=_NUM_FEEDERS, **options)
        self._num_parts = 1

    def __next__(self) -> Batch:
        batch = super().__next__()
        if batch.images.is_cuda:
            # The memory belongs to our stream. It may not be reused before the trainer's stream has read it.
            batch.images.record_stream(torch.cuda.current_stream(self._device))
        return batch

    def _allocate(self, count: int, number: int) -> Tensor:
        if self._device is None or self.sampler.num_micro_batches(number) > 1:
            return super()._allocate(count, number)
        size = self._preprocess.config.size
        with torch.cuda.stream(self._stream):
            return torch.empty((count, size, size, 3), dtype=torch.uint8, device=self._device)

    def _fill(self, *arguments: Any) -> Any:
        if self._device is None:
            return super()._fill(*arguments)
        with torch.cuda.stream(self._stream):
            part = super()._fill(*arguments)
        # This thread waits, and not the trainer. DALI will reuse its buffer, and the trainer uses another stream.
        self._stream.synchronize()
        return part

    def _decode_jpegs(self, out: Tensor, jpegs: list[bytes], boxes: list[Box] | None) -> dict[int, str]:
        reasons: dict[int, str] = {}
        crops, geometries = [], []
        for row, jpeg in enumerate(jpegs):
            try:
                height, width = image_ops.peek_size(jpeg)
                if height * width > image_ops.MAX_PIXELS:
                    raise ValueError(f"{width} x {height} pixels exceed the limit of {image_ops.MAX_PIXELS}")
                size = self._preprocess.config.size
                crop, geometry = (0, 0, height, width), (size, size, 0, 0)
                if boxes is None:
                    geometry = self._preprocess.geometry(height, width)
                else:
                    crop = boxes[row]
            except ValueError as error:
                reasons[row] = f"cannot be decoded: {error}"
                continue
            crops.append(crop)
            geometries.append(geometry)
        rows = [row for row in range(len(jpegs)) if row not in reasons]
        if not rows:
            return reasons
        try:
            with self._lock:
                self._run(out, rows, [jpegs[row] for row in rows], crops, geometries)
        except RuntimeError as error:
            log.warning("DALI failed a batch; decoding it without DALI: %s", _first_cause(error))
            pixels = torch.empty(out.shape, dtype=torch.uint8)
            reasons = super()._decode_jpegs(pixels, jpegs, boxes)
            out.copy_(pixels)
        return reasons

    def _run(self, out: Tensor, rows: list[int], jpegs: list[bytes], crops: list[Box], geometries: list[Box]) -> None:
        if self._pipeline is None:
            self._pipeline = self._build()
        pipeline = self._pipeline
        try:
            pipeline.feed_input("jpegs", [np.frombuffer(jpeg, np.uint8) for jpeg in jpegs])
            pipeline.feed_input("crops", [np.array(crop, np.int32) for crop in crops])
            pipeline.feed_input("geometries", [np.array(geometry, np.int32) for geometry in geometries])
            (images,) = pipeline.run()
        except RuntimeError:
            # DALI doesn't specify the state of a pipeline after a failure, so the next batch gets a new pipeline.
            self._pipeline = None
            raise
        if self._device is None:
            out[rows] = torch.from_numpy(images.as_array())
            return
        from nvidia.dali.plugin.pytorch import feed_ndarray

        is_whole = len(rows) == len(out)
        decoded = out if is_whole and out.is_cuda else torch.empty_like(out[: len(rows)], device=self._device)
        feed_ndarray(images.as_tensor(), decoded, cuda_stream=self._stream)
        # The next run of the pipeline overwrites DALI's buffer, so copy within the lock.
        self._stream.synchronize()
        if is_whole and decoded is not out:
            out.copy_(decoded, non_blocking=True)
        elif decoded is not out:
            out[rows] = decoded if out.is_cuda else decoded.cpu()

    def _build(self) -> Any:
        from nvidia.dali import fn, pipeline_def, types

        config = self._preprocess.config
        gpu = self._device is not None
        device = "gpu" if gpu else "cpu"
        filters = {"bicubic": types.INTERP_CUBIC, "bilinear": types.INTERP_LINEAR}

        def graph() -> Any:
            crop = fn.external_source(name="crops", dtype=types.INT32, ndim=1)
            geometry = fn.external_source(name="geometries", dtype=types.INT32, ndim=1)
            # CPU decoders use fancy upsampling of chroma too. `Loader` itself decodes the files that EXIF data turn.
            options = {"device": "mixed", "jpeg_fancy_upsampling": True} if gpu else {"device": "cpu"}
            jpegs = fn.external_source(name="jpegs", dtype=types.UINT8, ndim=1)
            images = fn.decoders.image(jpegs, adjust_orientation=False, output_type=types.RGB, **options)
            images = fn.slice(images, start=crop[0:2], shape=crop[2:4], axes=[0, 1], device=device)
            # Pass explicit sizes, because resize_shorter rounds and torchvision truncates.
            size, kind = fn.cast(geometry[0:2], dtype=types.FLOAT), filters[config.interpolation]
            images = fn.resize(images, size=size, interp_type=kind, antialias=True, device=device)
            side = [config.size, config.size]
            return fn.slice(images, start=geometry[2:4], shape=side, axes=[0, 1], device=device)

        definition = pipeline_def(
            batch_size=self.sampler.max_batch_size,
            num_threads=self._dali_threads,
            device_id=None if self._device is None else self._device.index,
            prefetch_queue_depth=1,
            exec_pipelined=False,
            exec_async=False,
        )
        pipeline = definition(graph)()
        pipeline.build()
        return pipeline


def _first_cause(error: Exception) -> str:
    """Return the line of DALI's message that names the error."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line.removeprefix("Error: ") for line in lines if "Failed" in line or "rror:" in line), lines[0])
