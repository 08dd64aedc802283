"""Checks that both operators of attention make."""

from __future__ import annotations

import torch
from torch import Tensor


def cpu_limits(operand: Tensor, dropout_p: float = 0.0, packed: bool = False) -> str | None:
    """The reason against the C++ kernels, for an operand (..., d)."""
    if operand.device.type != "cpu":
        return f"the input is on {operand.device}"
    if operand.dtype not in (torch.float32, torch.bfloat16):
        return f"{operand.dtype} is neither float32 nor bfloat16"
    if operand.shape[-1] % 16:
        return f"the head dimension {operand.shape[-1]} isn't a multiple of 16"
    return None


def checked_dropout(
    name: str, operand: Tensor, dropout_p: float, seed: Tensor | int | None, scale: float | None
) -> tuple[Tensor | None, float]:
    """Seed (None without dropout) and scale as the backends take them, for the operand `name`, (..., d)."""
    if not operand.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {operand.dtype}")
    if operand.shape[-1] == 0:
        raise ValueError(f"{name} must have a head dimension of at least 1, got {tuple(operand.shape)}")
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
