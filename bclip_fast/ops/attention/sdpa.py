"""torch's own scaled_dot_product_attention on our layouts, as the backend "torch".

It has no dropout, since which weights are dropped is defined (reference.py) and torch draws its own. Unlike the other
backends it is ordinary torch code: its gradient is autograd's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cuda_device import without_autocast


def refusal(operand: Tensor, dropout_p: float = 0.0, packed: bool = False) -> str | None:
    """The reason against it, for an operand (..., d)."""
    if dropout_p > 0.0:
        return "torch's dropout doesn't drop the weights that `seed` names"
    if packed and operand.device.type == "cpu" and torch.compiler.is_compiling():
        return "it takes sequences one by one, whose lengths a graph cannot hold"
    return None


@without_autocast
def dense(qkv: Tensor, key_mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """(B, N, H, d) of qkv (B, N, 3, H, d); key_mask (B, N) bool or None. A row without keys gives zeros."""
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    if key_mask is None:
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scale).transpose(1, 2)
    visible = key_mask[:, None, None, :]
    if causal:
        visible = visible & visible.new_ones(qkv.shape[1], qkv.shape[1]).tril()
    return _masked(query, key, value, visible, scale).transpose(1, 2)


@without_autocast
def packed(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool, scale: float) -> Tensor:
    """(T, H, d) of qkv (T, 3, H, d): sequence by sequence on the CPU, elsewhere padded, which waits for no device."""
    if qkv.device.type == "cpu":
        return packed_one_by_one(qkv, cu_seqlens, causal, scale)
    return packed_padded(qkv, cu_seqlens, max_seqlen, causal, scale)


def packed_one_by_one(qkv: Tensor, cu_seqlens: Tensor, causal: bool, scale: float) -> Tensor:
    bounds = cu_seqlens.tolist()
    pairs = zip(bounds, bounds[1:], strict=False)
    parts = [dense(qkv[None, start:stop], None, causal, scale)[0] for start, stop in pairs if stop > start]
    return torch.cat(parts) if parts else qkv[:, 0].clone()


def packed_padded(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool, scale: float) -> Tensor:
    if len(qkv) == 0:
        return qkv[:, 0].clone()
    starts, stops = cu_seqlens[:-1, None], cu_seqlens[1:, None]
    rows = starts + torch.arange(max_seqlen, device=qkv.device)
    visible = (rows < stops)[:, None, None, :]
    if causal:
        visible = visible & visible.new_ones(max_seqlen, max_seqlen).tril()
    query, key, value = qkv[rows.clamp(max=len(qkv) - 1)].permute(2, 0, 3, 1, 4).unbind(0)
    out = _masked(query, key, value, visible, scale).transpose(1, 2)
    tokens = torch.arange(len(qkv), device=qkv.device, dtype=cu_seqlens.dtype)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), tokens, right=True)
    return out[sequence, tokens - cu_seqlens[sequence]]


@without_autocast
def pooled(query: Tensor, key_value: Tensor, rows: Tensor, cu_seqlens: Tensor, causal: bool, scale: float) -> Tensor:
    """(n, H, d) of query (n, H, d) and key_value (T, 2, H, d); sequence by sequence on the CPU alone, as `packed`."""
    stops = rows + 1 if causal else cu_seqlens[1:].long()
    if query.device.type == "cpu":
        return pooled_one_by_one(query, key_value, cu_seqlens[:-1], stops, scale)
    return pooled_masked(query, key_value, cu_seqlens[:-1], stops, scale)


def pooled_one_by_one(query: Tensor, key_value: Tensor, starts: Tensor, stops: Tensor, scale: float) -> Tensor:
    parts = []
    for one, start, stop in zip(query, starts.tolist(), stops.tolist(), strict=True):
        key, value = key_value[None, start:stop].permute(2, 0, 3, 1, 4).unbind(0)
        parts.append(F.scaled_dot_product_attention(one[None, :, None], key, value, scale=scale)[0, :, 0])
    return torch.stack(parts) if parts else query.clone()


def pooled_masked(query: Tensor, key_value: Tensor, starts: Tensor, stops: Tensor, scale: float) -> Tensor:
    # The longest sequence isn't known without waiting for the device: a query meets all rows, most of them masked.
    row = torch.arange(len(key_value), device=query.device)
    visible = (row >= starts[:, None]) & (row < stops[:, None])
    key, value = key_value[None].permute(2, 0, 3, 1, 4).unbind(0)
    return _masked(query.transpose(0, 1)[None], key, value, visible, scale)[0].transpose(0, 1)


def _masked(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scale: float) -> Tensor:
    # torch's releases differ in what a row without keys gives: here it sees all, and is then defined as zero.
    empty = ~visible.any(-1, keepdim=True)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=visible | empty, scale=scale)
    return out.masked_fill(empty, 0.0)
