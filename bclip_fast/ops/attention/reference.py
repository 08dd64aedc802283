"""The definition (`attention`), and `forward` and `backward`, the two functions of every backend, as formulas.

Rows t of `qkv` are the tokens of all sequences, one sequence after another. For one sequence and one head with queries
Q, keys K and values V (n, d),
    S = scale * Q @ K.T,
    L = logsumexp(S, keys),  P = exp(S - L),
    O = (P * M) @ V.
S is -inf for an invisible key: a masked one or, if causal, one after the query. A query without visible keys has
L = -inf and a zero row in P. The dropout mask M is 0 or 1/(1 - p), and 1 for p = 0.

The gradients follow from dO. Nothing of size n x n is stored: P is recomputed from L, and M from the seed.

    dV = (P * M).T @ dO,     dP = M * (dO @ V.T),   delta = rowsum(dO * O) = rowsum(P * dP),
    dS = P * (dP - delta),   dQ = scale * dS @ K,   dK = scale * dS.T @ Q.

Dropout is the same in every backend. Let (w_0, w_1, w_2, w_3) be Philox4x32-10 (Salmon et al. 2011, "Parallel random
numbers: as easy as 1, 2, 3") of counter (k // 4, t, h, 0) and key (seed mod 2^32, seed / 2^32 mod 2^32). The weight of
query row t, head h and key k is dropped if and only if w_(k mod 4), as an unsigned number, is below floor(p * 2^32).
t counts over all sequences, modulo 2^32. k counts within its sequence.

Every backend has these two functions. On the CPU, the caller has checked `cu_seqlens`.

    forward(call) -> out (T, H, d) in qkv's dtype, L (H, T) float32 (float64 for float64), both contiguous
    backward(call, grad_out (T, H, d) of any strides, out, L) -> the gradient of qkv (T, 3, H, d), contiguous
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from bclip_fast.ops.dtypes import widened
from bclip_fast.ops.philox import key_of, philox, threshold_of

from .call import AttentionCall


def attention(call: AttentionCall) -> Tensor:
    """(T, H, d): the definition in qkv's dtype. Autograd gives its gradient, so it is an independent oracle."""
    outputs = []
    for rows, shape in batches(call):
        query, key, value = _heads(call.qkv[rows], shape)
        visible = visible_keys(call, rows, shape)
        weights = ((query * call.scale) @ key.transpose(-2, -1)).masked_fill(~visible, float("-inf")).softmax(-1)
        # The softmax of a row without visible keys is 0/0. The definition sets the row and its gradient to zero.
        weights = weights.masked_fill(~visible, 0.0)
        if call.seed is not None:
            weights = weights * dropout_mask(call, rows, shape, weights.dtype)
        outputs.append(_rows(weights @ value))
    return torch.cat(outputs) if outputs else call.qkv[:, 0]


def forward(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """(O, L), computed in float32, or in float64 for float64."""
    qkv, wide = call.qkv, widened(call.qkv)
    out = torch.empty(qkv.shape[0], *qkv.shape[2:], dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty(qkv.shape[2], qkv.shape[0], dtype=wide.dtype, device=qkv.device)
    for rows, shape in batches(call):
        query, key, value = _heads(wide[rows], shape)
        scores = call.scale * query @ key.transpose(-2, -1)
        scores.masked_fill_(~visible_keys(call, rows, shape), float("-inf"))
        row_lse = scores.logsumexp(-1, keepdim=True)
        weights = (scores - row_lse).exp_().masked_fill_(row_lse == float("-inf"), 0.0)
        if call.seed is not None:
            weights *= dropout_mask(call, rows, shape, wide.dtype)
        out[rows] = _rows(weights @ value).to(out.dtype)
        lse[:, rows] = _rows(row_lse)[..., 0].T
    return out, lse


def backward(call: AttentionCall, grad_out: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    """The gradient of `qkv`, computed in float32, or in float64 for float64."""
    qkv, wide, grad_out, out = call.qkv, widened(call.qkv), widened(grad_out), widened(out)
    grad_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    for rows, shape in batches(call):
        query, key, value = _heads(wide[rows], shape)
        out_grad = grad_out[rows].unflatten(0, shape).transpose(1, 2)
        delta = (grad_out[rows] * out[rows]).sum(-1).unflatten(0, shape).transpose(1, 2)[..., None]
        row_lse = lse[:, rows].unflatten(1, shape).transpose(0, 1)[..., None]
        scores = call.scale * query @ key.transpose(-2, -1)
        weights = (scores - row_lse).exp_().masked_fill_(~visible_keys(call, rows, shape), 0.0)
        dropped, weights_grad = weights, out_grad @ value.transpose(-2, -1)
        if call.seed is not None:
            mask = dropout_mask(call, rows, shape, wide.dtype)
            dropped, weights_grad = weights * mask, weights_grad * mask
        scores_grad = weights * (weights_grad - delta)
        grad_qkv[rows, 0] = _rows(call.scale * scores_grad @ key).to(qkv.dtype)
        grad_qkv[rows, 1] = _rows(call.scale * scores_grad.transpose(-2, -1) @ query).to(qkv.dtype)
        grad_qkv[rows, 2] = _rows(dropped.transpose(-2, -1) @ out_grad).to(qkv.dtype)
    return grad_qkv


def dropout_mask(call: AttentionCall, rows: slice, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """(batch, H, N, N) in `dtype`, 0 or 1/(1 - p): M of the `shape` = (batch, N) sequences that own `rows`."""
    batch, tokens = shape
    query = torch.arange(rows.start, rows.stop, device=call.qkv.device).view(batch, tokens)
    assert call.seed is not None
    return dropout_factors(query, call.qkv.shape[2], tokens, dtype, call.dropout_p, call.seed)


def dropout_factors(query: Tensor, heads: int, keys: int, dtype: torch.dtype, dropout_p: float, seed: Tensor) -> Tensor:
    """(batch, H, queries, keys) in `dtype`, 0 or 1/(1 - p), for the query rows (batch, queries)."""
    quads = torch.arange((keys + 3) // 4, device=query.device)
    head = torch.arange(heads, device=query.device).view(1, -1, 1, 1)
    counter = quads, query[:, None, :, None], head, head.new_zeros(())
    word = torch.stack(philox(counter, key_of(seed, query.device)), -1).flatten(-2)[..., :keys]
    return (word >= threshold_of(dropout_p)).to(dtype) / (1 - dropout_p)


def batches(call: AttentionCall) -> Iterator[tuple[slice, tuple[int, int]]]:
    """(rows, (batch, tokens)) of sequences to compute together: all of them, or one non-empty sequence at a time."""
    bounds = [0, len(call.qkv)] if call.cu_seqlens is None else call.cu_seqlens.tolist()
    for start, stop in itertools.pairwise(bounds):
        if stop > start:
            tokens = call.max_seqlen if call.cu_seqlens is None else stop - start
            yield slice(start, stop), ((stop - start) // tokens, tokens)


def visible_keys(call: AttentionCall, rows: slice, shape: tuple[int, int]) -> Tensor:
    """(batch, 1, 1 or N, N) bool, True if the query sees the key."""
    if call.key_mask is None:
        visible = torch.ones(shape, dtype=torch.bool, device=call.qkv.device)
    else:
        visible = call.key_mask[rows].view(shape)
    visible = visible[:, None, None, :]
    return visible & visible.new_ones(shape[1], shape[1]).tril() if call.causal else visible


def _heads(qkv: Tensor, shape: tuple[int, int]) -> tuple[Tensor, ...]:
    """Rows of (T, 3, H, d) -> queries, keys and values, each (batch, H, N, d)."""
    return qkv.unflatten(0, shape).permute(2, 0, 3, 1, 4).unbind(0)


def _rows(heads: Tensor) -> Tensor:
    """(batch, H, N, d) -> (batch * N, H, d)"""
    return heads.transpose(1, 2).flatten(0, 1)
