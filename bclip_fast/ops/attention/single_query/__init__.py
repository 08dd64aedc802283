"""One token of each sequence attends to all its tokens, as in the last layer of a tower with one output token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bclip_fast.ops import custom_op
from bclip_fast.ops.attention import sdpa
from bclip_fast.ops.attention.call import SingleQueryCall
from bclip_fast.ops.attention.checks import check_rows, checked_dropout, cpu_limits
from bclip_fast.ops.cuda_device import triton_refusal
from bclip_fast.ops.dispatch import Limits, choose, is_exporting, load_backend
from bclip_fast.ops.dtypes import accumulation_dtype, widened

from . import reference

__all__ = ["LIMITS", "single_query_attention"]

LIMITS: Limits = {
    "triton": lambda query, dropout_p=0.0, packed=True: triton_refusal(query),
    "cpu": cpu_limits,
    "torch": lambda query, dropout_p=0.0, packed=True: None,
    "reference": lambda query, dropout_p=0.0, packed=True: None,
}


def single_query_attention(
    query: Tensor,
    key_value: Tensor,
    rows: Tensor,
    cu_seqlens: Tensor,
    *,
    causal: bool = False,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """`varlen_attention(...)[rows]`, computed for one query per sequence, with the same dropped weights.

    Args:
        query: (n, H, d), any floating dtype: query i belongs to row rows[i] of the tokens.
        key_value: (T, 2, H, d) in the same dtype: keys and values of the tokens of all sequences.
        rows: (n,) int64, with cu_seqlens[i] <= rows[i] < cu_seqlens[i + 1].
        cu_seqlens: (n + 1,) int32, rising from 0 to T: sequence i owns rows cu_seqlens[i] to cu_seqlens[i + 1].
        causal: whether a query attends only to its own row and earlier rows.
        dropout_p, seed, scale, backend: as in `fused_attention`.

    Returns:
        (n, H, d) in the dtype of `query`. Derivatives: `ops.derivatives`.

    Raises:
        ValueError: a shape, dtype or probability is wrong. The message names it. The values of cu_seqlens and rows are
            checked only on the CPU, because reading them on a GPU would wait for the device.
        BackendError: as in `fused_attention`.
    """
    if query.dim() != 3 or key_value.dim() != 4 or key_value.shape[1:] != (2, *query.shape[1:]):
        shapes = tuple(query.shape), tuple(key_value.shape)
        raise ValueError(f"query must be (n, H, d) and key_value (T, 2, H, d), got {shapes[0]} and {shapes[1]}")
    if key_value.dtype != query.dtype:
        raise ValueError(f"query is {query.dtype}, key_value {key_value.dtype}; they must be the same")
    for name, index, length, dtype in (
        ("rows", rows, query.shape[0], torch.int64),
        ("cu_seqlens", cu_seqlens, query.shape[0] + 1, torch.int32),
    ):
        if index.shape != (length,) or index.dtype != dtype or index.device != query.device:
            raise ValueError(
                f"{name} must be ({length},), {dtype} on {query.device}, got {tuple(index.shape)}, {index.dtype} on "
                f"{index.device}"
            )
    if is_exporting(backend) and dropout_p == 0.0:
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return sdpa.single_query_masked(SingleQueryCall(query, key_value, rows, cu_seqlens, causal, 0.0, None, scale))
    seed, scale = checked_dropout("query", query, dropout_p, seed, scale)
    # Tuning records, `bclip tune --operators` and saved graphs know the operator by its first name.
    backend = choose("pooled_attention", LIMITS, backend, query, dropout_p, True)
    flat = query, key_value, rows, cu_seqlens, causal, dropout_p, seed, scale
    return _attention(*flat, backend)[0]


@custom_op.without_autocast
def _forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    """(out, log-sum-exps) as in `reference.forward`."""
    call = SingleQueryCall(*inputs[:-1])
    if call.rows.device.type == "cpu":
        check_rows(call.rows, call.cu_seqlens, len(call.key_value))
    return load_backend("attention.single_query", inputs[-1]).forward(call)


def _forward_fake(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(query.shape[:2], dtype=accumulation_dtype(query))


@custom_op.without_autocast
def _backward(grad_out: Tensor, out: Tensor, lse: Tensor, *inputs: Any) -> tuple[Tensor, Tensor]:
    """The gradients of `query` and `key_value`."""
    backend = load_backend("attention.single_query", inputs[-1])
    return backend.backward(SingleQueryCall(*inputs[:-1]), grad_out, out, lse)


def _backward_fake(
    grad_out: Tensor, out: Tensor, lse: Tensor, query: Tensor, key_value: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    # Contiguous for any layout of the inputs, because the kernels allocate them.
    return query.new_empty(query.shape), key_value.new_empty(key_value.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key_value, rows, cu_seqlens, ctx.causal, ctx.dropout_p, seed, ctx.scale, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*output, query, key_value, rows, cu_seqlens, seed)


def _definition(query: Tensor, key_value: Tensor, *inputs: Any) -> Tensor:
    call = SingleQueryCall(widened(query), widened(key_value), *inputs[:-1])
    return reference.attention(call).to(query.dtype)


def _arguments_of(ctx: Any) -> tuple[Any, ...]:
    return _saved(ctx)[2:]


def _saved(ctx: Any) -> tuple[Any, ...]:
    """The results and the arguments."""
    *tensors, seed = ctx.saved_tensors
    return *tensors, ctx.causal, ctx.dropout_p, seed, ctx.scale, ctx.backend


def _gradient(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    return *_attention_backward(grad, *_saved(ctx)), *[None] * 7


_ARGUMENTS = f"{custom_op.arguments(SingleQueryCall)}, str backend"
_attention = custom_op.define(
    "pooled_attention",
    f"({_ARGUMENTS}) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    setup=_setup,
    gradient=_gradient,
    definition=_definition,
    arguments_of=_arguments_of,
)
_attention_backward = custom_op.define(
    "pooled_attention_backward",
    f"(Tensor grad_out, Tensor out, Tensor lse, {_ARGUMENTS}) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)
