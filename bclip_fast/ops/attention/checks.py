"""Checks that both operators of attention make."""

from __future__ import annotations

import torch
from torch import Tensor


def checked_dropout(
    operand: Tensor, dropout_p: float, seed: Tensor | int | None, scale: float | None
) -> tuple[Tensor | None, float]:
    """Seed (None without dropout) and scale as the backends take them, for an operand (..., d)."""
    if not operand.is_floating_point():
        raise ValueError(f"qkv must be floating point, got {operand.dtype}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must lie in [0, 1), got {dropout_p}")
    if isinstance(seed, Tensor) and (seed.dim() != 0 or seed.dtype != torch.int64):
        raise ValueError(f"seed must be a 0-dimensional int64 tensor, got {seed.dtype} of shape {tuple(seed.shape)}")
    if dropout_p == 0.0:
        seed = None
    elif seed is None:
        seed = torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu")
    elif not isinstance(seed, Tensor):
        seed = torch.tensor(seed, dtype=torch.int64, device="cpu")
    return seed, operand.shape[-1] ** -0.5 if scale is None else scale
