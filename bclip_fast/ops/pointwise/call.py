"""Calls of the operators, as every backend receives them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AddNormCall:
    """LayerNorm of stream + dropout(branch)."""

    stream: Tensor  # (T, D)
    branch: Tensor | None  # (T, D)
    weight: Tensor  # (D,)
    bias: Tensor  # (D,)
    eps: float
    dropout_p: float
    seed: Tensor | None  # () int64; None means no dropout
    dtype: torch.dtype  # dtype of the normed result
    wide: bool  # whether the normed result is also returned in the stream's dtype


@dataclass(frozen=True)
class AddNormGradientCall:
    """The backward pass of an `AddNormCall`. A gradient is None if nothing uses its output."""

    grad: Tensor | None  # (T, D), of the normed result in `dtype`
    total_grad: Tensor | None  # (T, D), of the sum
    wide_grad: Tensor | None  # (T, D), of the normed result in the stream's dtype
    total: Tensor  # (T, D), stream + dropout(branch)
    weight: Tensor
    eps: float
    dropout_p: float
    seed: Tensor | None
    branch_dtype: torch.dtype | None  # None if the branch has no gradient, or has the stream's
