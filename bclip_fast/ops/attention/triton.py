"""The operator in Triton, for NVIDIA GPUs from sm_80 on. triton_kernels.py describes the kernels.

No launch waits for the GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from bclip_fast.ops.cuda_device import triton_block_bytes
from bclip_fast.ops.philox import gpu_arguments

from . import triton_kernels as kernels
from .call import AttentionCall
from .triton_memory import longest_row, width_of

# The longest row of scores that registers hold.
LONGEST_ROW = 256

# Nearly two programs per multiprocessor of an H100. Fewer leave a GPU idle.
FEW_PROGRAMS = 256


def configuration(kernel: str, dtype: torch.dtype, dim: int, max_seqlen: int) -> dict[str, Any]:
    """Tile sizes and launch options of a kernel, by its name without "_kernel".

    They are fixed, so results don't depend on a tuning run. They have not been tuned on a GPU yet. Tiles are as large
    as registers allow on sm_80 and sm_90. The forward row kernel for d = 64 takes 80 KiB of shared memory and, for
    images without dropout and captions with it, at most 128 registers. So two programs share a multiprocessor.
    """
    width = width_of(dim)
    config = {"DIM": dim, "WIDTH": width, "num_warps": 8, "num_stages": 1, "enable_fp_fusion": True}
    if kernel.startswith("_row"):
        keys = min(max(64, triton.next_power_of_2(max_seqlen)), LONGEST_ROW)
        block = {"QUERIES": 32} if kernel == "_row_forward" else {"TILE": min(32 * keys, 4096)}
        return config | {"KEYS": keys} | block
    larger = 128 if width <= 64 else 64
    if dtype == torch.float32:
        blocks = {
            "_block_forward": {"QUERIES": 32, "KEYS": 32, "num_stages": 2},
            "_query_backward": {"QUERIES": 32, "KEYS": 16, "num_stages": 2, "num_warps": 4},
            "_key_backward": {"QUERIES": 16, "KEYS": 64},
        }
    else:
        blocks = {
            "_block_forward": {"QUERIES": 64, "KEYS": 64, "num_stages": 3, "num_warps": 4},
            "_query_backward": {"QUERIES": larger, "KEYS": 32, "num_stages": 2},
            "_key_backward": {"QUERIES": 32, "KEYS": larger, "num_stages": 2},
        }
    return config | blocks[kernel]


def takes_rows(kernel: str, call: AttentionCall) -> bool:
    """Whether the row kernel "_row_forward" or "_row_backward" has enough registers and memory for this call.

    A causal call takes block kernels, which skip invisible blocks. The backward row kernel only takes d = 64. GPUs with
    little shared memory (sm_86, sm_89, sm_120) hold at most 128 keys of the backward, and of the forward for d > 64.
    """
    if call.key_mask is not None or call.causal or call.qkv.dtype == torch.float32:
        return False
    dim = call.qkv.shape[-1]
    if kernel == "_row_backward" and dim != 64:
        return False
    return call.max_seqlen <= longest_row(kernel, dim, triton_block_bytes(call.qkv))


def forward(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Same contract as `reference.forward`."""
    tokens, _, heads, dim = call.qkv.shape
    dtype, device, cu_seqlens, max_seqlen = call.qkv.dtype, call.qkv.device, call.cu_seqlens, call.max_seqlen
    out = torch.empty(tokens, heads, dim, dtype=dtype, device=device)
    lse = torch.empty(heads, tokens, dtype=torch.float32, device=device)
    programs = heads * call.num_sequences()
    if not tokens:
        return out, lse
    qkv = _operand(call.qkv, max_seqlen)
    last = out, lse, *gpu_arguments(device, call.dropout_p, call.seed), call.scale, max_seqlen, tokens
    options = {"DROPOUT": call.seed is not None, "HEADS": heads}
    with torch.cuda.device_of(qkv):
        if takes_rows("_row_forward", call):
            config = configuration("_row_forward", dtype, dim, max_seqlen)
            # If there are too few heads to fill a GPU, several programs share the blocks of queries.
            splits = 1 if programs >= FEW_PROGRAMS else triton.cdiv(max_seqlen, config["QUERIES"])
            inputs = qkv, cu_seqlens, *last, splits, *qkv.stride()[:3]
            kernels._row_forward_kernel[(programs * splits,)](*inputs, **options, **config)
        else:
            config = configuration("_block_forward", dtype, dim, max_seqlen)
            blocks = triton.cdiv(max_seqlen, config["QUERIES"])
            inputs = qkv, cu_seqlens, _bytes(call.key_mask), *last, blocks, *qkv.stride()[:3]
            kernels._block_forward_kernel[(programs * blocks,)](*inputs, CAUSAL=call.causal, **options, **config)
    return out, lse


def backward(call: AttentionCall, grad_out: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    """Same contract as `reference.backward`."""
    tokens, _, heads, dim = call.qkv.shape
    dtype, device, cu_seqlens, max_seqlen = call.qkv.dtype, call.qkv.device, call.cu_seqlens, call.max_seqlen
    grad_qkv = torch.empty(call.qkv.shape, dtype=dtype, device=device)
    programs = heads * call.num_sequences()
    if not tokens:
        return grad_qkv
    qkv, grad_out = _operand(call.qkv, max_seqlen), _operand(grad_out, max_seqlen)
    last = *gpu_arguments(device, call.dropout_p, call.seed), call.scale, max_seqlen, tokens
    strides = *qkv.stride()[:3], *grad_out.stride()[:2]
    options = {"DROPOUT": call.seed is not None, "HEADS": heads}
    with torch.cuda.device_of(qkv):
        if takes_rows("_row_backward", call):
            config = configuration("_row_backward", dtype, dim, max_seqlen)
            inputs = qkv, cu_seqlens, out, lse, grad_out, grad_qkv, *last, *strides
            kernels._row_backward_kernel[(programs,)](*inputs, **options, **config)
            return grad_qkv
        options["CAUSAL"] = call.causal
        mask, delta = _bytes(call.key_mask), torch.empty_like(lse)
        config = configuration("_query_backward", dtype, dim, max_seqlen)
        blocks = triton.cdiv(max_seqlen, config["QUERIES"])
        inputs = qkv, cu_seqlens, mask, out, lse, delta, grad_out, grad_qkv, *last, blocks, *strides
        kernels._query_backward_kernel[(programs * blocks,)](*inputs, **options, **config)
        config = configuration("_key_backward", dtype, dim, max_seqlen)
        blocks = triton.cdiv(max_seqlen, config["KEYS"])
        inputs = qkv, cu_seqlens, mask, lse, delta, grad_out, grad_qkv, *last, blocks, *strides
        kernels._key_backward_kernel[(programs * blocks,)](*inputs, **options, **config)
    return grad_qkv


def _operand(tensor: Tensor, max_seqlen: int) -> Tensor:
    """The tensor with the elements of each head contiguous, as the kernels read them."""
    if tensor.stride(-1) != 1:
        tensor = tensor.contiguous()
    # Inside a sequence the kernels count in int32.
    if max_seqlen * tensor.stride(0) >= 2**31:
        raise ValueError(
            f"{max_seqlen} tokens, {tensor.stride(0)} elements apart, exceed the 2^31 elements of Triton's kernels"
        )
    return tensor


def _bytes(key_mask: Tensor | None) -> Tensor | None:
    return None if key_mask is None else key_mask.contiguous().view(torch.uint8)
