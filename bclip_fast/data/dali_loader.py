"""The native loader's batches with pixels by NVIDIA DALI: on the CPU, or decoded and resized on a GPU.

DALI gets the bytes of each batch through `fn.external_source` and keeps nothing from one to the next. Its own reader of
WebDatasets shuffles within a buffer, splits keys at their first dot, loses a whole batch to one bad image, and restores
a checkpoint into another number of shards or batch size without a word; here order, resume, crops, tokens, replacements
and time limits are the native loader's, so a state means the same to both and may be handed from one to the other.
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

from .loader import Box, NativeLoader
from .sampler import SampleStream
from .shards.reader import ShardDataset
from .transform import Preprocess

log = logging.getLogger(__name__)

# One runs DALI, which has threads of its own; the other reads and tokenises the next batch.
_NUM_FEEDERS = 2


class DaliLoader(NativeLoader):
    """NativeLoader with the same arguments and batches; pixels differ as resamplers in float and fixed point do (mean
    0.2 of 255). Batches are independent of each other, so DALI's state is none.

    DALI fails a whole batch for one image. Such a batch is decoded by the native path, which says what is wrong with
    which image, and the damaged ones are replaced as ever. An image that one of the two decoders refuses and the other
    doesn't is judged by DALI alone as long as DALI takes the batch.

    Args:
        device_id: of the GPU that decodes and resizes (`mixed`), where `Batch.images` then lies; None is the CPU.
        num_threads: DALI's own.

    Raises UserError where DALI isn't installed.
    """

    def __init__(
        self,
        dataset: ShardDataset,
        tokenize: Callable[[list[str]], list[list[int]]],
        stream: SampleStream,
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
            raise UserError(f"num_threads={num_threads}: need at least 1")
        self._device_id = device_id
        self._dali_threads = num_threads
        self._lock = threading.Lock()
        self._pipeline: Any = None
        super().__init__(dataset, tokenize, stream, preprocess, num_threads=_NUM_FEEDERS, **options)
        self._num_parts = 1

    def _allocate(self, count: int) -> Tensor:
        if self._device_id is None:
            return super()._allocate(count)
        size = self._preprocess.config.size
        return torch.empty((count, size, size, 3), dtype=torch.uint8, device=torch.device("cuda", self._device_id))

    def _pixels(self, out: Tensor, jpegs: list[bytes], boxes: list[Box] | None) -> dict[int, str]:
        reasons: dict[int, str] = {}
        crops, places = [], []
        for row, jpeg in enumerate(jpegs):
            try:
                height, width = image_ops.peek_size(jpeg)
                if height * width > image_ops.MAX_PIXELS:
                    raise ValueError(f"{width} x {height} pixels exceed the limit of {image_ops.MAX_PIXELS}")
                size = self._preprocess.config.size
                crop, place = (0, 0, height, width), (size, size, 0, 0)
                if boxes is None:
                    place = self._preprocess.place(height, width)
                else:
                    crop = boxes[row]
            except ValueError as error:
                reasons[row] = f"cannot be decoded: {error}"
                continue
            crops.append(crop)
            places.append(place)
        rows = [row for row in range(len(jpegs)) if row not in reasons]
        if not rows:
            return reasons
        try:
            with self._lock:
                self._run(out, rows, [jpegs[row] for row in rows], crops, places)
        except RuntimeError as error:
            log.warning("DALI failed a batch, which is decoded natively: %s", _gist(error))
            pixels = super()._allocate(len(jpegs))
            reasons = super()._pixels(pixels, jpegs, boxes)
            out.copy_(pixels)
        return reasons

    def _run(self, out: Tensor, rows: list[int], jpegs: list[bytes], crops: list[Box], places: list[Box]) -> None:
        if self._pipeline is None:
            self._pipeline = self._build()
        pipeline = self._pipeline
        try:
            pipeline.feed_input("jpegs", [np.frombuffer(jpeg, np.uint8) for jpeg in jpegs])
            pipeline.feed_input("crops", [np.array(crop, np.int32) for crop in crops])
            pipeline.feed_input("places", [np.array(place, np.int32) for place in places])
            (images,) = pipeline.run()
        except RuntimeError:
            # What follows a failure is not specified: the next batch gets a new one.
            self._pipeline = None
            raise
        if self._device_id is None:
            out[rows] = torch.from_numpy(images.as_array())
            return
        from nvidia.dali.plugin.pytorch import feed_ndarray

        stream = torch.cuda.current_stream(out.device)
        found = out if len(rows) == len(out) else torch.empty_like(out[: len(rows)])
        feed_ndarray(images.as_tensor(), found, cuda_stream=stream)
        if found is not out:
            out[rows] = found
        # DALI takes its buffer back, and who uses the batch may do so on another stream.
        stream.synchronize()

    def _build(self) -> Any:
        from nvidia.dali import fn, pipeline_def, types

        config = self._preprocess.config
        gpu = self._device_id is not None
        device = "gpu" if gpu else "cpu"
        filters = {"bicubic": types.INTERP_CUBIC, "bilinear": types.INTERP_LINEAR}

        def graph() -> Any:
            crop = fn.external_source(name="crops", dtype=types.INT32, ndim=1)
            place = fn.external_source(name="places", dtype=types.INT32, ndim=1)
            # Fancy upsampling of chroma is what the CPU decoders do; EXIF orientation is not applied, as in open_clip.
            options = {"device": "mixed", "jpeg_fancy_upsampling": True} if gpu else {"device": "cpu"}
            jpegs = fn.external_source(name="jpegs", dtype=types.UINT8, ndim=1)
            images = fn.decoders.image(jpegs, adjust_orientation=False, output_type=types.RGB, **options)
            images = fn.slice(images, start=crop[0:2], shape=crop[2:4], axes=[0, 1], device=device)
            # Explicit sizes: resize_shorter rounds where torchvision cuts.
            size, kind = fn.cast(place[0:2], dtype=types.FLOAT), filters[config.interpolation]
            images = fn.resize(images, size=size, interp_type=kind, antialias=True, device=device)
            side = [config.size, config.size]
            return fn.slice(images, start=place[2:4], shape=side, axes=[0, 1], device=device)

        options: dict[str, Any] = dict(batch_size=self.stream.max_batch_size, num_threads=self._dali_threads)
        options |= dict(device_id=self._device_id, prefetch_queue_depth=1, exec_pipelined=False, exec_async=False)
        pipeline = pipeline_def(**options)(graph)()
        pipeline.build()
        return pipeline


def _gist(error: Exception) -> str:
    """The line of DALI's message that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line.removeprefix("Error: ") for line in lines if "Failed" in line or "rror:" in line), lines[0])
