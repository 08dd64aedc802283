"""Addresses for compiled code, which reads and writes wherever an address points: so every tensor is checked first."""

from __future__ import annotations

import torch
from torch import Tensor


def address(tensor: Tensor, dtype: torch.dtype, *shape: int) -> int:
    """The address of a contiguous CPU tensor that has exactly this dtype and shape.

    Raises:
        ValueError: the tensor differs. The caller in this package made the mistake, not the user.
    """
    return cuda_address(tensor, dtype, _CPU, *shape)


def cuda_address(tensor: Tensor, dtype: torch.dtype, device: torch.device, *shape: int) -> int:
    """The address of a contiguous tensor on `device` that has exactly this dtype and shape; errors as in `address`."""
    if tensor.device != device or tensor.dtype != dtype or tensor.shape != shape or not tensor.is_contiguous():
        raise ValueError(
            f"compiled code expects a contiguous {dtype} tensor on {device} of shape {shape}, got {tensor.dtype}, "
            f"{tensor.device}, shape {tuple(tensor.shape)}, strides {tensor.stride()}"
        )
    return tensor.data_ptr()


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, copied if necessary, with unit stride in the last dimension and everything else aligned to 16 bytes.

    The address and the other strides are then multiples of 16 bytes.
    """
    size = tensor.element_size()
    if tensor.stride(-1) != 1 or any(stride * size % 16 for stride in tensor.stride()[:-1]):
        tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone(memory_format=torch.contiguous_format)


_CPU = torch.device("cpu")
