"""The caption part of CoCa's loss over the global batch (Yu et al. 2022, arXiv 2205.01917, equations 3 and 4).

It is the mean cross-entropy of all predicted tokens of the global batch. These are the tokens after a caption's first
one, without padding. Every token counts the same, whichever rank and micro-batch has it. The loss therefore doesn't
depend on the number of ranks. In open_clip, each rank averages over its tokens, and the ranks average their losses.
Both definitions are equal if every rank has equally many tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from bclip_fast import distributed
from bclip_fast.data.batch import Batch
from bclip_fast.model.coca import num_labels
from bclip_fast.model.packed import Packed


@dataclass(frozen=True)
class CaptionLoss:
    """The part's weight in the loss, and the token that pads captions."""

    weight: float
    pad_id: int

    def num_labels(self, batch: Batch) -> int:
        """Number of predicted tokens of a micro-batch."""
        return int(num_labels(Packed.of(batch.ids, batch.lengths), self.pad_id))

    def factor(self, num_labels: int) -> float:
        """The factor of this rank's sums of cross-entropies. Collective.

        The average over ranks of the sums times their factors is the weighted loss of the global batch.

        Args:
            num_labels: number of predicted tokens of this rank's batch.
        """
        return self.weight * distributed.world_size() / max(1, distributed.total(num_labels))


def mean_over_ranks(values: Sequence[Tensor]) -> Tensor:
    """The sum of this rank's scalars, averaged over the ranks, without a wait for the device. Collective."""
    mean = torch.stack([value.detach() for value in values]).sum()
    if distributed.world_size() > 1:
        dist.all_reduce(mean)
    return mean / distributed.world_size()
