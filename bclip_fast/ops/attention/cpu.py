"""The operator on the CPU: C++ for all of it (csrc/attention.h), one head of one sequence at a time on each thread.

`bclip tune` compares it with torch's scaled_dot_product_attention on the machine at hand. Without AMX bfloat16 is
multiplied in float32, without AVX-512 by narrower vectors of the same code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bclip_fast import _cpu

from ..cuda_device import address

DTYPES = torch.bfloat16, torch.float32

# What multiplies, the best that the machine has.
INSTRUCTION_SETS = {dtype: _cpu.attention_instruction_sets(dtype == torch.bfloat16)[0] for dtype in DTYPES}


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
    call, (qkv, *_) = _call(qkv, cu_seqlens, key_mask, max_seqlen, causal, dropout_p, seed, scale)
    out = torch.empty(qkv[:, 0].shape, dtype=qkv.dtype)
    lse = torch.empty(qkv.shape[2], qkv.shape[0], dtype=torch.float32)
    _cpu.attention_forward(call, out.data_ptr(), lse.data_ptr(), torch.get_num_threads())
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
    call, (qkv, *_) = _call(qkv, cu_seqlens, key_mask, max_seqlen, causal, dropout_p, seed, scale)
    grad_out, shape = grad_out.contiguous(), qkv[:, 0].shape
    grad_qkv = torch.empty_like(qkv)
    _cpu.attention_backward(
        call,
        address(grad_out, qkv.dtype, *shape),
        address(out, qkv.dtype, *shape),
        address(lse, torch.float32, qkv.shape[2], qkv.shape[0]),
        grad_qkv.data_ptr(),
        torch.get_num_threads(),
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
) -> tuple[_cpu.Attention, tuple[Tensor, ...]]:
    """What the C++ functions take, and the tensors whose addresses it holds, first of them qkv."""
    rows, _, heads, dim = qkv.shape
    qkv = qkv.contiguous()
    if cu_seqlens is None:
        bounds = torch.arange(0, rows + 1, max(1, max_seqlen), dtype=torch.int32)
    else:
        bounds = cu_seqlens.contiguous()
    mask = None if key_mask is None else key_mask.contiguous()
    call = _cpu.Attention(
        INSTRUCTION_SETS[qkv.dtype],
        address(qkv, qkv.dtype, rows, 3, heads, dim),
        qkv.dtype == torch.bfloat16,
        rows,
        heads,
        dim,
        address(bounds, torch.int32, len(bounds)),
        len(bounds) - 1,
        0 if mask is None else address(mask, torch.bool, rows),
        causal,
        scale,
        dropout_p,
        0 if seed is None else int(seed) % 2**64,
    )
    return call, (qkv, bounds) if mask is None else (qkv, bounds, mask)
