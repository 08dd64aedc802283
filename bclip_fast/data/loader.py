"""Batches from shards by a pool of threads in this process: read, decode, crop, resize, tokenise."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor

from bclip_fast.errors import UserError
from bclip_fast.ops import image as image_ops

from .daemon_pool import Workers
from .sampler import SampleStream
from .shards.format import Sample
from .shards.reader import BadSample, ShardDataset
from .transform import Preprocess, random_resized_crop_box

log = logging.getLogger(__name__)

# What closing waits for threads that merely finish what they are at; a stuck one is left to the process's end.
_CLOSE_S = 10.0

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class BadRecord:
    """A damaged sample, in whose place at (epoch, position) another one was tried.

    index: in the split. key, shard: by the shard's index file. reason: what is wrong with it.
    """

    epoch: int
    position: int
    index: int
    key: str
    shard: str
    reason: str


@dataclass
class Batch:
    """One rank's slice of a global batch, or a micro-batch of it.

    images: (b, size, size, 3) uint8 RGB. ids: (T,) int64, the tokens of all captions, one after another.
    lengths: how many each of the b captions has. keys: b names. epoch: which pass over the data.
    bad: the samples that reserves stand in for, in the order of their rows; a reserve may itself be among them.
    last: whether the rank's slice ends here.
    """

    images: Tensor
    ids: Tensor
    lengths: list[int]
    keys: list[str]
    epoch: int
    bad: list[BadRecord] = field(default_factory=list)
    last: bool = True


class NativeLoader:
    """Iterates `Batch`, endlessly, from the stream's position on; a context manager, or call `close()`.

    Where the stream divides a rank's share of a global batch into micro-batches, these are what comes, one by one.

    The batches depend on the stream and the dataset's bytes alone, not on `num_threads` or `prefetch_batches`.
    `state_dict()` counts the batches that were handed out whole: what was merely prefetched comes again after a resume.

    A sample that is damaged, so that it can't be parsed or decoded, is replaced by SampleStream.reserves of its
    position and listed in `Batch.bad`. Storage that fails is no reason to train on something else: a shard that cannot
    be read, is gone or ends early is a ReadError that names it, once `dataset.files` has tried often enough.

    Args:
        dataset: where the samples are.
        tokenize: list of n captions -> the token ids of each; called from several threads.
        stream: the order, and this rank's part of it.
        preprocess: the evaluation transform; gives the size and, without `augment`, the pixels.
        augment: random resized crops (a function of seed, epoch and sample) in place of the centre crop.
        crop_scale, crop_ratio: area and aspect ratio of those crops, as torchvision's RandomResizedCrop.
        num_threads: threads that decode.
        prefetch_batches: batches in preparation ahead of the one handed out; those of a URL are being read.
        pin_memory: put the tensors in page-locked memory, for asynchronous copies to a GPU.
        timeout_s: a batch that isn't ready this long after it was asked for is an error.

    Iterating raises UserError: a ReadError; NUM_RESERVES damaged samples in a row; a batch that took longer than
    `timeout_s`, with what the threads are reading. The loader is closed then.
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
        timeout_s: float = 300.0,
    ) -> None:
        if num_threads < 1 or prefetch_batches < 0 or timeout_s <= 0:
            raise UserError(
                f"num_threads={num_threads}, prefetch_batches={prefetch_batches}, timeout_s={timeout_s}: "
                "need at least 1, at least 0 and more than 0"
            )
        self.dataset = dataset
        self.stream = stream
        self._tokenize = tokenize
        self._preprocess = preprocess
        self._augment = augment
        self._crop_scale = crop_scale
        self._crop_ratio = crop_ratio
        self._num_parts = num_threads
        self._prefetch = prefetch_batches
        self._pin = pin_memory
        self._timeout_s = timeout_s
        self._stop = threading.Event()
        self._pool = Workers(num_threads, "bclip-loader")
        # What comes when is found out in a thread too: it reads the shards' index files.
        self._planner = Workers(1, "bclip-planner")
        self._pending: deque[Future[_Pending]] = deque()
        self._next = (stream.next_batch, 0)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._stop.is_set():
            raise RuntimeError("the loader is closed")
        while len(self._pending) <= self._prefetch:
            self._pending.append(self._planner.submit(self._start, *self._next))
            number, micro_batch = self._next[0], self._next[1] + 1
            self._next = (
                (number, micro_batch) if micro_batch < self.stream.num_micro_batches(number) else (number + 1, 0)
            )
        deadline = time.monotonic() + self._timeout_s
        pending = self._pending[0]
        try:
            plan = pending.result(self._timeout_s)
            parts = [part.result(max(0.0, deadline - time.monotonic())) for part in plan.parts]
        except BaseException as error:
            # concurrent.futures' own class until Python 3.11; a timeout that a thread raised is that thread's error.
            late = isinstance(error, FutureTimeout) and time.monotonic() >= deadline
            message = f"no batch within timeout_s={self._timeout_s:g}: {self._activity()}" if late else ""
            self.close(0.0 if late else _CLOSE_S)
            if late:
                raise UserError(message) from None
            raise
        self._pending.popleft()
        batch = Batch(
            plan.images,
            torch.cat([part.ids for part in parts]),
            [length for part in parts for length in part.lengths],
            [key for part in parts for key in part.keys],
            plan.epoch,
            [bad for part in parts for bad in part.bad],
            plan.last,
        )
        if self._pin:
            batch.ids = batch.ids.pin_memory()
        if batch.last:
            self.stream.num_consumed += self.stream.batch_size_of(batch.epoch)
        return batch

    def _activity(self) -> str:
        now = time.monotonic()
        reading = [f"{what} for {now - since:.1f} s" for what, since in list(self.dataset.files.reading.values())]
        return (
            "reading " + "; ".join(sorted(reading))
            if reading
            else "decoding or tokenising takes longer, no read is under way"
        )

    def _start(self, number: int, micro_batch: int) -> _Pending:
        epoch, positions = self.stream.batch(number, micro_batch)
        indices = [self.stream.sample(epoch, position) for position in positions]
        images = self._allocate(len(indices))
        step = -(-len(indices) // self._num_parts)
        parts = []
        for start in range(0, len(indices), step):
            part = slice(start, start + step)
            read = self.dataset.fetch(indices[part])
            parts.append(self._pool.submit(self._fill, images[part], epoch, positions[part], indices[part], read))
        return _Pending(images, parts, epoch, micro_batch + 1 == self.stream.num_micro_batches(number))

    def _allocate(self, count: int) -> Tensor:
        size = self._preprocess.config.size
        return torch.empty((count, size, size, 3), dtype=torch.uint8, pin_memory=self._pin)

    def _fill(
        self,
        out: Tensor,
        epoch: int,
        positions: list[int],
        indices: list[int],
        read: Callable[[], list[Sample | BadSample]],
    ) -> _Part:
        """Writes the pixels of some samples into `out`; a damaged one's row gets those of its first good reserve."""
        self._check_open()
        samples = read()
        bad = []
        for row, reason in sorted(self._decode(out, epoch, indices, samples).items()):
            bad.append(self._record(epoch, positions[row], indices[row], reason))
            for index in self.stream.reserves(epoch, positions[row]):
                self._check_open()
                found = self.dataset.fetch([index])()
                reasons = self._decode(out[row : row + 1], epoch, [index], found)
                if not reasons:
                    samples[row] = found[0]
                    break
                bad.append(self._record(epoch, positions[row], index, reasons[0]))
            else:
                raise UserError(
                    f"sample {bad[-1].key} of {bad[-1].shard} and {len(bad) - 1} before it are damaged: "
                    f"{bad[-1].reason}; see bclip_fast.data.shards.verify and build {self.dataset.root} again"
                )
        good = [sample for sample in samples if isinstance(sample, Sample)]
        tokens = self._tokenize([sample.caption for sample in good])
        ids = torch.tensor([i for row in tokens for i in row], dtype=torch.int64)
        return _Part([sample.key for sample in good], ids, list(map(len, tokens)), bad)

    def _check_open(self) -> None:
        if self._stop.is_set():
            raise RuntimeError("the loader was closed")

    def _record(self, epoch: int, position: int, index: int, reason: str) -> BadRecord:
        return BadRecord(epoch, position, index, *self.dataset.name_of(index), reason)

    def _decode(self, out: Tensor, epoch: int, indices: list[int], samples: list[Sample | BadSample]) -> dict[int, str]:
        """Pixels of samples into the rows of `out`; what is wrong with those that have none, by row."""
        reasons: dict[int, str] = {}
        jpegs: list[bytes] = []
        boxes: list[Box] = []
        for row, (index, sample) in enumerate(zip(indices, samples, strict=True)):
            jpeg, box = b"", (0, 0, 1, 1)
            try:
                if isinstance(sample, BadSample):
                    raise sample
                if self._augment:
                    height, width = image_ops.peek_size(sample.image)
                    box = random_resized_crop_box(
                        height, width, self.stream.seed, epoch, index, self._crop_scale, self._crop_ratio
                    )
                jpeg = sample.image
            except ValueError as error:
                reasons[row] = str(error)
            jpegs.append(jpeg)
            boxes.append(box)
        return {**self._pixels(out, jpegs, boxes if self._augment else None), **reasons}

    def _pixels(self, out: Tensor, jpegs: list[bytes], boxes: list[Box] | None) -> dict[int, str]:
        """Decodes each JPEG into its row of `out`, (n, size, size, 3) uint8.

        `boxes`: (top, left, height, width) of the crop that is resized, by row; None is the evaluation transform.
        Returns what is wrong with those that cannot be decoded, by row.
        """
        self._check_open()
        config = self._preprocess.config
        whole: Literal["squash", "center"] = "squash" if config.resize_mode == "squash" else "center"
        _, errors = image_ops.decode_resize(
            jpegs,
            config.size,
            crop=whole if boxes is None else boxes,
            interpolation=config.interpolation,
            out=out,
            threads=1,
        )
        return {row: f"cannot be decoded: {reason}" for row, reason in errors.items()}

    def state_dict(self) -> dict[str, Any]:
        return self.stream.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`; batches prefetched so far are dropped. Raises as SampleStream.load_state_dict."""
        self.stream.load_state_dict(state)
        self._drop()
        self._next = (self.stream.next_batch, 0)

    def _drop(self) -> None:
        while self._pending:
            plan = self._pending.popleft()
            if not plan.cancel():
                plan.add_done_callback(_cancel_parts)

    def close(self, wait_s: float = _CLOSE_S) -> None:
        """Ends the threads; waits for what each is at, a thread that is stuck is left behind after `wait_s`."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._drop()
        # The planner first: what it submits is still to be cancelled.
        ended = [self._planner.close(wait_s), self._pool.close(wait_s)]
        if not all(ended):
            log.warning("a thread of the loader is stuck and left behind: %s", self._activity())

    def __enter__(self) -> NativeLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass
class _Part:
    keys: list[str]
    ids: Tensor
    lengths: list[int]
    bad: list[BadRecord]


@dataclass
class _Pending:
    images: Tensor
    parts: list[Future[_Part]]
    epoch: int
    last: bool


def _cancel_parts(plan: Future[_Pending]) -> None:
    if not plan.cancelled() and plan.exception() is None:
        for part in plan.result().parts:
            part.cancel()
