"""What every call into compiled code must check first: it takes bare addresses and would write anywhere."""

from __future__ import annotations

import torch
from torch import Tensor


def address(tensor: Tensor, dtype: torch.dtype, *shape: int) -> int:
    """The address of a contiguous tensor in the memory of this process, of just this dtype and shape.

    Raises:
        ValueError: anything else; it is the wrapper's mistake, not the user's.
    """
    if tensor.device.type != "cpu" or tensor.dtype != dtype or tensor.shape != shape or not tensor.is_contiguous():
        raise ValueError(
            f"compiled code expects a contiguous {dtype} CPU tensor of shape {shape}, got "
            f"{tensor.dtype}, {tensor.device}, shape {tuple(tensor.shape)}, strides {tensor.stride()}"
        )
    return tensor.data_ptr()
