"""The operator's registration with torch: its schema, fake and gradient."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bclip_fast.ops import custom_op
from bclip_fast.ops.dispatch import load_backend
from bclip_fast.ops.dtypes import accumulation_dtype, widened

from . import reference
from .call import AttentionCall
from .checks import check_sequences


@custom_op.without_autocast
def _forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    """(out, log-sum-exps) as in `reference.forward`."""
    call = AttentionCall(*inputs[:-1])
    if call.cu_seqlens is not None and call.cu_seqlens.device.type == "cpu":
        check_sequences(call.cu_seqlens, call.qkv.shape[0], call.max_seqlen)
    return load_backend("attention", inputs[-1]).forward(call)


def _forward_fake(qkv: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    rows, heads, dim = qkv.shape[0], *qkv.shape[2:]
    return qkv.new_empty(rows, heads, dim), qkv.new_empty(heads, rows, dtype=accumulation_dtype(qkv))


@custom_op.without_autocast
def _backward(grad_out: Tensor, out: Tensor, lse: Tensor, *inputs: Any) -> Tensor:
    """The gradient of `qkv`."""
    return load_backend("attention", inputs[-1]).backward(AttentionCall(*inputs[:-1]), grad_out, out, lse)


def _backward_fake(grad_out: Tensor, out: Tensor, lse: Tensor, qkv: Tensor, *_: Any) -> Tensor:
    # Contiguous for any layout of the input, because the kernels allocate it.
    return qkv.new_empty(qkv.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, cu_seqlens, key_mask, ctx.max_seqlen, ctx.causal, ctx.dropout_p, seed, ctx.scale, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*output, qkv, cu_seqlens, key_mask, seed)


def _definition(qkv: Tensor, *inputs: Any) -> Tensor:
    return reference.attention(AttentionCall(widened(qkv), *inputs[:-1])).to(qkv.dtype)


def _arguments_of(ctx: Any) -> tuple[Any, ...]:
    return _saved(ctx)[2:]


def _saved(ctx: Any) -> tuple[Any, ...]:
    """The results and the arguments."""
    *tensors, seed = ctx.saved_tensors
    return *tensors, ctx.max_seqlen, ctx.causal, ctx.dropout_p, seed, ctx.scale, ctx.backend


def _gradient(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    return attention_backward(grad, *_saved(ctx)), *[None] * 8


_ARGUMENTS = f"{custom_op.arguments(AttentionCall)}, str backend"
attention = custom_op.define(
    "attention",
    f"({_ARGUMENTS}) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    setup=_setup,
    gradient=_gradient,
    definition=_definition,
    arguments_of=_arguments_of,
)
attention_backward = custom_op.define(
    "attention_backward",
    f"(Tensor grad_out, Tensor out, Tensor lse, {_ARGUMENTS}) -> Tensor",
    _backward,
    _backward_fake,
)
