"""What every call into compiled code must check first: it takes bare addresses and would write anywhere."""

from __future__ import annotations

import os

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


def triton_refusal(tensor: Tensor, dtype: torch.dtype | None = None) -> str | None:
    """The reason why no Triton kernel can take this tensor, in its own dtype unless given, or None."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    dtype = dtype or tensor.dtype
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"takes float32, bfloat16 and float16, not {dtype}"
    if interpreted and dtype == torch.bfloat16:
        return "the interpreter (TRITON_INTERPRET=1) cannot multiply bfloat16"
    if not interpreted and tensor.device.type != "cuda":
        return f"device is {tensor.device.type}, not cuda"
    if not interpreted and torch.cuda.get_device_capability(tensor.device) < (8, 0):
        return "needs a GPU of compute capability 8.0 or newer"
    return None
