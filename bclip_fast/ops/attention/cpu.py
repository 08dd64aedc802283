"""The operator on the CPU, completely in C++ (csrc/attention.h). Each thread runs one head of one sequence at a time.

`bclip tune` compares it with torch's scaled_dot_product_attention on this machine. Without AMX it multiplies bfloat16
in float32, and without AVX-512 the same code uses narrower vectors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bclip_fast import _cpu
from bclip_fast.ops.philox import unsigned_seed
from bclip_fast.ops.pointers import address

from .call import AttentionCall

DTYPES = torch.bfloat16, torch.float32

# The best instruction set of this machine for products of each dtype.
INSTRUCTION_SETS = {dtype: _cpu.attention_instruction_sets(dtype == torch.bfloat16)[0] for dtype in DTYPES}


def forward(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Same contract as `reference.forward`."""
    compiled, (qkv, *_) = _compiled_call(call)
    out = torch.empty(qkv[:, 0].shape, dtype=qkv.dtype)
    lse = torch.empty(qkv.shape[2], qkv.shape[0], dtype=torch.float32)
    _cpu.attention_forward(compiled, out.data_ptr(), lse.data_ptr(), torch.get_num_threads())
    return out, lse


def backward(call: AttentionCall, grad_out: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    """Same contract as `reference.backward`."""
    compiled, (qkv, *_) = _compiled_call(call)
    grad_out, shape = grad_out.contiguous(), qkv[:, 0].shape
    grad_qkv = torch.empty_like(qkv)
    _cpu.attention_backward(
        compiled,
        address(grad_out, qkv.dtype, *shape),
        address(out, qkv.dtype, *shape),
        address(lse, torch.float32, qkv.shape[2], qkv.shape[0]),
        grad_qkv.data_ptr(),
        torch.get_num_threads(),
    )
    return grad_qkv


def _compiled_call(call: AttentionCall) -> tuple[_cpu.Attention, tuple[Tensor, ...]]:
    """The argument of the C++ functions, and the tensors that must outlive it, qkv first."""
    rows, _, heads, dim = call.qkv.shape
    qkv = call.qkv.contiguous()
    if call.cu_seqlens is None:
        bounds = torch.arange(0, rows + 1, max(1, call.max_seqlen), dtype=torch.int32)
    else:
        bounds = call.cu_seqlens.contiguous()
    mask = None if call.key_mask is None else call.key_mask.contiguous()
    compiled = _cpu.Attention(
        INSTRUCTION_SETS[qkv.dtype],
        address(qkv, qkv.dtype, rows, 3, heads, dim),
        qkv.dtype == torch.bfloat16,
        rows,
        heads,
        dim,
        address(bounds, torch.int32, len(bounds)),
        len(bounds) - 1,
        0 if mask is None else address(mask, torch.bool, rows),
        call.causal,
        call.scale,
        call.dropout_p,
        unsigned_seed(call.seed),
    )
    return compiled, (qkv, bounds) if mask is None else (qkv, bounds, mask)
