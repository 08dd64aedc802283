"""GELU of a linear layer: two kernels, or one that torch.compile generates.

A kernel that applies GELU to its sums saves a write and a read of the wide result (docs/operators.md). cuBLASLt has
such an epilogue for the tanh approximation only, and torch has no gradient of it. So the backend "torch" lets Inductor
fuse the exact GELU into its own product, if that is faster than cuBLAS on this device. Nobody has measured that yet.
`auto` takes it only by a record of `bclip tune`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from bclip_fast.ops.cuda_device import triton_refusal
from bclip_fast.ops.custom_op import without_autocast
from bclip_fast.ops.derivatives import check_first_only
from bclip_fast.ops.dispatch import MISSING, Limits, choose, is_exporting
from bclip_fast.ops.dtypes import has_autocast
from bclip_fast.ops.pointwise import gelu

from . import linear

__all__ = ["LIMITS", "linear_gelu"]


def _torch_limits(x: Tensor, *parameters: Tensor) -> str | None:
    if "triton" in MISSING:
        return MISSING["triton"]
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"x is {x.dtype}, not bfloat16 or float16"
    return triton_refusal(x)


LIMITS: Limits = {"torch": _torch_limits, "reference": lambda *inputs: None}


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, *, backend: str = "auto") -> Tensor:
    """gelu(x W^T + b) with the exact GELU of `ops.gelu`.

    Args:
        x, weight, bias: as in `ops.linear`.
        backend: "torch" is one kernel by torch.compile, on a GPU in half precision. "reference" is `ops.linear` and
            then `ops.gelu`, each on its own backend. "auto" takes "torch" if a tuning record lists it first. As in all
            code of torch.compile, its backward pass refuses retain_graph=True.

    Returns:
        (..., N) in the dtype of `ops.linear`. Derivatives: `ops.derivatives`.

    Raises:
        ValueError: shapes are wrong. The message names them.
        BackendError: the named backend cannot run this call.
    """
    if is_exporting(backend):
        return gelu(linear(x, weight, bias))
    kind = x.device.type
    if x.dtype != torch.float64 and has_autocast(kind) and torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
    few = x.numel() < 512 * x.shape[-1]
    shapes, otherwise = "few rows" if few else "many rows", ("reference", "torch")
    backend = choose("linear_gelu", LIMITS, backend, x, weight, bias, library=True, shapes=shapes, otherwise=otherwise)
    if backend == "reference":
        return gelu(linear(x, weight, bias))
    if weight.dim() != 2 or x.shape[-1] != weight.shape[1] or bias.shape != weight.shape[:1]:
        shapes = f"{tuple(x.shape)}, {tuple(weight.shape)} and {tuple(bias.shape)}"
        raise ValueError(f"x must be (..., K), weight (N, K) and bias (N,), got {shapes}")
    return _in_one_kernel(check_first_only("linear_gelu", x), weight, bias)


@without_autocast
def _in_one_kernel(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    return _definition(x, weight, bias) if torch.compiler.is_compiling() else _compiled()(x, weight, bias)


def _definition(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.linear(x, weight, bias))


@cache
def _compiled() -> Callable[..., Tensor]:
    """`_definition` by Inductor, which times its own products with GELU against cuBLAS and a second kernel."""
    return torch.compile(_definition, options={"max_autotune_gemm": True})
