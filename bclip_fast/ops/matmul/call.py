"""Calls of the operator, as every backend receives them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LinearCall:
    """x W^T + b."""

    x: Tensor  # (..., K)
    weight: Tensor  # (N, K)
    bias: Tensor | None  # (N,)


@dataclass(frozen=True)
class LinearGradientCall:
    """The backward pass of a `LinearCall`."""

    grad: Tensor  # (..., N)
    x: Tensor
    weight: Tensor
    bias_dtype: torch.dtype | None  # None if the bias needs no gradient
    x_needs_grad: bool
    weight_needs_grad: bool
