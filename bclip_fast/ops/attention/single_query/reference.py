"""The definition (`attention`): rows of the full operator's output. And the formulas of every backend for one query.

K and V (k, d) are the visible rows of a sequence: all rows, or, if causal, the rows up to the query's row. Then


    s = scale * K @ q,  L = logsumexp(s),  p = exp(s - L),  o = (p * m) @ V,
    dV = outer(p * m, do),  ds = p * (m * (V @ do) - do @ o),  dK = scale * outer(ds, q),  dq = scale * ds @ K.

Every backend has these two functions. On the CPU, the caller has checked `rows` and `cu_seqlens`. Invisible rows have
zero gradients.

    forward(call) -> out (n, H, d) in query's dtype, L (n, H) float32 (float64 for float64), both contiguous
    backward(call, grad_out (n, H, d) of any strides, out, L) -> the gradients of query and key_value, contiguous
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bclip_fast.ops.attention import reference
from bclip_fast.ops.attention.call import AttentionCall, SingleQueryCall
from bclip_fast.ops.dtypes import widened


def attention(call: SingleQueryCall) -> Tensor:
    """(n, H, d): the definition in query's dtype. Autograd gives its gradient, so it is an independent oracle."""
    queries = torch.zeros_like(call.key_value[:, 0]).index_copy(0, call.rows, call.query)
    qkv = torch.cat([queries[:, None], call.key_value], 1)
    longest = int(call.cu_seqlens.diff().max())
    every_query = AttentionCall(qkv, call.cu_seqlens, None, longest, call.causal, call.dropout_p, call.seed, call.scale)
    return reference.attention(every_query)[call.rows]


def forward(call: SingleQueryCall) -> tuple[Tensor, Tensor]:
    """(o, L), computed in float32, or in float64 for float64."""
    query, wide, pairs = call.query, widened(call.query), widened(call.key_value)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:2], dtype=wide.dtype, device=query.device)
    for i, row, visible in _visible_rows(call):
        key, value = pairs[visible].permute(1, 2, 0, 3)
        scores = call.scale * (key @ wide[i, :, :, None])[..., 0]
        lse[i] = scores.logsumexp(-1)
        weights = (scores - lse[i, :, None]).exp()
        if call.seed is not None:
            weights = weights * _mask(call, weights, row)
        out[i] = (weights[:, None] @ value)[:, 0].to(out.dtype)
    return out, lse


def backward(call: SingleQueryCall, grad_out: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `query` and `key_value`, computed in float32, or in float64 for float64."""
    query, key_value = call.query, call.key_value
    wide, pairs = widened(query), widened(key_value)
    out_grad, delta = widened(grad_out), (widened(grad_out) * widened(out)).sum(-1)
    query_grad = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    grad = torch.zeros(key_value.shape, dtype=key_value.dtype, device=query.device)
    for i, row, visible in _visible_rows(call):
        key, value = pairs[visible].permute(1, 2, 0, 3)
        weights = (call.scale * (key @ wide[i, :, :, None])[..., 0] - lse[i, :, None]).exp()
        kept, weights_grad = weights, (value @ out_grad[i, :, :, None])[..., 0]
        if call.seed is not None:
            mask = _mask(call, weights, row)
            kept, weights_grad = kept * mask, weights_grad * mask
        scores_grad = call.scale * weights * (weights_grad - delta[i, :, None])
        query_grad[i] = (scores_grad[:, None] @ key)[:, 0].to(query.dtype)
        grad[visible, 0] = (scores_grad.T[..., None] * wide[i]).to(grad.dtype)
        grad[visible, 1] = (kept.T[..., None] * out_grad[i]).to(grad.dtype)
    return query_grad, grad


def _visible_rows(call: SingleQueryCall) -> Iterator[tuple[int, int, slice]]:
    """(sequence, the query's row, the rows that the query sees)"""
    starts, stops = call.cu_seqlens[:-1].tolist(), call.visible_stops().tolist()
    for i, (row, start, stop) in enumerate(zip(call.rows.tolist(), starts, stops, strict=True)):
        yield i, row, slice(start, stop)


def _mask(call: SingleQueryCall, weights: Tensor, row: int) -> Tensor:
    """M for the weights (H, k) of a row."""
    heads, keys = weights.shape
    assert call.seed is not None
    query = torch.full((1, 1), row, device=weights.device)
    return reference.dropout_factors(query, heads, keys, weights.dtype, call.dropout_p, call.seed)[0, :, 0]
