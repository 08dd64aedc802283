"""The definition (`attention`): rows of the whole operator's. And `forward` and `backward`, its formulas for one query.

For each sequence, whose visible rows are all, or if causal those up to its own, with keys and values K, V (k, d):
    s = scale * K @ q,  L = logsumexp(s),  p = exp(s - L),  o = (p * m) @ V,
    dV = outer(p * m, do),  ds = p * (m * (V @ do) - do @ o),  dK = scale * outer(ds, q),  dq = scale * ds @ K.

A backend's functions take by position
    query (n, H, d), key_value (T, 2, H, d), of any strides; rows (n,) int64, cu_seqlens (n + 1,) int32, checked where
    they are on the CPU; causal, dropout_p, seed () int64 or None iff p = 0, scale
and return
    forward -> out (n, H, d) in query's dtype, L (n, H) float32 (float64 for float64), both contiguous;
    backward(grad_out (n, H, d) of any strides, query, key_value, out, L, *the rest as above) -> the gradients of query
    and key_value, contiguous; those of a row that isn't visible are zero.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import reference


def attention(
    query: Tensor,
    key_value: Tensor,
    rows: Tensor,
    cu_seqlens: Tensor,
    causal: bool,
    dropout_p: float,
    seed: Tensor | None,
    scale: float,
) -> Tensor:
    """(n, H, d): the definition in query's dtype; its gradient comes from autograd and so is an independent oracle."""
    queries = torch.zeros_like(key_value[:, 0]).index_copy(0, rows, query)
    qkv = torch.cat([queries[:, None], key_value], 1)
    options = None, int(cu_seqlens.diff().max()), causal, dropout_p, seed, scale
    return reference.attention(qkv, cu_seqlens, *options)[rows]


def forward(
    query: Tensor,
    key_value: Tensor,
    rows: Tensor,
    cu_seqlens: Tensor,
    causal: bool,
    dropout_p: float,
    seed: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(o, L), computed in float32, or float64 for float64."""
    wide, pairs = reference.exact(query), reference.exact(key_value)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:2], dtype=wide.dtype, device=query.device)
    for i, row, seen in _visible(rows, cu_seqlens, causal):
        key, value = pairs[seen].permute(1, 2, 0, 3)
        scores = scale * (key @ wide[i, :, :, None])[..., 0]
        lse[i] = scores.logsumexp(-1)
        weights = (scores - lse[i, :, None]).exp()
        if seed is not None:
            weights = weights * _mask(weights, row, dropout_p, seed)
        out[i] = (weights[:, None] @ value)[:, 0].to(out.dtype)
    return out, lse


def backward(
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
) -> tuple[Tensor, Tensor]:
    """The gradients of `query` and `key_value`, computed in float32, or float64 for float64."""
    wide, pairs = reference.exact(query), reference.exact(key_value)
    out_grad, delta = reference.exact(grad_out), (reference.exact(grad_out) * reference.exact(out)).sum(-1)
    query_grad = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    grad = torch.zeros(key_value.shape, dtype=key_value.dtype, device=query.device)
    for i, row, seen in _visible(rows, cu_seqlens, causal):
        key, value = pairs[seen].permute(1, 2, 0, 3)
        weights = (scale * (key @ wide[i, :, :, None])[..., 0] - lse[i, :, None]).exp()
        kept, weights_grad = weights, (value @ out_grad[i, :, :, None])[..., 0]
        if seed is not None:
            mask = _mask(weights, row, dropout_p, seed)
            kept, weights_grad = kept * mask, weights_grad * mask
        scores_grad = scale * weights * (weights_grad - delta[i, :, None])
        query_grad[i] = (scores_grad[:, None] @ key)[:, 0].to(query.dtype)
        grad[seen, 0] = (scores_grad.T[..., None] * wide[i]).to(grad.dtype)
        grad[seen, 1] = (kept.T[..., None] * out_grad[i]).to(grad.dtype)
    return query_grad, grad


def _visible(rows: Tensor, cu_seqlens: Tensor, causal: bool) -> Iterator[tuple[int, int, slice]]:
    """(sequence, its own row, the rows that this one sees)"""
    starts = cu_seqlens[:-1].tolist()
    stops = (rows + 1 if causal else cu_seqlens[1:]).tolist()
    for i, (row, start, stop) in enumerate(zip(rows.tolist(), starts, stops, strict=True)):
        yield i, row, slice(start, stop)


def _mask(weights: Tensor, row: int, dropout_p: float, seed: Tensor) -> Tensor:
    """M for the weights (H, k) of a row."""
    heads, keys = weights.shape
    return reference.dropout_factors(
        torch.tensor([row], device=weights.device)[:, None], heads, keys, weights, dropout_p, seed
    )[0, :, 0]
