"""What a transformer layer does between its matmuls: residual + dropout + LayerNorm, and GELU, in one pass each."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cuda_device import triton_refusal
from ..dispatch import Limits, choose, kernels
from . import reference

__all__ = ["LIMITS", "add_norm", "gelu"]

_FLOATS = (torch.float32, torch.bfloat16)


def _cpu_limits(*inputs: Tensor) -> str | None:
    for tensor in inputs:
        if tensor.device.type != "cpu":
            return f"an input is on {tensor.device}"
        if tensor.dtype not in _FLOATS:
            return f"{tensor.dtype} isn't among float32 and bfloat16"
    return None


def _triton_limits(*inputs: Tensor) -> str | None:
    # A row of add_norm is held whole; gelu has one input and no rows.
    if len(inputs) > 1 and inputs[0].shape[1] > 8192:
        return f"D is {inputs[0].shape[1]}, more than 8192"
    return next(filter(None, map(triton_refusal, inputs)), None)


LIMITS: Limits = {"triton": _triton_limits, "cpu": _cpu_limits, "reference": lambda *inputs: None}

# More numbers than this are a large tensor to the record of times; fewer, and a call costs more than its work.
_LARGE = 1 << 17


def _class_of(x: Tensor) -> str:
    return "large" if x.numel() > _LARGE else "small"


def _norm_class(stream: Tensor, dropout_p: float, seeded: bool) -> str:
    if dropout_p == 0.0:
        return _class_of(stream)
    if seeded:
        return "seeded dropout"  # never measured: the reference computes its random numbers one by one
    return "dropout, large" if stream.numel() > _LARGE else "dropout, small"


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
    """LayerNorm of s = stream + dropout(branch), and the stream that goes on: s, or, if `post`, the norm's result.

    Args:
        stream: (T, D), any floating dtype, in which s is kept.
        branch: (T, D), any floating dtype, or None.
        weight, bias: (D,) of the norm.
        dropout_p: probability with which an element of the branch is dropped, the rest scaled by 1/(1-p).
        seed: which elements are dropped, the same ones in every backend: an int or a 0-dimensional int64 tensor. Unless
            given, the backend draws from torch's generators, so `torch.manual_seed` fixes it and checkpointing repeats.
        dtype: of the normed result, the stream's unless given.
        backend: "auto" or one of `ops.BACKENDS`.

    Returns:
        (normed (T, D) in `dtype`, stream (T, D) in the stream's dtype). Differentiable once.

    Raises:
        ValueError: a shape, dtype or probability that doesn't fit; the message names it.
        BackendError: the named backend cannot run this call.
    """
    if stream.dim() != 2 or not stream.is_floating_point():
        raise ValueError(f"stream must be (T, D) and floating, got {tuple(stream.shape)} {stream.dtype}")
    if branch is not None and branch.shape != stream.shape:
        raise ValueError(f"branch must be {tuple(stream.shape)} as the stream, got {tuple(branch.shape)}")
    if weight.shape != stream.shape[1:] or bias.shape != stream.shape[1:]:
        raise ValueError(
            f"weight and bias must be ({stream.shape[1]},), got {tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must lie in [0, 1), got {dropout_p}")
    dtype = dtype or stream.dtype
    inputs = [tensor for tensor in (stream, branch, weight, bias) if tensor is not None]
    if dropout_p == 0.0 or branch is None:
        seed, dropout_p = None, 0.0
    shapes = _norm_class(stream, dropout_p, seed is not None)
    normed_like = stream.new_empty(0, dtype=dtype)
    backend = choose("add_norm", LIMITS, backend, *inputs, normed_like, dtype=dtype, shapes=shapes)
    if dropout_p > 0.0 and seed is None and backend != "reference":
        seed = torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu")
    elif isinstance(seed, int):
        seed = torch.tensor(seed, dtype=torch.int64, device="cpu")
    if backend == "reference":
        normed, total = reference.add_norm(stream, branch, weight, bias, eps, dropout_p, seed)
        return normed.to(dtype), normed if post else total
    # Where both are wanted in one dtype they are one tensor.
    wide = post and dtype != stream.dtype
    normed, total, wide_normed = _add_norm(stream, branch, weight, bias, eps, dropout_p, seed, dtype, wide, backend)
    if post:
        return normed, wide_normed if wide else normed
    return normed, stream if branch is None else total


def gelu(x: Tensor, *, backend: str = "auto") -> Tensor:
    """x * Phi(x), the exact GELU (Hendrycks and Gimpel 2016, arXiv 1606.08415); any shape, differentiable once.

    Raises:
        ValueError: x isn't floating.
        BackendError: the named backend cannot run this call.
    """
    if not x.is_floating_point():
        raise ValueError(f"x must be floating point, got {x.dtype}")
    backend = choose("gelu", LIMITS, backend, x, shapes=_class_of(x))
    return F.gelu(x) if backend == "reference" else _gelu(x, backend)


@torch.library.custom_op("bclip::add_norm", mutates_args=())
def _add_norm(
    stream: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    dtype: torch.dtype,
    wide: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(normed in dtype; the sum, or nothing without a branch; normed in the stream's dtype, if wide, or nothing)"""
    return kernels("pointwise", backend).add_norm(stream, branch, weight, bias, eps, dropout_p, seed, dtype, wide)


@_add_norm.register_fake
def _(
    stream: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    dtype: torch.dtype,
    wide: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    normed = stream.new_empty(stream.shape, dtype=dtype)
    return normed, stream.new_empty(_if(branch is not None, stream)), stream.new_empty(_if(wide, stream))


def _if(wanted: bool, like: Tensor) -> torch.Size:
    return like.shape if wanted else torch.Size((0,))


@torch.library.custom_op("bclip::add_norm_backward", mutates_args=())
def _add_norm_backward(
    grad: Tensor | None,
    total_grad: Tensor | None,
    wide_grad: Tensor | None,
    total: Tensor,
    weight: Tensor,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    branch_dtype: torch.dtype | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the stream, of the branch (nothing where it is the stream's, or there is none), weight and bias."""
    return kernels("pointwise", backend).add_norm_backward(
        grad, total_grad, wide_grad, total, weight, eps, dropout_p, seed, branch_dtype
    )


@_add_norm_backward.register_fake
def _(
    grad: Tensor | None,
    total_grad: Tensor | None,
    wide_grad: Tensor | None,
    total: Tensor,
    weight: Tensor,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    branch_dtype: torch.dtype | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    apart = branch_dtype is not None
    branch = total.new_empty(_if(apart, total), dtype=branch_dtype or total.dtype)
    return total.new_empty(total.shape), branch, torch.empty_like(weight), torch.empty_like(weight)


def _add_norm_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    stream, branch, weight, _, ctx.eps, ctx.dropout_p, seed, _, ctx.wide, ctx.backend = inputs
    # An output that nothing uses has no gradient to be read. (Traced code materializes it all the same.)
    ctx.set_materialize_grads(False)
    ctx.has_branch = branch is not None
    # The branch's gradient is the stream's unless dropout or another dtype sets it apart.
    apart = branch is not None and (ctx.dropout_p > 0.0 or branch.dtype != stream.dtype)
    ctx.branch_dtype = branch.dtype if apart else None
    ctx.save_for_backward(stream if branch is None else output[1], weight, seed)


def _add_norm_gradient(ctx, grad, total_grad, wide_grad):  # type: ignore[no-untyped-def]
    total, weight, seed = ctx.saved_tensors
    total_grad, wide_grad = (total_grad if ctx.has_branch else None), (wide_grad if ctx.wide else None)
    stream, branch, weight_grad, bias_grad = _add_norm_backward(
        grad, total_grad, wide_grad, total, weight, ctx.eps, ctx.dropout_p, seed, ctx.branch_dtype, ctx.backend
    )
    if ctx.branch_dtype is None:
        branch = stream if ctx.has_branch else None
    return stream, branch, weight_grad, bias_grad, None, None, None, None, None, None


_add_norm.register_autograd(_add_norm_gradient, setup_context=_add_norm_setup)


@torch.library.custom_op("bclip::gelu", mutates_args=())
def _gelu(x: Tensor, backend: str) -> Tensor:
    return kernels("pointwise", backend).gelu(x)


@_gelu.register_fake
def _(x: Tensor, backend: str) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("bclip::gelu_backward", mutates_args=())
def _gelu_backward(grad: Tensor, x: Tensor, backend: str) -> Tensor:
    return kernels("pointwise", backend).gelu_backward(grad, x)


@_gelu_backward.register_fake
def _(grad: Tensor, x: Tensor, backend: str) -> Tensor:
    return x.new_empty(x.shape)


def _gelu_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, ctx.backend = inputs
    ctx.save_for_backward(x)


def _gelu_gradient(ctx, grad):  # type: ignore[no-untyped-def]
    return _gelu_backward(grad, *ctx.saved_tensors, ctx.backend), None


_gelu.register_autograd(_gelu_gradient, setup_context=_gelu_setup)
