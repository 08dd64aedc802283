"""A batch of samples, as the loaders yield it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class BadRecord:
    """A damaged sample that a fallback replaces at (epoch, position).

    Attributes:
        index: index in the split.
        key, shard: name and shard according to the shard's index file.
        reason: description of the damage.
    """

    epoch: int
    position: int
    index: int
    key: str
    shard: str
    reason: str


class TeacherFeatures(Protocol):
    """A teacher's features of each sample of a dataset."""

    def rows(self, indices: Sequence[int]) -> Tensor:
        """The features (b, 2, E) of samples, of each image and its caption."""

    def is_damaged(self, index: int) -> bool:
        """Whether a sample has no features, because the teacher could not read it."""


@dataclass
class Batch:
    """One rank's part of a global batch, or a micro-batch of it.

    Attributes:
        images: (b, size, size, 3) uint8 RGB.
        ids: (T,) int64, the tokens of all captions, one caption after another.
        lengths: number of tokens of each of the b captions.
        keys: names of the b samples.
        epoch: number of the pass over the data, from 0.
        bad: the damaged samples that fallbacks replace, in the order of their rows. They include damaged fallbacks.
        last: whether this is the rank's last micro-batch of the global batch.
        groups: (b,) int64, equal for samples that are positives of one another. None: each sample has one positive.
        captions: the b captions, for a teacher's tokenizer. None once it has read them.
        teacher: (b, 2, E), a teacher's features of each image and of its caption. None: the loss has no teacher.
    """

    images: Tensor
    ids: Tensor
    lengths: list[int]
    keys: list[str]
    epoch: int
    bad: list[BadRecord] = field(default_factory=list)
    last: bool = True
    groups: Tensor | None = None
    captions: list[str] | None = None
    teacher: Tensor | None = None
