"""The limits of the backends.

A limit takes the features, the dtype in which they are multiplied (by default theirs), and whether results must be
bitwise reproducible. All our kernels sum in a fixed order and use no atomics.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from bclip_fast.ops.cuda_device import cuda_refusal, triton_refusal
from bclip_fast.ops.dispatch import Limits


def _library_limits(
    image: Tensor, text: Tensor, dtype: torch.dtype | None = None, deterministic: bool = False
) -> str | None:
    """cuBLAS gives the same bits from run to run only with a workspace configuration (NVIDIA, cuBLAS, 2.1.4)."""
    is_configured = os.environ.get("CUBLAS_WORKSPACE_CONFIG") in (":4096:8", ":16:8")
    if deterministic and image.device.type == "cuda" and not is_configured:
        return "deterministic=True needs CUBLAS_WORKSPACE_CONFIG=:4096:8 in the environment before CUDA starts"
    return None


def _triton_limits(
    image: Tensor, text: Tensor, dtype: torch.dtype | None = None, deterministic: bool = False
) -> str | None:
    reason = triton_refusal(image, dtype)
    if reason is not None:
        return reason
    if image.shape[1] > 2048:
        return f"D={image.shape[1]} is above 2048"
    return _library_limits(image, text, dtype, deterministic)


def _cuda_limits(
    image: Tensor, text: Tensor, dtype: torch.dtype | None = None, deterministic: bool = False
) -> str | None:
    return cuda_refusal(image, dtype) or _library_limits(image, text, dtype, deterministic)


def _cpu_limits(
    image: Tensor, text: Tensor, dtype: torch.dtype | None = None, deterministic: bool = False
) -> str | None:
    if image.device.type != "cpu":
        return f"the features are on {image.device}"
    dtype = dtype or image.dtype
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"{dtype} is not float32, bfloat16 or float16"
    return None


LIMITS: Limits = {
    "triton": _triton_limits,
    "cuda": _cuda_limits,
    "cpu": _cpu_limits,
    "reference": _library_limits,
}


def shape_class(text: Tensor) -> str:
    """The class of shapes in the key of a tuning record."""
    if text.shape[0] <= 256:
        return "B <= 256"
    return "B <= 1024" if text.shape[0] <= 1024 else "B > 1024"
