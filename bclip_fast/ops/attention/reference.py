"""The definition (`attention`), and what every backend offers: `forward` and `backward`, here by formula.

Rows t of `qkv` are the tokens of all sequences, one after another. Of one sequence and one head, with queries Q, keys K
and values V (n, d),
    S = scale * Q @ K.T, -inf where a key is masked or, if causal, comes after the query;
    L = logsumexp(S, keys),  P = exp(S - L), zero in a row with nothing to attend to, where L = -inf;
    O = (P * M) @ V,         M the dropout mask, 0 or 1/(1 - p), all ones for p = 0.
And back from dO, storing nothing of size n x n but recomputing P from L and M from the seed:
    dV = (P * M).T @ dO,     dP = M * (dO @ V.T),   delta = rowsum(dO * O) = rowsum(P * dP),
    dS = P * (dP - delta),   dQ = scale * dS @ K,   dK = scale * dS.T @ Q.

Dropout is the same in every backend. With (w_0, w_1, w_2, w_3) = Philox4x32-10 (Salmon et al. 2011, "Parallel random
numbers: as easy as 1, 2, 3") of counter (k // 4, t, h, 0) and key (seed mod 2^32, seed / 2^32 mod 2^32), the weight of
query row t (counted over all sequences, modulo 2^32), head h and key k (counted within its sequence) is dropped if and
only if w_(k mod 4), as an unsigned number, is below floor(p * 2^32).

A backend's functions take these arguments by position:
    qkv         (T, 3, H, d), any strides.
    cu_seqlens  (n + 1,) int32, sequence i owns rows cu_seqlens[i] to cu_seqlens[i + 1] and may be empty; on the CPU it
                has been checked. None where every sequence has max_seqlen tokens.
    key_mask    (T,) bool, True where the row's key may be attended to, or None. Only without cu_seqlens.
    max_seqlen  no sequence is longer.
    causal, dropout_p, scale
    seed        () int64 on any device (drawn by us it is on the CPU, so reading it waits for nothing); None iff p = 0.
and return
    forward -> out (T, H, d) in qkv's dtype, L (H, T) float32 (float64 for float64), both contiguous;
    backward(grad_out (T, H, d) of any strides, qkv, out, L, *the rest as above) -> (T, 3, H, d), contiguous.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..philox import philox


def attention(
    qkv: Tensor,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
    max_seqlen: int,
    causal: bool,
    dropout_p: float,
    seed: Tensor | None,
    scale: float,
) -> Tensor:
    """(T, H, d): the definition in qkv's dtype; its gradient comes from autograd and so is an independent oracle."""
    outputs = []
    for rows, shape in _batches(len(qkv), cu_seqlens, max_seqlen):
        query, key, value = _heads(qkv[rows], shape)
        visible = _visible(key_mask, rows, shape, causal, qkv.device)
        weights = ((query * scale) @ key.transpose(-2, -1)).masked_fill(~visible, float("-inf")).softmax(-1)
        # A row with nothing to attend to is 0/0; it is defined as zero, and its gradient too.
        weights = weights.masked_fill(~visible, 0.0)
        if seed is not None:
            weights = weights * dropout_mask(rows, shape, qkv, dropout_p, seed)
        outputs.append(_rows(weights @ value))
    return torch.cat(outputs) if outputs else qkv[:, 0]


def forward(
    qkv: Tensor,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
    max_seqlen: int,
    causal: bool,
    dropout_p: float,
    seed: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(O, L), computed in float32, or float64 for float64."""
    wide = exact(qkv)
    out = torch.empty(qkv.shape[0], *qkv.shape[2:], dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty(qkv.shape[2], qkv.shape[0], dtype=wide.dtype, device=qkv.device)
    for rows, shape in _batches(len(qkv), cu_seqlens, max_seqlen):
        query, key, value = _heads(wide[rows], shape)
        scores = scale * query @ key.transpose(-2, -1)
        scores.masked_fill_(~_visible(key_mask, rows, shape, causal, qkv.device), float("-inf"))
        row_lse = scores.logsumexp(-1, keepdim=True)
        weights = (scores - row_lse).exp_().masked_fill_(row_lse == float("-inf"), 0.0)
        if seed is not None:
            weights *= dropout_mask(rows, shape, wide, dropout_p, seed)
        out[rows] = _rows(weights @ value).to(out.dtype)
        lse[:, rows] = _rows(row_lse)[..., 0].T
    return out, lse


def backward(
    grad_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
    max_seqlen: int,
    causal: bool,
    dropout_p: float,
    seed: Tensor | None,
    scale: float,
) -> Tensor:
    """The gradient of `qkv`, computed in float32, or float64 for float64."""
    wide, grad_out, out = exact(qkv), exact(grad_out), exact(out)
    grad_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    for rows, shape in _batches(len(qkv), cu_seqlens, max_seqlen):
        query, key, value = _heads(wide[rows], shape)
        out_grad = grad_out[rows].unflatten(0, shape).transpose(1, 2)
        delta = (grad_out[rows] * out[rows]).sum(-1).unflatten(0, shape).transpose(1, 2)[..., None]
        row_lse = lse[:, rows].unflatten(1, shape).transpose(0, 1)[..., None]
        visible = _visible(key_mask, rows, shape, causal, qkv.device)
        scores = scale * query @ key.transpose(-2, -1)
        weights = (scores - row_lse).exp_().masked_fill_(~visible, 0.0)
        dropped, weights_grad = weights, out_grad @ value.transpose(-2, -1)
        if seed is not None:
            mask = dropout_mask(rows, shape, wide, dropout_p, seed)
            dropped, weights_grad = weights * mask, weights_grad * mask
        scores_grad = weights * (weights_grad - delta)
        grad_qkv[rows, 0] = _rows(scale * scores_grad @ key).to(qkv.dtype)
        grad_qkv[rows, 1] = _rows(scale * scores_grad.transpose(-2, -1) @ query).to(qkv.dtype)
        grad_qkv[rows, 2] = _rows(dropped.transpose(-2, -1) @ out_grad).to(qkv.dtype)
    return grad_qkv


def dropout_mask(rows: slice, shape: tuple[int, int], qkv: Tensor, dropout_p: float, seed: Tensor) -> Tensor:
    """(batch, H, N, N) in the dtype of `qkv`, 0 or 1/(1 - p): M of `shape` = (batch, N) sequences that own `rows`."""
    batch, tokens = shape
    query = torch.arange(rows.start, rows.stop, device=qkv.device).view(batch, tokens)
    return dropout_factors(query, qkv.shape[2], tokens, qkv, dropout_p, seed)


def dropout_factors(query: Tensor, heads: int, keys: int, like: Tensor, dropout_p: float, seed: Tensor) -> Tensor:
    """(batch, H, queries, keys) in the dtype of `like`, 0 or 1/(1 - p), for the query rows (batch, queries)."""
    key = int(seed)
    quads = torch.arange((keys + 3) // 4, device=query.device)
    head = torch.arange(heads, device=query.device).view(1, -1, 1, 1)
    counter = quads, query[:, None, :, None], head, head.new_zeros(())
    words = philox(counter, (key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF))
    word = torch.stack(words, -1).flatten(-2)[..., :keys]
    return (word >= int(dropout_p * 2**32)).to(like.dtype) / (1 - dropout_p)


def _batches(total: int, cu_seqlens: Tensor | None, max_seqlen: int) -> Iterator[tuple[slice, tuple[int, int]]]:
    """(rows, (batch, tokens)) of what can be computed at once: all, or each sequence that isn't empty."""
    bounds = [0, total] if cu_seqlens is None else cu_seqlens.tolist()
    for start, stop in zip(bounds, bounds[1:], strict=False):
        if stop > start:
            tokens = max_seqlen if cu_seqlens is None else stop - start
            yield slice(start, stop), ((stop - start) // tokens, tokens)


def _heads(qkv: Tensor, shape: tuple[int, int]) -> tuple[Tensor, ...]:
    """Rows of (T, 3, H, d) -> queries, keys and values, each (batch, H, N, d)."""
    return qkv.unflatten(0, shape).permute(2, 0, 3, 1, 4).unbind(0)


def _rows(heads: Tensor) -> Tensor:
    """(batch, H, N, d) -> (batch * N, H, d)"""
    return heads.transpose(1, 2).flatten(0, 1)


def exact(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _visible(
    key_mask: Tensor | None, rows: slice, shape: tuple[int, int], causal: bool, device: torch.device
) -> Tensor:
    """(batch, 1, 1 or N, N) bool, True where the query sees the key."""
    visible = torch.ones(shape, dtype=torch.bool, device=device) if key_mask is None else key_mask[rows].view(shape)
    visible = visible[:, None, None, :]
    return visible & visible.new_ones(shape[1], shape[1]).tril() if causal else visible
