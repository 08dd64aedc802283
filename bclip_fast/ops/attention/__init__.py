"""Attention on packed projections: softmax(scale * Q K^T + mask) V, dense or over sequences of different lengths."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cuda_device import cuda_refusal, triton_refusal, without_autocast
from ..dispatch import Limits, choose, kernels
from ..dtypes import accumulation_dtype
from . import sdpa
from .checks import checked_dropout, cpu_limits
from .single_query import pooled_attention

__all__ = ["LIMITS", "fused_attention", "pooled_attention", "varlen_attention"]


# What limits are asked about: qkv, the dropout, and whether sequences are packed; without the latter two, neither is.


def _triton_limits(qkv: Tensor, dropout_p: float = 0.0, packed: bool = False) -> str | None:
    if qkv.shape[-1] not in (32, 64, 80, 96, 128):
        return f"d is {qkv.shape[-1]}, not among 32, 64, 80, 96 and 128"
    return triton_refusal(qkv)


# Per head dimension the shared memory that a block of the greediest kernel takes at least, in bytes: the backward's.
CUDA_BLOCK_BYTES = {32: 83456, 64: 82944, 96: 123904, 128: 148480}


def _cuda_limits(qkv: Tensor, dropout_p: float = 0.0, packed: bool = False) -> str | None:
    if qkv.shape[-1] not in CUDA_BLOCK_BYTES:
        return f"d is {qkv.shape[-1]}, not among 32, 64, 96 and 128"
    return cuda_refusal(qkv, block_bytes=CUDA_BLOCK_BYTES[qkv.shape[-1]])


LIMITS: Limits = {
    "triton": _triton_limits,
    "cuda": _cuda_limits,
    "cpu": cpu_limits,
    "torch": sdpa.refusal,
    "reference": lambda qkv, dropout_p=0.0, packed=False: None,
}


def _class_of(dim: int, tokens: int) -> str:
    """The class of shapes under which times are recorded."""
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
    """Attention over sequences of one length, read from the packed projection in place.

    Args:
        qkv: (B, N, 3, H, d), any floating dtype: queries, keys and values of H heads.
        key_mask: (B, N) bool, True where a key may be attended to; a row without any such key yields zeros.
        causal: query i attends to keys 0..i only.
        dropout_p: probability with which an attention weight is dropped, the rest scaled by 1/(1-p).
        seed: which weights are dropped, the same ones in every backend: an int or a 0-dimensional int64 tensor. Drawn
            from torch's CPU generator unless given, so `torch.manual_seed` fixes it and checkpointing repeats it.
        scale: factor of the scores, d**-0.5 unless given.
        backend: "auto" or one of `ops.BACKENDS`.

    Returns:
        (B, N, H, d) in the dtype of `qkv`, so that the output projection needs no transpose. Differentiable once.

    Raises:
        ValueError: a shape, dtype or probability that doesn't fit; the message names it.
        BackendError: the named backend cannot run this call.
    """
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(f"qkv must be (B, N, 3, H, d), got {tuple(qkv.shape)}")
    batch, tokens = qkv.shape[:2]
    if key_mask is not None:
        if key_mask.shape != qkv.shape[:2]:
            raise ValueError(f"key_mask must be (B, N) = {(batch, tokens)}, got {tuple(key_mask.shape)}")
        if key_mask.dtype != torch.bool or key_mask.device != qkv.device:
            raise ValueError(f"key_mask must be bool on {qkv.device}, got {key_mask.dtype} on {key_mask.device}")
    rows = qkv.flatten(0, 1)
    seed, scale = checked_dropout("qkv", rows, dropout_p, seed, scale)
    shapes = _class_of(qkv.shape[4], tokens)
    backend = choose("fused_attention", LIMITS, backend, rows, dropout_p, False, shapes=shapes)
    if backend == "torch":
        return sdpa.dense(qkv, key_mask, causal, scale)
    key_mask = None if key_mask is None else key_mask.flatten()
    out, _ = _attention(rows, None, key_mask, tokens, causal, dropout_p, seed, scale, backend)
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
    """Attention inside each of n sequences that lie one after another without padding.

    Args:
        qkv: (T, 3, H, d), any floating dtype: the tokens of all sequences.
        cu_seqlens: (n + 1,) int32, rising from 0 to T: sequence i owns rows cu_seqlens[i] to cu_seqlens[i + 1].
        max_seqlen: at least the longest sequence; a bound known beforehand spares compiled code a change of graph.
        causal, dropout_p, seed, scale, backend: as in `fused_attention`.

    Returns:
        (T, H, d) in the dtype of `qkv`. Differentiable once.

    Raises:
        ValueError: a shape, dtype or probability that doesn't fit; the message names it. What cu_seqlens holds is
            looked at on the CPU alone: on a GPU that would wait for the device.
        BackendError: the named backend cannot run this call.
    """
    if qkv.dim() != 4 or qkv.shape[1] != 3:
        raise ValueError(f"qkv must be (T, 3, H, d), got {tuple(qkv.shape)}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens must be (n + 1,), got {tuple(cu_seqlens.shape)}")
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.device != qkv.device:
        raise ValueError(f"cu_seqlens must be int32 on {qkv.device}, got {cu_seqlens.dtype} on {cu_seqlens.device}")
    seed, scale = checked_dropout("qkv", qkv, dropout_p, seed, scale)
    shapes = _class_of(qkv.shape[3], max_seqlen)
    backend = choose("varlen_attention", LIMITS, backend, qkv, dropout_p, True, shapes=shapes)
    if backend == "torch":
        if cu_seqlens.device.type == "cpu":
            _check_bounds(cu_seqlens, qkv.shape[0], max_seqlen)
        return sdpa.packed(qkv, cu_seqlens, max_seqlen, causal, scale)
    return _attention(qkv, cu_seqlens, None, max_seqlen, causal, dropout_p, seed, scale, backend)[0]


def _check_bounds(cu_seqlens: Tensor, rows: int, max_seqlen: int) -> None:
    bounds = cu_seqlens.tolist()
    lengths = [stop - start for start, stop in zip(bounds, bounds[1:], strict=False)]
    if bounds[0] != 0 or bounds[-1] != rows or min(lengths, default=0) < 0:
        raise ValueError(f"cu_seqlens must rise from 0 to T = {rows}, got {bounds[:4]} ... {bounds[-1]}")
    longest = max(lengths, default=0)
    if longest > max_seqlen:
        raise ValueError(f"max_seqlen is {max_seqlen}, but the longest sequence has {longest} tokens")


@torch.library.custom_op("bclip::attention", mutates_args=())
@without_autocast
def _attention(
    qkv: Tensor,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
    max_seqlen: int,
    causal: bool,
    dropout_p: float,
    seed: Tensor | None,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(out, log-sum-exps) as in `reference.forward`."""
    if cu_seqlens is not None and cu_seqlens.device.type == "cpu":
        _check_bounds(cu_seqlens, qkv.shape[0], max_seqlen)
    return kernels("attention", backend).forward(qkv, cu_seqlens, key_mask, max_seqlen, causal, dropout_p, seed, scale)


@_attention.register_fake
def _(
    qkv: Tensor,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
    max_seqlen: int,
    causal: bool,
    dropout_p: float,
    seed: Tensor | None,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    rows, _, heads, dim = qkv.shape
    exact = accumulation_dtype(qkv)
    return qkv.new_empty(rows, heads, dim), qkv.new_empty(heads, rows, dtype=exact)


@torch.library.custom_op("bclip::attention_backward", mutates_args=())
@without_autocast
def _attention_backward(
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
    backend: str,
) -> Tensor:
    """The gradient of `qkv`."""
    return kernels("attention", backend).backward(
        grad_out, qkv, out, lse, cu_seqlens, key_mask, max_seqlen, causal, dropout_p, seed, scale
    )


@_attention_backward.register_fake
def _(
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
    backend: str,
) -> Tensor:
    # Contiguous whatever the input's layout, as the kernels allocate it.
    return qkv.new_empty(qkv.shape)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    qkv, cu_seqlens, key_mask, ctx.max_seqlen, ctx.causal, ctx.dropout_p, seed, ctx.scale, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(qkv, *output, cu_seqlens, key_mask, seed)


def _backward(ctx, grad, _):  # type: ignore[no-untyped-def]
    qkv, out, lse, cu_seqlens, key_mask, seed = ctx.saved_tensors
    options = ctx.max_seqlen, ctx.causal, ctx.dropout_p, seed, ctx.scale, ctx.backend
    return _attention_backward(grad, qkv, out, lse, cu_seqlens, key_mask, *options), *[None] * 8


_attention.register_autograd(_backward, setup_context=_setup)
