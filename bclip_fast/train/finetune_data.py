"""The batches of fine-tuning: their samples, decoded in threads one step ahead."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bclip_fast import distributed
from bclip_fast.data.batch import BadRecord
from bclip_fast.data.image_files import read_rgb
from bclip_fast.data.storage import ReadError
from bclip_fast.data.transform import Preprocess, random_resized_crop_box
from bclip_fast.errors import UserError
from bclip_fast.eval.datasets import EvalDataset, image_name

_TRIES = 32  # replacements of a damaged image


@dataclass
class Samples:
    """This rank's part of a batch.

    rows: dataset indices of the samples.
    images: (b, 3, S, S) float32, or (b, D) features.
    bad: damaged samples that others replace.
    """

    rows: list[int]
    images: Tensor
    bad: list[BadRecord]


class BatchReader:
    """Reads this rank's batches, in order from `first_step` on.

    An epoch is a permutation of all samples, without an incomplete last batch. Order, crops and replacements depend
    only on (seed, epoch, sample).

    Args:
        stop_at_damage: raise the error of a damaged image instead of a replacement by another sample.

    Attributes:
        features: (N, D), what stands for the images, in place of their pixels. Rows with NaN are damaged images.
    """

    features: Tensor | None = None

    def __init__(
        self,
        data: EvalDataset,
        name: str,
        preprocess: Preprocess,
        *,
        num_steps: int,
        first_step: int,
        batch_size: int,
        seed: int,
        crop_scale: tuple[float, float],
        num_workers: int,
        stop_at_damage: bool,
    ) -> None:
        self.steps_per_epoch = len(data) // batch_size
        self._data, self._name, self._preprocess = data, name, preprocess
        self._num_steps, self._batch_size, self._seed = num_steps, batch_size, seed
        self._crop_scale, self._stop_at_damage = crop_scale, stop_at_damage
        self._step = first_step
        self._pool = ThreadPoolExecutor(num_workers)
        self._next: list[Future[tuple[int, Tensor, list[BadRecord]]]] | None = None

    def __next__(self) -> Samples:
        """The next batch. Raises UserError for an image that cannot be replaced, or if the storage fails."""
        current = self._next or self._load(self._step)
        self._step += 1
        self._next = self._load(self._step)
        loaded = [future.result() for future in current]
        bad = [record for *_, records in loaded for record in records]
        return Samples([row for row, *_ in loaded], torch.stack([image for _, image, _ in loaded]), bad)

    def close(self) -> None:
        """End the threads after their current images."""
        self._pool.shutdown(cancel_futures=True)

    def _load(self, step: int) -> list[Future[tuple[int, Tensor, list[BadRecord]]]]:
        """The futures of this rank's samples of a step. None after the last step."""
        if step >= self._num_steps:
            return []
        epoch, number = divmod(step, self.steps_per_epoch)
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
        order = torch.randperm(len(self._data), generator=generator)
        start = number * self._batch_size
        positions = range(start + distributed.rank(), start + self._batch_size, distributed.world_size())
        return [self._pool.submit(self._load_sample, int(order[i]), epoch, i) for i in positions]

    def _load_sample(self, row: int, epoch: int, position: int) -> tuple[int, Tensor, list[BadRecord]]:
        """A row and its image. If that cannot be decoded, those of a row drawn by (seed, epoch, row)."""
        generator = np.random.default_rng((abs(self._seed), epoch, row))
        others: Sequence[int] = generator.integers(len(self._data), size=_TRIES).tolist()
        bad: dict[int, BadRecord] = {}
        problem: UserError | None = None
        for candidate in (row, *others):
            if candidate in bad:
                continue
            try:
                return candidate, self._load_image(candidate, epoch), list(bad.values())
            except ReadError:
                raise
            except UserError as error:
                if self._stop_at_damage:
                    raise
                name = image_name(self._data, candidate)
                bad[candidate] = BadRecord(epoch, position, candidate, name, self._name, str(error))
                problem = error
        raise UserError(f"{_TRIES + 1} images in a row cannot be decoded, so the data are at fault: {problem}")

    def _load_image(self, row: int, epoch: int) -> Tensor:
        """(3, S, S) float32: a random crop as in pretraining, then the preprocessing of the model. Or (D,) features."""
        if self.features is not None and bool(self.features[row].isfinite().all()):
            return self.features[row]
        image = read_rgb(self._data.image(row), lambda: image_name(self._data, row))
        if self._crop_scale != (1, 1):
            place = self._seed, epoch, row, self._crop_scale
            top, left, height, width = random_resized_crop_box(image.height, image.width, *place)
            size = self._preprocess.config.size
            image = image.resize((size, size), 3, (left, top, left + width, top + height))
        return self._preprocess(image)
