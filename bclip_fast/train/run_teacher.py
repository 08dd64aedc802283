"""The teacher of a run: it embeds each batch, or each sample once before the first step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bclip_fast import distributed
from bclip_fast.data.batch import Batch
from bclip_fast.data.image_files import read_rgb
from bclip_fast.data.shards.format import Sample
from bclip_fast.data.shards.mixed import Dataset
from bclip_fast.data.storage import ReadError
from bclip_fast.data.transform import Preprocess, PreprocessConfig
from bclip_fast.errors import UserError
from bclip_fast.eval.datasets import EvalDataset, image_name
from bclip_fast.ops import image as image_ops

from .losses import LossConfig
from .precision import autocast_precision
from .teacher import Teacher, load_teacher
from .teacher_cache import TeacherCache

log = logging.getLogger(__name__)

CHUNK = 64
"""Number of samples that the teacher embeds at a time, before the first step."""

ReadSamples = Callable[[Sequence[int], PreprocessConfig], tuple[Tensor, list[str], list[int]]]
"""Function from samples and a teacher's pixels to images (n, S, S, 3) uint8, captions, and the rows of damaged samples.
"""


class RunTeacher:
    """The teacher of a run's loss. A loss without a teacher has one that does nothing. Writes nothing. Collective.

    Args:
        config: configuration of the loss.
        precision: precision of the run. The teacher computes under autocast, with fp8 in bf16.
        recorded: state of the checkpoint from which the run continues, or None.
        run: run folder.
        identity: text that differs between datasets.
        read: reads samples for the cache, by their index in the dataset.

    Attributes:
        scale: factor of the teacher's logits.

    Raises:
        UserError: on every rank, if the model cannot be loaded, or is not the same on all ranks or as in the record.
    """

    def __init__(
        self,
        config: LossConfig,
        device: torch.device,
        precision: str,
        recorded: dict[str, Any] | None,
        run: Path,
        identity: str,
        num_samples: int,
        read: ReadSamples,
    ) -> None:
        self.scale, self._digest, self._read, self._num_samples = 0.0, "", read, num_samples
        self._teacher: Teacher | None = None
        self._cache: TeacherCache | None = None
        if not config.teacher:
            return
        precision = autocast_precision(precision)
        teacher = self._teacher = load_teacher(config.teacher, device, precision)
        self.scale, self._digest, self._pixels = teacher.scale, teacher.digest, teacher.pixels
        if len(set(distributed.all_gather_object(self._digest))) > 1:
            raise UserError(f"loss.teacher={config.teacher} is not the same model on all ranks; copy rank 0's to all")
        if recorded and recorded.get("teacher", self._digest) != self._digest:
            raise UserError(
                f"loss.teacher={config.teacher} is another model than the one that taught this run so far; restore "
                "that model, or choose another run folder"
            )
        if config.teacher_cache != "off":
            parts = f"{self._digest} {precision} {identity}"
            self._cache = TeacherCache(run, parts, num_samples, teacher.width, config.teacher_cache)

    @property
    def state(self) -> dict[str, Any]:
        """The state for the checkpoint."""
        return {"teacher": self._digest} if self._digest else {}

    @property
    def loader_options(self) -> dict[str, Any]:
        """Keywords of `Loader`."""
        return {"teacher": self._cache}

    def prepare(self, is_stopped: Callable[[], bool]) -> bool:
        """Compute the features of all samples that the run folder lacks. Collective.

        Returns:
            False if a signal stopped a rank. The run folder keeps the features so far.

        Raises:
            UserError: on every rank, if one of them cannot read its data, or cannot write.
        """
        if self._cache is None:
            return True
        if missing := distributed.run_on_rank0(self._cache.missing):
            log.info(
                "the teacher embeds %d samples, %.2f GiB on disk: %d blocks to compute, in %s",
                *(self._num_samples, self._cache.num_bytes / 2**30, len(missing), self._cache.folder),
            )
        is_complete = self._cache.fill(self._embed, is_stopped)
        self._teacher = None
        return is_complete

    def attach(self, batch: Batch) -> None:
        """Put the teacher's features into a batch that lacks them. Without a teacher, do nothing."""
        if self._teacher is not None and batch.captions is not None:
            batch.teacher, batch.captions = self._teacher.embed(batch.images, batch.captions), None

    def features(self, rows: Sequence[int], images: Callable[[], Tensor], captions: Sequence[str]) -> Tensor | None:
        """The features (b, 2, E) of samples. None without a teacher.

        Args:
            rows: indices of the samples.
            images: function that returns the images (b, S, S, 3) uint8.
        """
        if self._cache is not None:
            return self._cache.rows(rows)
        return None if self._teacher is None else self._teacher.embed(images(), captions)

    def _embed(self, samples: range) -> Tensor:
        assert self._teacher is not None
        parts = []
        for start in range(0, len(samples), CHUNK):
            images, captions, damaged = self._read(samples[start : start + CHUNK], self._pixels)
            features = self._teacher.embed(images, captions)
            if not features.isfinite().all():
                raise UserError(
                    f"loss.teacher={self._teacher.name} gives features that are not finite for a sample from "
                    f"{samples[start]} on; set engine.precision=fp32, or choose another teacher"
                )
            features[damaged] = torch.nan
            parts.append(features.cpu())
        return torch.cat(parts)


def shard_samples(dataset: Dataset, num_threads: int) -> ReadSamples:
    """A reader of shards. It decodes as the loader of training does, so both find the same samples damaged."""

    def read(indices: Sequence[int], pixels: PreprocessConfig) -> tuple[Tensor, list[str], list[int]]:
        samples = dataset.fetch(indices)()
        jpegs = [sample.image if isinstance(sample, Sample) else b"" for sample in samples]
        images, errors = image_ops.decode_resize(
            jpegs,
            pixels.size,
            crop="squash" if pixels.resize_mode == "squash" else "center",
            interpolation=pixels.interpolation,
            threads=num_threads,
            on_bad="report",
        )
        captions = [sample.caption if isinstance(sample, Sample) else "" for sample in samples]
        return images, captions, list(errors)

    return read


def eval_samples(data: EvalDataset, texts: Sequence[str]) -> ReadSamples:
    """A reader of the data of an evaluation, which fine-tuning takes."""

    def read(indices: Sequence[int], pixels: PreprocessConfig) -> tuple[Tensor, list[str], list[int]]:
        images, damaged, preprocess = [], [], Preprocess(pixels)
        for row, index in enumerate(indices):
            try:
                image = read_rgb(data.image(index), lambda index=index: image_name(data, index))  # type: ignore[misc]
                images.append(preprocess.to_uint8(image))
            except ReadError:
                raise
            except UserError:
                damaged.append(row)
                images.append(torch.zeros((pixels.size, pixels.size, 3), dtype=torch.uint8))
        return torch.stack(images), [texts[index] for index in indices], damaged

    return read
