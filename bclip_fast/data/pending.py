"""Batches that threads of the loader are making."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass

from torch import Tensor

from .batch import BadRecord


@dataclass
class Part:
    """The samples that one task reads: some rows of a batch."""

    keys: list[str]
    ids: Tensor
    lengths: list[int]
    bad: list[BadRecord]
    indices: list[int]
    captions: list[str]


@dataclass
class PendingBatch:
    """A micro-batch whose tasks write into `images`. last: it is the rank's last one of the global batch."""

    images: Tensor
    parts: list[Future[Part]]
    epoch: int
    last: bool


@dataclass
class Cursor:
    """The next micro-batch to prepare, and the number of its global batch."""

    number: int
    micro_batch: int = 0


def cancel_parts(plan: Future[PendingBatch]) -> None:
    """Cancel the tasks of a batch that have not begun."""
    if not plan.cancelled() and plan.exception() is None:
        for part in plan.result().parts:
            part.cancel()
