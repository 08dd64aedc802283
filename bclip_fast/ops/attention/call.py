"""Calls of both attention operators, as every backend receives them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class AttentionCall:
    """Attention inside each sequence. The rows of `qkv` are the tokens, one sequence after another."""

    qkv: Tensor  # (T, 3, H, d), any strides
    cu_seqlens: Tensor | None  # (n + 1,) int32: sequence i owns rows cu_seqlens[i] to cu_seqlens[i + 1]
    key_mask: Tensor | None  # (T,) bool, True for a row whose key is visible
    max_seqlen: int  # upper bound of the lengths, or the common length if cu_seqlens is None
    causal: bool
    dropout_p: float
    seed: Tensor | None  # () int64 on any device, or None if dropout_p is 0
    scale: float

    def num_sequences(self) -> int:
        """The number of sequences, empty ones included."""
        if self.cu_seqlens is None:
            return len(self.qkv) // max(self.max_seqlen, 1)
        return len(self.cu_seqlens) - 1


@dataclass(frozen=True)
class SingleQueryCall:
    """Attention of one query per sequence to that sequence's tokens."""

    query: Tensor  # (n, H, d), any strides
    key_value: Tensor  # (T, 2, H, d), any strides: the tokens of all sequences
    rows: Tensor  # (n,) int64: the query's row among the tokens, inside its sequence
    cu_seqlens: Tensor  # (n + 1,) int32: sequence i owns rows cu_seqlens[i] to cu_seqlens[i + 1]
    causal: bool  # whether the query sees only its own row and earlier ones
    dropout_p: float
    seed: Tensor | None  # () int64 on any device, or None if dropout_p is 0
    scale: float

    def visible_stops(self) -> Tensor:
        """(n,) int64: the index after the last row that each query sees."""
        return self.rows + 1 if self.causal else self.cu_seqlens[1:].long()
