"""Batches from shards by a pool of threads in this process: read, decode, crop, resize, tokenise."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bclip_fast.errors import UserError
from bclip_fast.ops import image as image_ops

from .shards import Sample, ShardDataset
from .stream import SampleStream
from .transform import Preprocess, random_resized_crop_box


@dataclass
class Batch:
    """One rank's slice of a global batch.

    images: (b, size, size, 3) uint8 RGB. ids: (T,) int64, the tokens of all captions, one after another.
    lengths: how many each of the b captions has. keys: b names. epoch: which pass over the data.
    """

    images: Tensor
    ids: Tensor
    lengths: list[int]
    keys: list[str]
    epoch: int


class NativeLoader:
    """Iterates `Batch`, endlessly, from the stream's position on; a context manager, or call `close()`.

    The batches depend on the stream alone, not on `num_threads` or `prefetch_batches`. `state_dict()` counts the
    batches that were handed out, so what was merely prefetched comes again after a resume.

    Args:
        dataset: where the samples are.
        tokenize: list of n captions -> the token ids of each; called from several threads.
        stream: the order, and this rank's part of it.
        preprocess: the evaluation transform; gives the size and, without `augment`, the pixels.
        augment: random resized crops (a function of seed, epoch and sample) in place of the centre crop.
        crop_scale, crop_ratio: area and aspect ratio of those crops, as torchvision's RandomResizedCrop.
        num_threads: threads that decode.
        prefetch_batches: batches in preparation ahead of the one handed out.
        pin_memory: put the tensors in page-locked memory, for asynchronous copies to a GPU.

    Iterating raises UserError, naming the sample, when one cannot be read or decoded.
    """

    def __init__(
        self,
        dataset: ShardDataset,
        tokenize: Callable[[list[str]], list[list[int]]],
        stream: SampleStream,
        preprocess: Preprocess,
        *,
        augment: bool = True,
        crop_scale: tuple[float, float] = (0.9, 1.0),
        crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
        num_threads: int = 2,
        prefetch_batches: int = 2,
        pin_memory: bool = False,
    ) -> None:
        if num_threads < 1 or prefetch_batches < 0:
            raise UserError(f"num_threads={num_threads}, prefetch_batches={prefetch_batches}: need at least 1 and 0")
        self.dataset = dataset
        self.stream = stream
        self._tokenize = tokenize
        self._preprocess = preprocess
        self._augment = augment
        self._crop_scale = crop_scale
        self._crop_ratio = crop_ratio
        self._num_threads = num_threads
        self._prefetch = prefetch_batches
        self._pin = pin_memory
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="bclip-loader")
        self._pending: deque[_Pending] = deque()
        self._next = stream.num_consumed // stream.batch_size

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._stop.is_set():
            raise RuntimeError("the loader is closed")
        while len(self._pending) <= self._prefetch:
            self._pending.append(self._start(self._next))
            self._next += 1
        pending = self._pending.popleft()
        try:
            parts = [part.result() for part in pending.parts]
            keys = [key for part in parts for key in part[0]]
            lengths = [length for part in parts for length in part[2]]
            batch = Batch(pending.images, torch.cat([part[1] for part in parts]), lengths, keys, pending.epoch)
        except BaseException:
            self.close()
            raise
        if self._pin:
            batch.ids = batch.ids.pin_memory()
        self.stream.num_consumed += self.stream.batch_size
        return batch

    def _start(self, number: int) -> _Pending:
        epoch, indices = self.stream.batch(number)
        size = self._preprocess.config.size
        images = torch.empty((len(indices), size, size, 3), dtype=torch.uint8, pin_memory=self._pin)
        step = -(-len(indices) // self._num_threads)
        parts = [
            self._pool.submit(self._fill, images[start : start + step], epoch, indices[start : start + step])
            for start in range(0, len(indices), step)
        ]
        return _Pending(images, parts, epoch)

    def _fill(self, out: Tensor, epoch: int, indices: list[int]) -> tuple[list[str], Tensor, list[int]]:
        """Writes the pixels of some samples into `out`; returns their keys, token ids, and how many each has."""
        keys, captions = [], []
        for row, index in enumerate(indices):
            if self._stop.is_set():
                raise RuntimeError("the loader was closed")
            sample = self.dataset[index]
            try:
                out[row] = self._pixels(sample, epoch, index)
            except (OSError, ValueError, RuntimeError) as error:
                raise UserError(
                    f"sample {sample.key} (index {index} of split {self.dataset.split} in {self.dataset.root}) cannot "
                    f"be decoded: {error}; find every bad one with bclip_fast.data.shards.verify and rebuild the shards"
                ) from error
            keys.append(sample.key)
            captions.append(sample.caption)
        tokens = self._tokenize(captions)
        return keys, torch.tensor([i for row in tokens for i in row], dtype=torch.int64), list(map(len, tokens))

    def _pixels(self, sample: Sample, epoch: int, index: int) -> Tensor:
        """(size, size, 3) uint8 of one sample."""
        image = Image.fromarray(image_ops.decode(sample.image).numpy())
        if not self._augment:
            return self._preprocess.to_uint8(image)
        top, left, height, width = random_resized_crop_box(
            image.height, image.width, self.stream.seed, epoch, index, self._crop_scale, self._crop_ratio
        )
        # Cropped first: with resize(box=...) the filter would see pixels outside of the crop, unlike torchvision's.
        config = self._preprocess.config
        image = image.crop((left, top, left + width, top + height)).resize(
            (config.size, config.size), Image.Resampling[config.interpolation.upper()]
        )
        return torch.from_numpy(np.array(image))

    def state_dict(self) -> dict[str, Any]:
        return self.stream.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`; batches prefetched so far are dropped. Raises as SampleStream.load_state_dict."""
        self.stream.load_state_dict(state)
        while self._pending:
            self._pending.popleft().cancel()
        self._next = self.stream.num_consumed // self.stream.batch_size

    def close(self) -> None:
        """Ends the threads; waits for at most one sample a thread."""
        self._stop.set()
        while self._pending:
            self._pending.popleft().cancel()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> NativeLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass
class _Pending:
    images: Tensor
    parts: list[Future[tuple[list[str], Tensor, list[int]]]]
    epoch: int

    def cancel(self) -> None:
        for part in self.parts:
            part.cancel()
