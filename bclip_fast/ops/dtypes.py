"""Dtypes that several operators derive from their inputs."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """float64 for a float64 tensor, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def widened(tensor: Tensor) -> Tensor:
    """The tensor in its accumulation dtype."""
    return tensor.to(accumulation_dtype(tensor))


def dtype_name(dtype: torch.dtype | None) -> str:
    """The name without its module, as in "float32"; "" for None."""
    return "" if dtype is None else str(dtype).removeprefix("torch.")
