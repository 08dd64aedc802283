"""C++ for one query of each sequence (csrc/single_query_attention.h): keys and values are read once each way."""

from __future__ import annotations

import torch
from torch import Tensor

from bclip_fast import _cpu

from ...cuda_device import address
from ..cpu import INSTRUCTION_SETS


def forward(
    query: Tensor,
    key_value: Tensor,
    rows: Tensor,
    cu_seqlens: Tensor,
    causal: bool,
    dropout_p: float,
    seed: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """As `reference.forward`."""
    call, _held = _call(query, key_value, rows, cu_seqlens, causal, dropout_p, seed, scale)
    out, lse = torch.empty(query.shape, dtype=query.dtype), torch.empty(query.shape[:2], dtype=torch.float32)
    _cpu.single_query_attention_forward(call, out.data_ptr(), lse.data_ptr(), torch.get_num_threads())
    return out, lse


def backward(
    grad_out: Tensor,
    query: Tensor,
    key_value: Tensor,
    out: Tensor,
    lse: Tensor,
    rows: Tensor,
    cu_seqlens: Tensor,
    causal: bool,
    dropout_p: float,
    seed: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """As `reference.backward`."""
    call, _held = _call(query, key_value, rows, cu_seqlens, causal, dropout_p, seed, scale)
    grad_out, dtype, shape = grad_out.contiguous(), query.dtype, query.shape
    query_grad, grad = torch.empty(shape, dtype=dtype), torch.empty(key_value.shape, dtype=dtype)
    _cpu.single_query_attention_backward(
        call,
        address(grad_out, dtype, *shape),
        address(out, dtype, *shape),
        address(lse, torch.float32, *shape[:2]),
        query_grad.data_ptr(),
        grad.data_ptr(),
        torch.get_num_threads(),
    )
    return query_grad, grad


def _call(
    query: Tensor,
    key_value: Tensor,
    rows: Tensor,
    cu_seqlens: Tensor,
    causal: bool,
    dropout_p: float,
    seed: Tensor | None,
    scale: float,
) -> tuple[_cpu.SingleQueryAttention, tuple[Tensor, ...]]:
    """What the C++ functions take, and the tensors whose addresses it holds."""
    held = tuple(tensor.contiguous() for tensor in (query, key_value, rows, cu_seqlens))
    query, key_value, rows, cu_seqlens = held
    sequences, heads, dim = query.shape
    call = _cpu.SingleQueryAttention(
        INSTRUCTION_SETS[query.dtype],
        address(query, query.dtype, sequences, heads, dim),
        address(key_value, query.dtype, len(key_value), 2, heads, dim),
        query.dtype == torch.bfloat16,
        len(key_value),
        sequences,
        heads,
        dim,
        address(cu_seqlens, torch.int32, sequences + 1),
        address(rows, torch.int64, sequences),
        causal,
        scale,
        dropout_p,
        0 if seed is None else int(seed) % 2**64,
    )
    return call, held
