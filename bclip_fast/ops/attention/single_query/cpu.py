"""One query per sequence in C++ (csrc/single_query_attention.h): each pass reads keys and values once."""

from __future__ import annotations

import torch
from torch import Tensor

from bclip_fast import _cpu
from bclip_fast.ops.attention.call import SingleQueryCall
from bclip_fast.ops.attention.cpu import INSTRUCTION_SETS
from bclip_fast.ops.philox import unsigned_seed
from bclip_fast.ops.pointers import address


def forward(call: SingleQueryCall) -> tuple[Tensor, Tensor]:
    """Same contract as `reference.forward`."""
    compiled, _tensors = _compiled_call(call)
    shape = call.query.shape
    out, lse = torch.empty(shape, dtype=call.query.dtype), torch.empty(shape[:2], dtype=torch.float32)
    _cpu.single_query_attention_forward(compiled, out.data_ptr(), lse.data_ptr(), torch.get_num_threads())
    return out, lse


def backward(call: SingleQueryCall, grad_out: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Same contract as `reference.backward`."""
    compiled, _tensors = _compiled_call(call)
    grad_out, dtype, shape = grad_out.contiguous(), call.query.dtype, call.query.shape
    query_grad, grad = torch.empty(shape, dtype=dtype), torch.empty(call.key_value.shape, dtype=dtype)
    _cpu.single_query_attention_backward(
        compiled,
        address(grad_out, dtype, *shape),
        address(out, dtype, *shape),
        address(lse, torch.float32, *shape[:2]),
        query_grad.data_ptr(),
        grad.data_ptr(),
        torch.get_num_threads(),
    )
    return query_grad, grad


def _compiled_call(call: SingleQueryCall) -> tuple[_cpu.SingleQueryAttention, tuple[Tensor, ...]]:
    """The argument of the C++ functions, and the tensors that must outlive it."""
    tensors = tuple(tensor.contiguous() for tensor in (call.query, call.key_value, call.rows, call.cu_seqlens))
    query, key_value, rows, cu_seqlens = tensors
    sequences, heads, dim = query.shape
    compiled = _cpu.SingleQueryAttention(
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
        call.causal,
        call.scale,
        call.dropout_p,
        unsigned_seed(call.seed),
    )
    return compiled, tensors
