"""The definition, in plain PyTorch; its gradient comes from autograd and so is an independent oracle."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def dense(qkv: Tensor, key_mask: Tensor | None, causal: bool, dropout_p: float, scale: float) -> Tensor:
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, H, N, d)
    scores = (query * scale) @ key.transpose(-2, -1)
    visible = _visible(key_mask, causal, scores)
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    weights = scores.softmax(-1)
    if visible is not None:
        # A row with nothing to attend to is 0/0; it is defined as zero, and its gradient too.
        weights = weights.masked_fill(~visible, 0.0)
    weights = F.dropout(weights, dropout_p)
    return (weights @ value).transpose(1, 2)


def varlen(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool, dropout_p: float, scale: float) -> Tensor:
    bounds = cu_seqlens.tolist()
    lengths = [stop - start for start, stop in zip(bounds, bounds[1:], strict=False)]
    if bounds[0] != 0 or bounds[-1] != qkv.shape[0] or any(length < 0 for length in lengths):
        raise ValueError(f"cu_seqlens must rise from 0 to T = {qkv.shape[0]}, got {bounds[:4]} ... {bounds[-1]}")
    if lengths and max(lengths) > max_seqlen:
        raise ValueError(f"max_seqlen is {max_seqlen}, but a sequence has {max(lengths)} tokens")
    outputs = [
        dense(sequence[None], None, causal, dropout_p, scale)[0] for sequence in qkv.split(lengths) if len(sequence)
    ]
    return torch.cat(outputs) if outputs else qkv[:, 0]


def _visible(key_mask: Tensor | None, causal: bool, scores: Tensor) -> Tensor | None:
    """(B or 1, 1, N or 1, N) bool, True where the query sees the key; None where every query sees every key."""
    visible = None if key_mask is None else key_mask[:, None, None, :]
    if causal:
        past = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        visible = past[None, None] if visible is None else visible & past
    return visible
