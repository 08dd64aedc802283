"""Attention on packed projections: softmax(scale * Q K^T + mask) V, dense or over sequences of different lengths."""

from __future__ import annotations

import torch
from torch import Tensor

from bclip_fast.ops.cuda_device import cuda_refusal, triton_block_bytes, triton_refusal
from bclip_fast.ops.derivatives import check_first_only
from bclip_fast.ops.dispatch import Limits, choose, is_exporting

from . import op, sdpa, sdpa_kernels, triton_memory
from .call import AttentionCall
from .checks import check_sequences, checked_dropout, cpu_limits
from .single_query import single_query_attention

__all__ = ["LIMITS", "fused_attention", "single_query_attention", "varlen_attention"]


# A limit takes qkv, the dropout probability, whether sequences are packed, whether there is a key mask, and the longest
# length. All but qkv are optional.


def _triton_limits(qkv: Tensor, *_: object) -> str | None:
    if qkv.shape[-1] not in (32, 64, 80, 96, 128):
        return f"d={qkv.shape[-1]} is not 32, 64, 80, 96 or 128"
    return triton_refusal(qkv) or triton_memory.refusal(qkv.shape[-1], triton_block_bytes(qkv))


# Shared memory, in bytes, that a thread block needs for each head dimension: the larger of both passes.
CUDA_BLOCK_BYTES = {32: 75264, 64: 74752, 96: 132608, 128: 115712}


def _cuda_limits(qkv: Tensor, *_: object) -> str | None:
    if qkv.shape[-1] not in CUDA_BLOCK_BYTES:
        return f"d={qkv.shape[-1]} is not 32, 64, 96 or 128"
    return cuda_refusal(qkv, block_bytes=CUDA_BLOCK_BYTES[qkv.shape[-1]])


LIMITS: Limits = {
    "triton": _triton_limits,
    "cuda": _cuda_limits,
    "cpu": cpu_limits,
    "torch": sdpa.refusal,
    **sdpa_kernels.LIMITS,
    "reference": lambda qkv, *_: None,
}


def _class_of(dim: int, tokens: int) -> str:
    """The class of shapes in the key of a tuning record."""
    if dim <= 64:
        return "d <= 64, N <= 512" if tokens <= 512 else "d <= 64, N > 512"
    return "d > 64, N <= 512" if tokens <= 512 else "d > 64, N > 512"


def fused_attention(
    qkv: Tensor,
    key_mask: Tensor | None = None,
    *,
    causal: bool = False,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention over sequences of one length, read in place from the packed projection.

    Args:
        qkv: (B, N, 3, H, d), any floating dtype: queries, keys and values of H heads.
        key_mask: (B, N) bool, True for a visible key. A sequence without visible keys yields zeros.
        causal: whether query i attends only to keys 0 to i.
        dropout_p: probability of dropping an attention weight. The other weights are scaled by 1/(1-p).
        seed: seed of the dropout, an int or a 0-dimensional int64 tensor. All backends drop the same weights. By
            default it is drawn from torch's CPU generator, so `torch.manual_seed` fixes it and activation checkpointing
            repeats it. A CUDA graph can only capture a seed on the GPU, where the kernels read it at each replay.
        scale: factor of the scores. d**-0.5 by default.
        backend: "auto" or one of `ops.BACKENDS`.

    Returns:
        (B, N, H, d) in the dtype of `qkv`, so the output projection needs no transpose. Derivatives: `ops.derivatives`.

    Raises:
        ValueError: a shape, dtype or probability is wrong. The message names it.
        BackendError: the named backend cannot run this call, or a CUDA graph captures a seed on the CPU.
    """
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(f"qkv must be (B, N, 3, H, d), got {tuple(qkv.shape)}")
    batch, tokens = qkv.shape[:2]
    if key_mask is not None:
        if key_mask.shape != qkv.shape[:2]:
            raise ValueError(f"key_mask must be (B, N) = {(batch, tokens)}, got {tuple(key_mask.shape)}")
        if key_mask.dtype != torch.bool or key_mask.device != qkv.device:
            raise ValueError(f"key_mask must be bool on {qkv.device}, got {key_mask.dtype} on {key_mask.device}")
    if is_exporting(backend) and dropout_p == 0.0:
        return sdpa.dense(qkv, key_mask, causal, qkv.shape[-1] ** -0.5 if scale is None else scale)
    rows = qkv.flatten(0, 1)
    seed, scale = checked_dropout("qkv", rows, dropout_p, seed, scale)
    shapes = _class_of(qkv.shape[4], tokens)
    inputs = rows, dropout_p, False, key_mask is not None, tokens
    backend = choose("fused_attention", LIMITS, backend, *inputs, shapes=shapes)
    if backend == "torch" or backend in sdpa_kernels.KERNELS:
        return sdpa.dense(check_first_only("fused_attention", qkv), key_mask, causal, scale, backend)
    key_mask = None if key_mask is None else key_mask.flatten()
    out, _ = op.attention(rows, None, key_mask, tokens, causal, dropout_p, seed, scale, backend)
    return out.unflatten(0, (batch, tokens))


def varlen_attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    causal: bool = False,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention inside each of n sequences, which are stored one after another without padding.

    Args:
        qkv: (T, 3, H, d), any floating dtype: the tokens of all sequences.
        cu_seqlens: (n + 1,) int32, rising from 0 to T: sequence i owns rows cu_seqlens[i] to cu_seqlens[i + 1].
        max_seqlen: upper bound of the sequences' lengths. A constant bound saves compiled code from recompiling. On a
            GPU, a longer sequence attends only to its first max_seqlen tokens, and the outputs and gradients of its
            further tokens are undefined. Other sequences do not change.
        causal, dropout_p, seed, scale, backend: as in `fused_attention`.

    Returns:
        (T, H, d) in the dtype of `qkv`. Derivatives: `ops.derivatives`.

    Raises:
        ValueError: a shape, dtype or probability is wrong. The message names it. The values of cu_seqlens are checked
            only on the CPU, because reading them on a GPU would wait for the device.
        BackendError: as in `fused_attention`.
    """
    if qkv.dim() != 4 or qkv.shape[1] != 3:
        raise ValueError(f"qkv must be (T, 3, H, d), got {tuple(qkv.shape)}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens must be (n + 1,), got {tuple(cu_seqlens.shape)}")
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.device != qkv.device:
        raise ValueError(f"cu_seqlens must be int32 on {qkv.device}, got {cu_seqlens.dtype} on {cu_seqlens.device}")
    if is_exporting(backend) and dropout_p == 0.0:
        scale = qkv.shape[-1] ** -0.5 if scale is None else scale
        return sdpa.packed_masked(AttentionCall(qkv, cu_seqlens, None, max_seqlen, causal, 0.0, None, scale))
    seed, scale = checked_dropout("qkv", qkv, dropout_p, seed, scale)
    shapes = _class_of(qkv.shape[3], max_seqlen)
    backend = choose("varlen_attention", LIMITS, backend, qkv, dropout_p, True, False, max_seqlen, shapes=shapes)
    if backend == "torch" or backend in sdpa_kernels.KERNELS:
        if cu_seqlens.device.type == "cpu":
            check_sequences(cu_seqlens, qkv.shape[0], max_seqlen)
        qkv = check_first_only("varlen_attention", qkv)
        return sdpa.packed(AttentionCall(qkv, cu_seqlens, None, max_seqlen, causal, 0.0, None, scale), backend)
    flat = qkv, cu_seqlens, None, max_seqlen, causal, dropout_p, seed, scale
    return op.attention(*flat, backend)[0]
