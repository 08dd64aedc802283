"""Captions without padding: the tokenizer returns them, and the text towers compute on them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from bclip_fast.ops.attention.sdpa import owners
from bclip_fast.ops.dispatch import is_exporting


class Packed(NamedTuple):
    """The tokens of n captions, one after another.

    ids: (T,) int64.
    cu_seqlens: (n + 1,) int32, rising from 0 to T. Caption i owns ids[cu_seqlens[i]:cu_seqlens[i + 1]], at least one.
    max_seqlen: number of tokens of the longest caption, or more.
    """

    ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int

    @classmethod
    def of(cls, ids: Tensor, lengths: Sequence[int]) -> Packed:
        """Pack the concatenated tokens of all captions, on the CPU, given each caption's length."""
        bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        return cls(ids, bounds, max(lengths, default=0))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Packed:
        """Return a copy on `device`."""
        ids, cu_seqlens = (part.to(device, non_blocking=non_blocking) for part in (self.ids, self.cu_seqlens))
        return Packed(ids, cu_seqlens, self.max_seqlen)

    def pin_memory(self) -> Packed:
        """Return a copy in pinned memory."""
        return Packed(self.ids.pin_memory(), self.cu_seqlens.pin_memory(), self.max_seqlen)

    @property
    def lengths(self) -> Tensor:
        """(n,) int32: number of tokens of each caption."""
        return self.cu_seqlens.diff()

    @property
    def owners(self) -> Tensor:
        """(T,) int64: the caption that each token belongs to."""
        if is_exporting():
            return owners(torch.arange(self.ids.shape[0], device=self.ids.device), self.cu_seqlens)
        captions = torch.arange(len(self.cu_seqlens) - 1, device=self.ids.device)
        return captions.repeat_interleave(self.lengths, output_size=len(self.ids))

    @property
    def positions(self) -> Tensor:
        """(T,) int64: each token's position in its caption, from 0."""
        return torch.arange(self.ids.shape[0], device=self.ids.device) - self.cu_seqlens[self.owners]
