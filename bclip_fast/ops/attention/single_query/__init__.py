"""One token of each sequence attends to all of it: the last layer of a tower that gives one vector a sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from ...cuda_device import triton_refusal, without_autocast
from ...dispatch import Limits, choose, kernels
from ...dtypes import accumulation_dtype
from .. import sdpa
from ..checks import checked_dropout, cpu_limits

__all__ = ["LIMITS", "pooled_attention"]


LIMITS: Limits = {
    "triton": lambda query, dropout_p=0.0, packed=True: triton_refusal(query),
    "cpu": cpu_limits,
    "torch": sdpa.refusal,
    "reference": lambda query, dropout_p=0.0, packed=True: None,
}


def pooled_attention(
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
    """`varlen_attention` for one query of each sequence, which is all that is computed: `out[rows]`, bit for bit the
    same weights dropped.

    Args:
        query: (n, H, d), any floating dtype: of row rows[i] of the tokens.
        key_value: (T, 2, H, d) in the same dtype: keys and values of the tokens of all sequences.
        rows: (n,) int64, sequence i's own row, cu_seqlens[i] <= rows[i] < cu_seqlens[i + 1].
        cu_seqlens: (n + 1,) int32, rising from 0 to T: sequence i owns rows cu_seqlens[i] to cu_seqlens[i + 1].
        causal: the query attends to its own row and those before.
        dropout_p, seed, scale, backend: as in `fused_attention`.

    Returns:
        (n, H, d) in the dtype of `query`. Differentiable once.

    Raises:
        ValueError: a shape, dtype or probability that doesn't fit; the message names it. What cu_seqlens and rows hold
            is looked at on the CPU alone: on a GPU that would wait for the device.
        BackendError: the named backend cannot run this call.
    """
    if query.dim() != 3 or key_value.dim() != 4 or key_value.shape[1:] != (2, *query.shape[1:]):
        shapes = tuple(query.shape), tuple(key_value.shape)
        raise ValueError(f"query must be (n, H, d) and key_value (T, 2, H, d), got {shapes[0]} and {shapes[1]}")
    if key_value.dtype != query.dtype:
        raise ValueError(f"query is {query.dtype}, key_value {key_value.dtype}; they must be the same")
    for name, index, length, dtype in (
        ("rows", rows, len(query), torch.int64),
        ("cu_seqlens", cu_seqlens, len(query) + 1, torch.int32),
    ):
        if index.shape != (length,) or index.dtype != dtype or index.device != query.device:
            raise ValueError(
                f"{name} must be ({length},), {dtype} on {query.device}, got {tuple(index.shape)}, {index.dtype} on "
                f"{index.device}"
            )
    seed, scale = checked_dropout("query", query, dropout_p, seed, scale)
    backend = choose("pooled_attention", LIMITS, backend, query, dropout_p, True)
    if backend == "torch":
        if rows.device.type == "cpu":
            _check_rows(rows, cu_seqlens, len(key_value))
        return sdpa.pooled(query, key_value, rows, cu_seqlens, causal, scale)
    return _pooled(query, key_value, rows, cu_seqlens, causal, dropout_p, seed, scale, backend)[0]


def _check_rows(rows: Tensor, cu_seqlens: Tensor, tokens: int) -> None:
    starts, stops = cu_seqlens[:-1], cu_seqlens[1:]
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != tokens:
        raise ValueError(f"cu_seqlens must rise from 0 to T = {tokens}, got {int(cu_seqlens[0])} to {cu_seqlens[-1]}")
    outside = ((rows < starts) | (rows >= stops)).nonzero()
    if len(outside):
        i = int(outside[0])
        raise ValueError(f"rows[{i}] is {rows[i]}, but sequence {i} owns rows {starts[i]} to {stops[i]}")


@torch.library.custom_op("bclip::pooled_attention", mutates_args=())
@without_autocast
def _pooled(
    query: Tensor,
    key_value: Tensor,
    rows: Tensor,
    cu_seqlens: Tensor,
    causal: bool,
    dropout_p: float,
    seed: Tensor | None,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(out, log-sum-exps) as in `reference.forward`."""
    if rows.device.type == "cpu":
        _check_rows(rows, cu_seqlens, len(key_value))
    options = causal, dropout_p, seed, scale
    return kernels("attention.single_query", backend).forward(query, key_value, rows, cu_seqlens, *options)


@_pooled.register_fake
def _(
    query: Tensor,
    key_value: Tensor,
    rows: Tensor,
    cu_seqlens: Tensor,
    causal: bool,
    dropout_p: float,
    seed: Tensor | None,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    exact = accumulation_dtype(query)
    return query.new_empty(query.shape), query.new_empty(query.shape[:2], dtype=exact)


@torch.library.custom_op("bclip::pooled_attention_backward", mutates_args=())
@without_autocast
def _pooled_backward(
    grad_out: Tensor,
    query: Tensor,
    key_value: Tensor,
    out: Tensor,
    lse: Tensor,
    rows: Tensor,
    cu_seqlens: Tensor,
    causal: bool,
    dropout_p: float,
    seed: Tensor | None,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The gradients of `query` and `key_value`."""
    options = causal, dropout_p, seed, scale
    run = kernels("attention.single_query", backend).backward
    return run(grad_out, query, key_value, out, lse, rows, cu_seqlens, *options)


@_pooled_backward.register_fake
def _(
    grad_out: Tensor,
    query: Tensor,
    key_value: Tensor,
    out: Tensor,
    lse: Tensor,
    rows: Tensor,
    cu_seqlens: Tensor,
    causal: bool,
    dropout_p: float,
    seed: Tensor | None,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    # Contiguous whatever the inputs' layout, as the kernels allocate them.
    return query.new_empty(query.shape), key_value.new_empty(key_value.shape)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    query, key_value, rows, cu_seqlens, ctx.causal, ctx.dropout_p, seed, ctx.scale, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(query, key_value, *output, rows, cu_seqlens, seed)


def _gradient(ctx, grad, _):  # type: ignore[no-untyped-def]
    *tensors, seed = ctx.saved_tensors
    return *_pooled_backward(grad, *tensors, ctx.causal, ctx.dropout_p, seed, ctx.scale, ctx.backend), *[None] * 7


_pooled.register_autograd(_gradient, setup_context=_setup)
