"""Load batches from shards in a pool of threads: read, decode, crop, resize, tokenise."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from types import TracebackType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from bclip_fast.errors import UserError
from bclip_fast.ops import image as image_ops

from .batch import BadRecord, Batch, TeacherFeatures
from .caption_lengths import within_limit
from .daemon_pool import DaemonPool
from .image_files import ImageError, is_upright_jpeg, open_image
from .long_texts import LongTexts
from .pending import Cursor, Part, PendingBatch, cancel_parts
from .sampler import ShardSampler
from .shards.format import Sample
from .shards.mixed import Dataset
from .shards.reader import BadSample
from .texts import CaptionWeights, TextChoice
from .transform import Preprocess, random_resized_crop_box

log = logging.getLogger(__name__)

# Time that `close` waits for the threads. A thread that is stuck longer stays alive until the process ends.
_CLOSE_S = 10.0

Box = tuple[int, int, int, int]


class Loader:
    """An endless iterator of `Batch`, from the sampler's position on. Use it as a context manager, or call `close()`.

    If the sampler divides a rank's part of a global batch into micro-batches, the iterator yields these.

    The batches depend only on the sampler and the dataset's bytes, not on `num_threads` or `prefetch_batches`.
    `state_dict()` counts the global batches that were yielded completely. Prefetched batches come again after a resume.

    A damaged sample, which cannot be parsed or decoded, is replaced by one of `ShardSampler.fallbacks` and listed in
    `Batch.bad`. A fault of the storage stops the iteration instead. If a shard is missing, unreadable or too short,
    the storage raises a ReadError after its last attempt.

    Args:
        dataset: the samples.
        tokenize: function from n captions to the token ids of each. Several threads call it.
        sampler: the order of the samples, and this rank's part of it.
        preprocess: the evaluation transform. It sets the size and, without `augment`, the pixels.
        augment: use random resized crops in place of the centre crop. They depend on seed, pass and sample.
        crop_scale, crop_ratio: area and aspect ratio of these crops, as in torchvision's RandomResizedCrop.
        num_threads: number of threads that decode.
        prefetch_batches: number of batches to prepare ahead.
        pin_memory: put the tensors in page-locked memory, for asynchronous copies to a GPU.
        timeout_s: time limit for a batch, in seconds.
        groups: the group of each sample of the dataset (shards/positives.py), for `Batch.groups`.
        captions: weights of the kinds of texts. Each epoch draws one text of each sample.
        teacher: a teacher's features of the dataset, for `Batch.teacher`.
        long_texts: divides the texts that are too long. Each epoch draws one part. None: `tokenize` cuts them.

    Raises, from `__next__`, and closes the loader:
        ReadError: the storage failed.
        UserError: a sample and its NUM_FALLBACKS fallbacks are damaged, or a batch exceeds `timeout_s`. The latter
            message lists the reads in progress.
    """

    def __init__(
        self,
        dataset: Dataset,
        tokenize: Callable[[list[str]], list[list[int]]],
        sampler: ShardSampler,
        preprocess: Preprocess,
        *,
        augment: bool = True,
        crop_scale: tuple[float, float] = (0.9, 1.0),
        crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
        num_threads: int = 2,
        prefetch_batches: int = 2,
        pin_memory: bool = False,
        timeout_s: float = 300.0,
        groups: np.ndarray | None = None,
        captions: CaptionWeights | None = None,
        teacher: TeacherFeatures | None = None,
        long_texts: LongTexts | None = None,
    ) -> None:
        if num_threads < 1 or prefetch_batches < 0 or timeout_s <= 0:
            raise UserError(
                f"num_threads={num_threads} must be at least 1, prefetch_batches={prefetch_batches} at least 0, "
                f"and timeout_s={timeout_s} more than 0"
            )
        self.dataset, self.sampler = dataset, sampler
        self._tokenize = tokenize
        self._preprocess = preprocess
        self._augment, self._crop_scale, self._crop_ratio = augment, crop_scale, crop_ratio
        self._num_parts = num_threads
        self._prefetch = prefetch_batches
        self._pin = pin_memory
        self._timeout_s = timeout_s
        self._groups, self._teacher = groups, teacher
        self._long_texts = long_texts
        self._texts = TextChoice(captions or CaptionWeights(), sampler.seed)
        self._stop = threading.Event()
        self._pool = DaemonPool(num_threads, "bclip-loader")
        # Computing the order reads index files, so a thread does it too.
        self._planner = DaemonPool(1, "bclip-planner")
        self._pending: deque[Future[PendingBatch]] = deque()
        self._cursor = Cursor(sampler.next_batch)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._stop.is_set():
            raise RuntimeError("the loader is closed")
        while len(self._pending) <= self._prefetch:
            self._pending.append(self._planner.submit(self._start, self._cursor))
        deadline = time.monotonic() + self._timeout_s
        pending = self._pending[0]
        try:
            plan = pending.result(self._timeout_s)
            parts = [part.result(max(0.0, deadline - time.monotonic())) for part in plan.parts]
        except BaseException as error:
            # concurrent.futures has its own TimeoutError before Python 3.11. A thread may also raise one, but earlier.
            is_late = isinstance(error, FutureTimeout) and time.monotonic() >= deadline
            message = f"no batch within timeout_s={self._timeout_s:g}: {self._activity()}" if is_late else ""
            self.close(0.0 if is_late else _CLOSE_S)
            if is_late:
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
            captions=[caption for part in parts for caption in part.captions],
        )
        indices = [index for part in parts for index in part.indices]
        if self._groups is not None:
            batch.groups = torch.from_numpy(self._groups[indices])
        if self._teacher is not None:
            batch.teacher = self._teacher.rows(indices)
        if self._pin:
            batch.ids = batch.ids.pin_memory()
            batch.groups = None if batch.groups is None else batch.groups.pin_memory()
        if batch.last:
            self.sampler.num_consumed += self.sampler.batch_size_of(batch.epoch)
        return batch

    def _activity(self) -> str:
        """Describe the reads in progress, for a timeout's message."""
        now = time.monotonic()
        active_reads = self.dataset.active_reads
        if not active_reads:
            return "no read is in progress, so decoding or tokenising takes too long"
        return "reading " + "; ".join(sorted(f"{file} for {now - start:.1f} s" for file, start in active_reads))

    def _start(self, cursor: Cursor) -> PendingBatch:
        number, micro_batch = cursor.number, cursor.micro_batch
        is_last = micro_batch + 1 == self.sampler.num_micro_batches(number)
        # Only the planner's thread moves the cursor, because it divides the global batch into micro-batches.
        cursor.number, cursor.micro_batch = (number + 1, 0) if is_last else (number, micro_batch + 1)
        epoch, positions = self.sampler.batch(number, micro_batch)
        indices = [self.sampler.sample(epoch, position) for position in positions]
        images = self._allocate(len(indices), number)
        step = -(-len(indices) // self._num_parts)
        parts = []
        for start in range(0, len(indices), step):
            part = slice(start, start + step)
            read = self.dataset.fetch(indices[part])
            parts.append(self._pool.submit(self._fill, images[part], epoch, positions[part], indices[part], read))
        return PendingBatch(images, parts, epoch, is_last)

    def _allocate(self, count: int, number: int) -> Tensor:
        """Memory for `count` images of global batch `number`."""
        size = self._preprocess.config.size
        return torch.empty((count, size, size, 3), dtype=torch.uint8, pin_memory=self._pin)

    def _fill(
        self,
        out: Tensor,
        epoch: int,
        positions: list[int],
        indices: list[int],
        read: Callable[[], list[Sample | BadSample]],
    ) -> Part:
        """Write the pixels of samples into `out`. A damaged sample's row gets its first intact fallback.

        With a token budget, the fallback's caption is cut to the length of the damaged sample's.
        """
        self._check_open()
        samples = read()
        limits = [self.sampler.caption_limit(epoch, index) for index in indices]
        bad = []
        # Random numbers depend on the pass over the dataset, because a mixture's epoch may have several.
        passes = [self.sampler.pass_number(epoch, position) for position in positions]
        for row, reason in sorted(self._decode(out, passes, indices, samples).items()):
            bad.append(self._record(epoch, positions[row], indices[row], reason))
            for index in self.sampler.fallbacks(epoch, positions[row]):
                self._check_open()
                fallback = self.dataset.fetch([index])()
                reasons = self._decode(out[row : row + 1], passes[row : row + 1], [index], fallback)
                if not reasons:
                    samples[row], indices[row] = fallback[0], index
                    break
                bad.append(self._record(epoch, positions[row], index, reasons[0]))
            else:
                raise UserError(
                    f"sample {bad[-1].key} of {bad[-1].shard} and {len(bad) - 1} before it are damaged: "
                    f"{bad[-1].reason}; check {self.dataset.root_of(bad[-1].index)} with bclip ingest verify and "
                    "build it again"
                )
        intact = [sample for sample in samples if isinstance(sample, Sample)]
        captions = list(map(self._texts.text, passes, indices, intact))
        if self._long_texts is not None:
            parts = self._long_texts.parts(captions)
            numbers = map(self._texts.draw_part, passes, indices, map(len, parts))
            captions = [each[number] for each, number in zip(parts, numbers, strict=True)]
        tokens, replaced = self._tokenize(captions), {record.position for record in bad}
        for row, limit in enumerate(limits):
            if limit is not None:
                is_fallback = positions[row] in replaced
                tokens[row] = within_limit(tokens[row], limit, None if is_fallback else intact[row].key)
        ids = torch.tensor([i for row in tokens for i in row], dtype=torch.int64)
        return Part([sample.key for sample in intact], ids, list(map(len, tokens)), bad, indices, captions)

    def _check_open(self) -> None:
        if self._stop.is_set():
            raise RuntimeError("the loader is closed")

    def _record(self, epoch: int, position: int, index: int, reason: str) -> BadRecord:
        return BadRecord(epoch, position, index, *self.dataset.name_of(index), reason)

    def _decode(
        self, out: Tensor, passes: list[int], indices: list[int], samples: list[Sample | BadSample]
    ) -> dict[int, str]:
        """Decode samples into the rows of `out`. Return the reason of each failure, by row."""
        reasons: dict[int, str] = {}
        jpegs: list[bytes] = []
        boxes: list[Box] = []
        others: dict[int, Tensor] = {}
        for row, (number, index, sample) in enumerate(zip(passes, indices, samples, strict=True)):
            jpeg, box = b"", (0, 0, 1, 1)
            try:
                if isinstance(sample, BadSample):
                    raise sample
                if self._teacher is not None and self._teacher.is_damaged(index):
                    raise ValueError("the teacher could not decode it")
                image = None if is_upright_jpeg(sample.image) else open_image(sample.image).rgb()
                if self._augment:
                    height, width = image_ops.peek_size(sample.image) if image is None else (image.height, image.width)
                    box = random_resized_crop_box(
                        height, width, self.sampler.seed, number, index, self._crop_scale, self._crop_ratio
                    )
                if image is None:
                    jpeg = sample.image
                else:
                    others[row] = self._preprocess.to_uint8(image, box if self._augment else None)
            except ImageError as error:
                reasons[row] = f"cannot be decoded: {error}"
            except ValueError as error:
                reasons[row] = str(error)
            jpegs.append(jpeg)
            boxes.append(box)
        failures = self._decode_jpegs(out, jpegs, boxes if self._augment else None)
        # DALI and our operator only read JPEG files, so Pillow has decoded the other formats.
        for row, pixels in others.items():
            out[row] = pixels
            failures.pop(row, None)
        return {**failures, **reasons}

    def _decode_jpegs(self, out: Tensor, jpegs: list[bytes], boxes: list[Box] | None) -> dict[int, str]:
        """Decode each JPEG into its row of `out`, (n, size, size, 3) uint8. Return the reason of each failure, by row.

        Args:
            boxes: (top, left, height, width) of the crop to resize, by row. None: the evaluation transform.
        """
        self._check_open()
        config = self._preprocess.config
        evaluation_crop: Literal["squash", "center"] = "squash" if config.resize_mode == "squash" else "center"
        _, errors = image_ops.decode_resize(
            jpegs,
            config.size,
            crop=evaluation_crop if boxes is None else boxes,
            interpolation=config.interpolation,
            out=out,
            threads=1,
            on_bad="report",
        )
        return {row: f"cannot be decoded: {reason}" for row, reason in errors.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the sampler's state after the last complete global batch."""
        return self.sampler.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state` and discard prefetched batches. Raises as ShardSampler.load_state_dict does."""
        self.sampler.load_state_dict(state)
        self._drop()
        self._cursor = Cursor(self.sampler.next_batch)

    def _drop(self) -> None:
        while self._pending:
            plan = self._pending.popleft()
            if not plan.cancel():
                plan.add_done_callback(cancel_parts)

    def close(self, wait_s: float = _CLOSE_S) -> None:
        """End the threads. Leave a stuck thread behind after `wait_s` seconds."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._drop()
        # Close the planner first: the tasks that it submits must be cancelled too.
        has_ended = [self._planner.close(wait_s), self._pool.close(wait_s)]
        if not all(has_ended):
            log.warning("a thread of the loader is stuck and stays behind: %s", self._activity())

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
