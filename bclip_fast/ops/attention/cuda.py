"""The operator in CUDA C++ for NVIDIA GPUs from sm_80 on (csrc/cuda/attention/); not yet measured on one.

Rows of up to 256 scores (128 for a head dimension above 64) are held in registers as a whole; longer ones go through
chunks of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..cuda_device import aligned, cuda_address, cuda_block_bytes, cuda_module, cuda_stream

# Two for a multiprocessor of an H100, nearly: fewer leave a GPU idle.
FEW_BLOCKS = 256

# A block of threads takes so many queries at a time.
STRIP = 64


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
    """As `reference.forward`."""
    rows, _, heads, dim = qkv.shape
    out = torch.empty(rows, heads, dim, dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty(heads, rows, dtype=torch.float32, device=qkv.device)
    if not rows:
        return out, lse
    call, held = _call(qkv, cu_seqlens, key_mask, max_seqlen, causal, dropout_p, seed, scale)
    splits = 1 if held["sequences"] * heads >= FEW_BLOCKS else -(-max_seqlen // STRIP)
    with torch.cuda.device_of(qkv):
        cuda_module().attention_forward(call, out.data_ptr(), lse.data_ptr(), splits)
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
    """As `reference.backward`."""
    rows, _, heads, dim = qkv.shape
    grad_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    if not rows:
        return grad_qkv
    call, held = _call(qkv, cu_seqlens, key_mask, max_seqlen, causal, dropout_p, seed, scale)
    grad_out, module = aligned(grad_out), cuda_module()
    workspace = None
    if max_seqlen > module.attention_backward_keys(dim, max_seqlen, cuda_block_bytes(qkv)):
        workspace = torch.empty(rows, heads, dim, dtype=torch.float32, device=qkv.device)
    with torch.cuda.device_of(qkv):
        module.attention_backward(
            call,
            grad_out.data_ptr(),
            cuda_address(out, qkv.dtype, qkv.device, rows, heads, dim),
            *grad_out.stride()[:2],
            cuda_address(lse, torch.float32, qkv.device, heads, rows),
            grad_qkv.data_ptr(),
            0 if workspace is None else workspace.data_ptr(),
        )
    return grad_qkv


def _call(
    qkv: Tensor,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
    max_seqlen: int,
    causal: bool,
    dropout_p: float,
    seed: Tensor | None,
    scale: float,
) -> tuple[Any, dict[str, Any]]:
    """What the C++ functions take, and what must live as long as it: the tensors whose addresses it holds."""
    rows, _, heads, dim = qkv.shape
    qkv, bounds, mask = aligned(qkv), cu_seqlens, key_mask
    sequences = rows // max_seqlen if bounds is None else len(bounds) - 1
    bounds = None if bounds is None else bounds.contiguous()
    mask = None if mask is None else mask.contiguous()
    # Read on the device, where a graph may replay the call.
    seed = None if seed is None else seed.to(qkv.device, non_blocking=True)
    call = cuda_module().Attention(
        qkv.data_ptr(),
        qkv.dtype == torch.bfloat16,
        *qkv.stride()[:3],
        rows,
        sequences,
        heads,
        dim,
        0 if bounds is None else cuda_address(bounds, torch.int32, qkv.device, sequences + 1),
        max_seqlen,
        0 if mask is None else cuda_address(mask, torch.bool, qkv.device, rows),
        causal,
        scale,
        0 if seed is None else cuda_address(seed, torch.int64, qkv.device),
        0 if seed is None else int(dropout_p * 2**32),
        1.0 if seed is None else 1 / (1 - dropout_p),
        cuda_block_bytes(qkv),
        cuda_stream(qkv),
    )
    return call, {"sequences": sequences, "tensors": (qkv, bounds, mask, seed)}
