"""The steps of a transformer layer between its matmuls: residual + dropout + LayerNorm, and GELU, in one pass each."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bclip_fast.ops import custom_op
from bclip_fast.ops.cuda_device import triton_refusal
from bclip_fast.ops.dispatch import Limits, choose, is_exporting, load_backend
from bclip_fast.ops.philox import seed_tensor

from . import aten, reference
from .call import AddNormCall, AddNormGradientCall

__all__ = ["LIMITS", "add_norm", "gelu"]

_FLOATS = (torch.float32, torch.bfloat16)


def _cpu_limits(*inputs: Tensor) -> str | None:
    for tensor in inputs:
        if tensor.device.type != "cpu":
            return f"an input is on {tensor.device}"
        if tensor.dtype not in _FLOATS:
            return f"an input is {tensor.dtype}, not float32 or bfloat16"
    return None


def _triton_limits(*inputs: Tensor) -> str | None:
    # A program of add_norm holds a complete row. gelu has one input and no rows.
    if len(inputs) > 1 and inputs[0].shape[1] > 8192:
        return f"D={inputs[0].shape[1]} is above 8192"
    return next(filter(None, map(triton_refusal, inputs)), None)


LIMITS: Limits = {
    "triton": _triton_limits,
    "cpu": _cpu_limits,
    "torch": lambda *inputs: None,
    "reference": lambda *inputs: None,
}

# Backends of plain torch code. The others are kernels, which a registered operator calls.
_PLAIN = {"torch": aten, "reference": reference}

# Above this number of elements a tensor is large. In a smaller one, a call's overhead exceeds its work.
_LARGE = 1 << 17


def _size_class(x: Tensor) -> str:
    return "large" if x.numel() > _LARGE else "small"


def _norm_class(stream: Tensor, dropout_p: float, seeded: bool) -> str:
    if dropout_p == 0.0:
        return _size_class(stream)
    if seeded:
        return "seeded dropout"  # never measured: plain torch code computes its random numbers one by one
    return f"dropout, {_size_class(stream)}"


def add_norm(
    stream: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    post: bool = False,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """LayerNorm of s = stream + dropout(branch), and the stream for the next layer: s, or the norm's result if `post`.

    Args:
        stream: (T, D), any floating dtype. s has the same dtype.
        branch: (T, D), any floating dtype, or None.
        weight, bias: (D,) parameters of the norm.
        dropout_p: probability of dropping an element of the branch. The other elements are scaled by 1/(1-p).
        seed: seed of the dropout, an int or a 0-dimensional int64 tensor. All backends drop the same elements. By
            default the backend draws from torch's generators, so `torch.manual_seed` fixes the elements and activation
            checkpointing repeats them. A CUDA graph can only capture a seed on the GPU, where the kernels read it at
            each replay.
        dtype: dtype of the normed result. By default the stream's dtype.
        backend: "auto" or one of `ops.BACKENDS`.

    Returns:
        (normed (T, D) in `dtype`, stream (T, D) in the stream's dtype). Derivatives: `ops.derivatives`.

    Raises:
        ValueError: a shape, dtype or probability is wrong. The message names it.
        BackendError: the named backend cannot run this call, or a CUDA graph captures a seed on the CPU.
    """
    if stream.dim() != 2 or not stream.is_floating_point():
        raise ValueError(f"stream must be (T, D) and floating, got {tuple(stream.shape)} {stream.dtype}")
    if branch is not None and branch.shape != stream.shape:
        raise ValueError(f"branch must have the stream's shape {tuple(stream.shape)}, got {tuple(branch.shape)}")
    if weight.shape != stream.shape[1:] or bias.shape != stream.shape[1:]:
        raise ValueError(
            f"weight and bias must be ({stream.shape[1]},), got {tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must lie in [0, 1), got {dropout_p}")
    dtype = dtype or stream.dtype
    if is_exporting(backend) and seed is None:
        normed, total = reference.add_norm(stream, branch, weight, bias, eps, dropout_p, None)
        return normed.to(dtype), normed if post else total
    inputs = [tensor for tensor in (stream, branch, weight, bias) if tensor is not None]
    if dropout_p == 0.0 or branch is None:
        seed, dropout_p = None, 0.0
    shapes = _norm_class(stream, dropout_p, seed is not None)
    normed_like = stream.new_empty(0, dtype=dtype)
    backend = choose("add_norm", LIMITS, backend, *inputs, normed_like, dtype=dtype, shapes=shapes)
    drawn = dropout_p > 0.0 and backend not in _PLAIN
    philox_seed = seed_tensor(seed) if drawn or seed is not None else None
    if backend in _PLAIN:
        normed, total = _PLAIN[backend].add_norm(stream, branch, weight, bias, eps, dropout_p, philox_seed)
        return normed.to(dtype), normed if post else total
    # If both results have one dtype, they are one tensor.
    wide = post and dtype != stream.dtype
    flat = stream, branch, weight, bias, eps, dropout_p, philox_seed, dtype, wide
    normed, total, wide_normed = _add_norm(*flat, backend)
    if post:
        return normed, wide_normed if wide else normed
    return normed, stream if branch is None else total


def gelu(x: Tensor, *, backend: str = "auto") -> Tensor:
    """x * Phi(x), the exact GELU (Hendrycks and Gimpel 2016, arXiv 1606.08415), for any shape.

    Derivatives: `ops.derivatives`.

    Raises:
        ValueError: x isn't floating.
        BackendError: the named backend cannot run this call.
    """
    if not x.is_floating_point():
        raise ValueError(f"x must be floating point, got {x.dtype}")
    if is_exporting(backend):
        return F.gelu(x)
    backend = choose("gelu", LIMITS, backend, x, shapes=_size_class(x))
    return F.gelu(x) if backend in _PLAIN else _gelu(x, backend)


def _shape_if(condition: bool, like: Tensor) -> torch.Size:
    return like.shape if condition else torch.Size((0,))


def _add_norm_forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(normed in `dtype`, sum or empty without a branch, normed in the stream's dtype or empty unless `wide`)."""
    return load_backend("pointwise", inputs[-1]).add_norm(AddNormCall(*inputs[:-1]))


def _add_norm_fake(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    call, stream = AddNormCall(*inputs[:-1]), inputs[0]
    normed = stream.new_empty(stream.shape, dtype=call.dtype)
    total = stream.new_empty(_shape_if(call.branch is not None, stream))
    return normed, total, stream.new_empty(_shape_if(call.wide, stream))


def _add_norm_gradients(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of stream, branch (empty without `branch_dtype`), weight and bias."""
    return load_backend("pointwise", inputs[-1]).add_norm_backward(AddNormGradientCall(*inputs[:-1]))


def _add_norm_gradients_fake(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = AddNormGradientCall(*inputs[:-1])
    total, weight, separate = call.total, call.weight, call.branch_dtype is not None
    branch = total.new_empty(_shape_if(separate, total), dtype=call.branch_dtype or total.dtype)
    return total.new_empty(total.shape), branch, torch.empty_like(weight), torch.empty_like(weight)


def _add_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    call = AddNormCall(*inputs[:-1])
    # An unused output's gradient stays None and is never read. Traced code materializes it anyway.
    ctx.set_materialize_grads(False)
    ctx.has_branch, ctx.wide, ctx.backend = call.branch is not None, call.wide, inputs[-1]
    # The branch's gradient is the stream's, unless dropout or another dtype separates them.
    separate = call.branch is not None and (call.dropout_p > 0.0 or call.branch.dtype != call.stream.dtype)
    ctx.branch_dtype = call.branch.dtype if separate and call.branch is not None else None
    ctx.eps, ctx.dropout_p = call.eps, call.dropout_p
    ctx.save_for_backward(call.stream if call.branch is None else output[1], call.weight, call.seed)


def _add_norm_gradient(ctx: Any, grad: Any, total_grad: Any, wide_grad: Any) -> tuple[Any, ...]:
    total, weight, seed = ctx.saved_tensors
    total_grad, wide_grad = (total_grad if ctx.has_branch else None), (wide_grad if ctx.wide else None)
    stream, branch, weight_grad, bias_grad = _add_norm_backward(
        grad, total_grad, wide_grad, total, weight, ctx.eps, ctx.dropout_p, seed, ctx.branch_dtype, ctx.backend
    )
    if ctx.branch_dtype is None:
        branch = stream if ctx.has_branch else None
    return stream, branch, weight_grad, bias_grad, *[None] * 6


_add_norm = custom_op.define(
    "add_norm",
    f"({custom_op.arguments(AddNormCall)}, str backend) -> (Tensor, Tensor, Tensor)",
    _add_norm_forward,
    _add_norm_fake,
    setup=_add_norm_setup,
    gradient=_add_norm_gradient,
)
_add_norm_backward = custom_op.define(
    "add_norm_backward",
    f"({custom_op.arguments(AddNormGradientCall)}, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _add_norm_gradients,
    _add_norm_gradients_fake,
)


def _gelu_setup(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
    x, ctx.backend = inputs
    ctx.save_for_backward(x)


_gelu_backward = custom_op.define(
    "gelu_backward",
    "(Tensor grad, Tensor x, str backend) -> Tensor",
    lambda grad, x, backend: load_backend("pointwise", backend).gelu_backward(grad, x),
    lambda grad, x, backend: x.new_empty(x.shape),
)
_gelu = custom_op.define(
    "gelu",
    "(Tensor x, str backend) -> Tensor",
    lambda x, backend: load_backend("pointwise", backend).gelu(x),
    lambda x, backend: x.new_empty(x.shape),
    setup=_gelu_setup,
    gradient=lambda ctx, grad: (_gelu_backward(grad, *ctx.saved_tensors, ctx.backend), None),
)
