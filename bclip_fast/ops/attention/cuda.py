"""The operator in CUDA C++ for NVIDIA GPUs from sm_80 on (csrc/cuda/attention/); not yet measured on one.

Registers hold complete rows of up to 256 scores, or 128 for a head dimension above 64. Longer rows are processed in
chunks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bclip_fast.ops.cuda_device import cuda_block_bytes, cuda_module, cuda_stream
from bclip_fast.ops.philox import gpu_arguments
from bclip_fast.ops.pointers import aligned, cuda_address

from .call import AttentionCall

# Nearly two thread blocks per multiprocessor of an H100. Fewer leave a GPU idle.
FEW_BLOCKS = 256

# Queries that a thread block takes at a time.
STRIP = 64


def forward(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """As `reference.forward`."""
    qkv = call.qkv
    rows, _, heads, dim = qkv.shape
    out = torch.empty(rows, heads, dim, dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty(heads, rows, dtype=torch.float32, device=qkv.device)
    if not rows:
        return out, lse
    compiled, _tensors = _compiled_call(call)
    splits = 1 if call.num_sequences() * heads >= FEW_BLOCKS else -(-call.max_seqlen // STRIP)
    with torch.cuda.device_of(qkv):
        cuda_module().attention_forward(compiled, out.data_ptr(), lse.data_ptr(), splits)
    return out, lse


def backward(call: AttentionCall, grad_out: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    """As `reference.backward`."""
    qkv = call.qkv
    rows, _, heads, dim = qkv.shape
    grad_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    if not rows:
        return grad_qkv
    compiled, _tensors = _compiled_call(call)
    grad_out, module = aligned(grad_out), cuda_module()
    workspace = None
    if call.max_seqlen > module.attention_backward_keys(dim, call.max_seqlen, cuda_block_bytes(qkv)):
        workspace = torch.empty(rows, heads, dim, dtype=torch.float32, device=qkv.device)
    with torch.cuda.device_of(qkv):
        module.attention_backward(
            compiled,
            grad_out.data_ptr(),
            cuda_address(out, qkv.dtype, qkv.device, rows, heads, dim),
            *grad_out.stride()[:2],
            cuda_address(lse, torch.float32, qkv.device, heads, rows),
            grad_qkv.data_ptr(),
            0 if workspace is None else workspace.data_ptr(),
        )
    return grad_qkv


def _compiled_call(call: AttentionCall) -> tuple[Any, tuple[Tensor | None, ...]]:
    """The argument of the C++ functions, and the tensors that must outlive it."""
    rows, _, heads, dim = call.qkv.shape
    qkv, bounds, mask, sequences = aligned(call.qkv), call.cu_seqlens, call.key_mask, call.num_sequences()
    bounds = None if bounds is None else bounds.contiguous()
    mask = None if mask is None else mask.contiguous()
    seed, threshold, keep_scale = gpu_arguments(qkv.device, call.dropout_p, call.seed)
    compiled = cuda_module().Attention(
        qkv.data_ptr(),
        qkv.dtype == torch.bfloat16,
        *qkv.stride()[:3],
        rows,
        sequences,
        heads,
        dim,
        0 if bounds is None else cuda_address(bounds, torch.int32, qkv.device, sequences + 1),
        call.max_seqlen,
        0 if mask is None else cuda_address(mask, torch.bool, qkv.device, rows),
        call.causal,
        call.scale,
        0 if seed is None else cuda_address(seed, torch.int64, qkv.device),
        threshold,
        keep_scale,
        cuda_block_bytes(qkv),
        cuda_stream(qkv),
    )
    return compiled, (qkv, bounds, mask, seed)
