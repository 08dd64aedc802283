"""Attention on packed projections: softmax(scale * Q K^T + mask) V, dense or over sequences of different lengths."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import Limits, choose
from . import reference

__all__ = ["LIMITS", "fused_attention", "varlen_attention"]

LIMITS: Limits = {"reference": lambda *inputs: None}


def fused_attention(
    qkv: Tensor,
    key_mask: Tensor | None = None,
    *,
    causal: bool = False,
    dropout_p: float = 0.0,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention over sequences of one length, read from the packed projection in place.

    Args:
        qkv: (B, N, 3, H, d), any floating dtype: queries, keys and values of H heads.
        key_mask: (B, N) bool, True where a key may be attended to; a row without any such key yields zeros.
        causal: query i attends to keys 0..i only.
        dropout_p: probability with which an attention weight is dropped, the rest scaled by 1/(1-p).
        scale: factor of the scores, d**-0.5 unless given.
        backend: "auto" or one of `ops.BACKENDS`.

    Returns:
        (B, N, H, d) in the dtype of `qkv`, so that the output projection needs no transpose. Differentiable in `qkv`.

    Raises:
        ValueError: a shape, dtype or probability that doesn't fit; the message names it.
        BackendError: the named backend cannot run this call.
    """
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(f"qkv must be (B, N, 3, H, d), got {tuple(qkv.shape)}")
    _check(qkv, dropout_p)
    if key_mask is not None:
        if key_mask.shape != qkv.shape[:2]:
            raise ValueError(f"key_mask must be (B, N) = {tuple(qkv.shape[:2])}, got {tuple(key_mask.shape)}")
        if key_mask.dtype != torch.bool:
            raise ValueError(f"key_mask must be bool, got {key_mask.dtype}")
    choose("fused_attention", LIMITS, backend, qkv)
    return reference.dense(qkv, key_mask, causal, dropout_p, _scale(scale, qkv))


def varlen_attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    causal: bool = False,
    dropout_p: float = 0.0,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention inside each of n sequences that lie one after another without padding.

    Args:
        qkv: (T, 3, H, d), any floating dtype: the tokens of all sequences.
        cu_seqlens: (n + 1,) int32, rising from 0 to T: sequence i owns rows cu_seqlens[i] to cu_seqlens[i + 1].
        max_seqlen: at least the longest sequence.
        causal, dropout_p, scale, backend: as in `fused_attention`.

    Returns:
        (T, H, d) in the dtype of `qkv`. Differentiable in `qkv`.

    Raises:
        ValueError: a shape, dtype or probability that doesn't fit; the message names it.
        BackendError: the named backend cannot run this call.
    """
    if qkv.dim() != 4 or qkv.shape[1] != 3:
        raise ValueError(f"qkv must be (T, 3, H, d), got {tuple(qkv.shape)}")
    _check(qkv, dropout_p)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens must be (n + 1,), got {tuple(cu_seqlens.shape)}")
    choose("varlen_attention", LIMITS, backend, qkv)
    return reference.varlen(qkv, cu_seqlens, max_seqlen, causal, dropout_p, _scale(scale, qkv))


def _check(qkv: Tensor, dropout_p: float) -> None:
    if not qkv.is_floating_point():
        raise ValueError(f"qkv must be floating point, got {qkv.dtype}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must lie in [0, 1), got {dropout_p}")


def _scale(scale: float | None, qkv: Tensor) -> float:
    return qkv.shape[-1] ** -0.5 if scale is None else scale
