"""The linear layer, in bfloat16 with weights that may be float32 masters."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import processor
from ..dispatch import BACKENDS, MISSING, Limits, choose, kernels
from . import reference

__all__ = ["LIMITS", "linear"]


def _cpu_limits(x: Tensor, *parameters: Tensor) -> str | None:
    for tensor in (x, *parameters):
        if tensor.device.type != "cpu":
            return f"an input is on {tensor.device}"
    if x.dtype != torch.bfloat16:
        return f"x is {x.dtype}, not bfloat16"
    for tensor in parameters:
        if tensor.dtype not in (torch.float32, torch.bfloat16):
            return f"{tensor.dtype} isn't among float32 and bfloat16"
        if tensor.numel() == 0:
            return "a parameter is empty"
    if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") != torch.bfloat16:
        return f"autocast asks for {torch.get_autocast_dtype('cpu')}"
    return MISSING.get("cpu") or processor.ISA_ERROR


LIMITS: Limits = {"cpu": _cpu_limits, "reference": lambda *inputs: None}


# With fewer rows most of the time is spent on reading the weights, and the library is faster than the matrix unit.
_MANY_ROWS = 512
_LIBRARY_FIRST = ("reference", "cpu")


def _library_is_faster(x: Tensor, few_rows: bool) -> bool:
    """Whether torch's bfloat16 product is tried before the cpu backend where nothing has been measured.

    The cpu backend wins where AMX multiplies many rows, and where the library has no instructions for bfloat16. With
    AVX512-BF16 alone the library is 2.5 times as fast as products in float32, from 4 rows to thousands.
    """
    if processor.lacks_bfloat16(x.device):
        return False
    return not processor.HAS_AMX or few_rows


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """x W^T + b: `F.linear`, and in bfloat16 on a CPU with AMX, or without bfloat16 instructions, faster.

    Args:
        x: (..., K), any floating dtype. Autocast casts it as it casts the input of `F.linear`.
        weight: (N, K), in x's dtype or wider. The cpu backend returns its gradient in its own dtype, never rounded to
            x's. AMX and the library multiply the weight rounded to x's dtype. A CPU without bfloat16 instructions
            multiplies in float32, by a float32 weight as it is.
        bias: (N,) or None. The cpu backend adds it to the sum before rounding.
        backend: "auto", "cpu" or "reference". What the cpu backend doesn't take the library runs, also where another
            backend is named for all operators.

    Returns:
        (..., N) in x's dtype, or in autocast's, where that casts x. Differentiable once.

    Raises:
        ValueError: shapes that don't fit; the message names them.
        BackendError: the named backend cannot run this call.
    """
    if x.dim() < 1 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x must be (..., K) and weight (N, K), got {tuple(x.shape)} and {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({weight.shape[0]},), got {tuple(bias.shape)}")
    if x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    inputs = (x, weight) if bias is None else (x, weight, bias)
    few = x.numel() < _MANY_ROWS * x.shape[-1]
    shapes, otherwise = "few rows" if few else "many rows", _LIBRARY_FIRST if _library_is_faster(x, few) else BACKENDS
    backend = choose("linear", LIMITS, backend, *inputs, library=True, shapes=shapes, otherwise=otherwise)
    return reference.linear(x, weight, bias) if backend == "reference" else _linear(x, weight, bias, backend)


@torch.library.custom_op("bclip::linear", mutates_args=())
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    return kernels("matmul", backend).linear(x, weight, bias)


@_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("bclip::linear_backward", mutates_args=())
def _linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_dtype: torch.dtype | None,
    x_wanted: bool,
    weight_wanted: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, each in its own dtype; nothing for those not wanted."""
    return kernels("matmul", backend).linear_backward(grad, x, weight, bias_dtype, x_wanted, weight_wanted)


@_linear_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_dtype: torch.dtype | None,
    x_wanted: bool,
    weight_wanted: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    bias = weight.new_empty(weight.shape[0] if bias_dtype else 0, dtype=bias_dtype or torch.float32)
    return x.new_empty(x.shape if x_wanted else (0,)), weight.new_empty(weight.shape if weight_wanted else (0,)), bias


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, bias, ctx.backend = inputs
    ctx.bias_dtype = bias.dtype if bias is not None else None
    ctx.save_for_backward(x, weight)


def _gradient(ctx, grad):  # type: ignore[no-untyped-def]
    x_wanted, weight_wanted, bias_wanted = ctx.needs_input_grad[:3]
    bias_dtype = ctx.bias_dtype if bias_wanted else None
    x, weight, bias = _linear_backward(grad, *ctx.saved_tensors, bias_dtype, x_wanted, weight_wanted, ctx.backend)
    return x if x_wanted else None, weight if weight_wanted else None, bias if bias_dtype else None, None


_linear.register_autograd(_gradient, setup_context=_setup)
