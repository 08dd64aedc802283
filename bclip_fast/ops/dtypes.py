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


def has_autocast(device: str) -> bool:
    """Whether torch has autocast on this kind of device."""
    return torch.amp.is_autocast_available(device)


# The mark of torch.compiler.assume_constant_result, whose import takes two seconds. Before torch 2.13, Dynamo cannot
# trace the function.
has_autocast._dynamo_marked_constant = True  # type: ignore[attr-defined]


def dtype_name(dtype: torch.dtype | None) -> str:
    """The name without its module, such as "float32". None gives ""."""
    return "" if dtype is None else str(dtype).removeprefix("torch.")
