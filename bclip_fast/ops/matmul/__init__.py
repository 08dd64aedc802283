"""The linear layer, in bfloat16 with bfloat16 weights or float32 master weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bclip_fast.ops import custom_op, processor
from bclip_fast.ops.dispatch import BACKENDS, Limits, choose, is_exporting, load_backend

from . import reference
from .call import LinearCall, LinearGradientCall

__all__ = ["LIMITS", "linear"]


def _cpu_limits(x: Tensor, *parameters: Tensor) -> str | None:
    for tensor in (x, *parameters):
        if tensor.device.type != "cpu":
            return f"an input is on {tensor.device}"
    if x.dtype != torch.bfloat16:
        return f"x is {x.dtype}, not bfloat16"
    for tensor in parameters:
        if tensor.dtype not in (torch.float32, torch.bfloat16):
            return f"a parameter is {tensor.dtype}, not float32 or bfloat16"
        if tensor.numel() == 0:
            return "a parameter is empty"
    if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") != torch.bfloat16:
        return f"autocast casts to {torch.get_autocast_dtype('cpu')}, not bfloat16"
    return None


LIMITS: Limits = {"cpu": _cpu_limits, "reference": lambda *inputs: None}


# With fewer rows, reading the weights dominates, and torch's library is faster than the matrix unit.
_MANY_ROWS = 512
_LIBRARY_FIRST = ("reference", "cpu")


def _library_is_faster(x: Tensor, few_rows: bool) -> bool:
    """Whether `auto` without measurements tries torch's bfloat16 product before the cpu backend.

    The cpu backend wins if AMX multiplies many rows, or if the library has no instructions for bfloat16. With
    AVX512-BF16 but no AMX, the library is 2.5 times as fast as products in float32, from 4 rows to thousands.
    """
    if processor.lacks_bfloat16(x.device):
        return False
    return not processor.HAS_AMX or few_rows


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """x W^T + b, as `F.linear`, but faster in bfloat16 on a CPU with AMX or without any bfloat16 instructions.

    Args:
        x: (..., K), any floating dtype. Autocast casts it like the input of `F.linear`.
        weight: (N, K), in x's dtype or wider. The cpu backend returns its gradient in the weight's dtype, never rounded
            to x's. AMX and the library multiply the weight rounded to x's dtype. A CPU without bfloat16 instructions
            multiplies in float32, by the unrounded weight.
        bias: (N,) or None. The cpu backend adds it to the sum before rounding.
        backend: "auto", "cpu" or "reference". The library runs the calls that the cpu backend refuses, even if a name
            for all operators selects another backend.

    Returns:
        (..., N) in x's dtype, or in autocast's if autocast casts x. Derivatives: `ops.derivatives`.

    Raises:
        ValueError: shapes are wrong. The message names them.
        BackendError: the named backend cannot run this call.
    """
    if x.dim() < 1 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x must be (..., K) and weight (N, K), got {tuple(x.shape)} and {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({weight.shape[0]},), got {tuple(bias.shape)}")
    if x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if is_exporting(backend):
        return reference.linear(x, weight, bias)
    inputs = (x, weight) if bias is None else (x, weight, bias)
    few = x.numel() < _MANY_ROWS * x.shape[-1]
    shapes, otherwise = "few rows" if few else "many rows", _LIBRARY_FIRST if _library_is_faster(x, few) else BACKENDS
    backend = choose("linear", LIMITS, backend, *inputs, library=True, shapes=shapes, otherwise=otherwise)
    if backend == "reference":
        return reference.linear(x, weight, bias)
    return _linear(x, weight, bias, backend)


def _forward(*inputs: Any) -> Tensor:
    return load_backend("matmul", inputs[-1]).linear(LinearCall(*inputs[:-1]))


def _gradients(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, each in the dtype of its tensor, or empty if not needed."""
    return load_backend("matmul", inputs[-1]).linear_backward(LinearGradientCall(*inputs[:-1]))


def _gradients_fake(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = LinearGradientCall(*inputs[:-1])
    x, weight = call.x, call.weight
    bias = weight.new_empty(weight.shape[0] if call.bias_dtype else 0, dtype=call.bias_dtype or torch.float32)
    return (
        x.new_empty(x.shape if call.x_needs_grad else (0,)),
        weight.new_empty(weight.shape if call.weight_needs_grad else (0,)),
        bias,
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.backend = inputs
    ctx.bias_dtype = bias.dtype if bias is not None else None
    ctx.save_for_backward(x, weight)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    bias_dtype = ctx.bias_dtype if needs_bias else None
    x, weight, bias = _linear_backward(grad, *ctx.saved_tensors, bias_dtype, needs_x, needs_weight, ctx.backend)
    return x if needs_x else None, weight if needs_weight else None, bias if bias_dtype else None, None


_linear = custom_op.define(
    "linear",
    f"({custom_op.arguments(LinearCall)}, str backend) -> Tensor",
    _forward,
    lambda x, weight, bias, backend: x.new_empty(*x.shape[:-1], weight.shape[0]),
    setup=_setup,
    gradient=_gradient,
)
_linear_backward = custom_op.define(
    "linear_backward",
    f"({custom_op.arguments(LinearGradientCall)}, str backend) -> (Tensor, Tensor, Tensor)",
    _gradients,
    _gradients_fake,
)
