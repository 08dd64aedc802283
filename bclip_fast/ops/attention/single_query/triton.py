"""One query per sequence in Triton, for NVIDIA GPUs from sm_80 on.

One program per sequence and head reads its keys and values once. The forward pass uses a running maximum. The kernels
use no atomics. The kernels do two operations per number that they read, so tensor cores would not help.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bclip_fast.ops.attention.call import SingleQueryCall
from bclip_fast.ops.attention.triton_kernels import kept_weights, load_rows, store_rows
from bclip_fast.ops.philox import gpu_arguments


def configuration(dim: int) -> dict[str, Any]:
    """Tile size and launch options of both kernels, which are not yet tuned.

    A thread holds at most 32 elements of each tile up to d = 256, so registers do not spill.
    """
    width = triton.next_power_of_2(dim)
    warps = min(max(width // 16, 4), 16)
    keys = min(64, max(4, 16384 // width))
    return {"DIM": dim, "WIDTH": width, "KEYS": keys, "num_warps": warps, "enable_fp_fusion": True}


# Signatures fill their lines here, as in attention/triton_kernels.py.
# fmt: off
@triton.jit
def _span(cu_seqlens, rows, sequence, CAUSAL: tl.constexpr):  # type: ignore[no-untyped-def]
    """(first row, the query's row) as int64, (number of rows, number of visible rows) as int32"""
    start = tl.load(cu_seqlens + sequence).to(tl.int64)
    row = tl.load(rows + sequence)
    length = (tl.load(cu_seqlens + sequence + 1) - start).to(tl.int32)
    seen = length
    if CAUSAL:
        # A row outside the sequence would otherwise read past the tokens.
        seen = tl.minimum((row + 1 - start).to(tl.int32), length)
    return start, row, length, seen


@triton.jit
def _vector(base, DIM: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    places = tl.arange(0, WIDTH)
    return tl.load(base + places, mask=places < DIM, other=0.0).to(tl.float32)


@triton.jit
def _put(base, values, DIM: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    places = tl.arange(0, WIDTH)
    tl.store(base + places, values.to(base.dtype.element_ty), mask=places < DIM)


@triton.jit(do_not_specialize=["threshold"])
def _forward_kernel(  # type: ignore[no-untyped-def]
    query, key_value, rows, cu_seqlens, out, lse, seed, threshold, keep_scale, scale, stride_query, stride_token,
    stride_part, stride_head, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
    WIDTH: tl.constexpr, KEYS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    head = (program % HEADS).to(tl.int32)
    sequence = program // HEADS
    start, row, _, seen = _span(cu_seqlens, rows, sequence, CAUSAL)
    vector = _vector(query + sequence * stride_query + head * stride_head, DIM, WIDTH)
    key_value += start * stride_token + head * stride_head
    result = tl.zeros((WIDTH,), tl.float32)
    highest = -1e30
    total = 0.0
    for first in range(0, seen, KEYS):
        keys = first + tl.arange(0, KEYS)
        key = load_rows(key_value, keys, seen, stride_token, DIM, WIDTH).to(tl.float32)
        # The backward computes the same scores, so their rounding errors cancel there.
        scores = tl.where(keys < seen, tl.sum(key * vector[None, :], 1) * scale, float("-inf"))
        higher = tl.maximum(tl.max(scores, 0), highest)
        weights = tl.exp(scores - higher)
        fading = tl.exp(highest - higher)
        highest = higher
        total = total * fading + tl.sum(weights, 0)
        if DROPOUT:
            kept = kept_weights(seed, threshold, row + tl.zeros((1,), tl.int64), head, first, KEYS)
            weights = tl.where(tl.reshape(kept, (KEYS,)), weights, 0.0)
        value = load_rows(key_value + stride_part, keys, seen, stride_token, DIM, WIDTH).to(tl.float32)
        result = result * fading + tl.sum(value * weights[:, None], 0)
    tl.store(lse + program, highest + tl.log(total))
    _put(out + program * DIM, result * (keep_scale / total), DIM, WIDTH)


@triton.jit(do_not_specialize=["threshold"])
def _backward_kernel(  # type: ignore[no-untyped-def]
    query, key_value, rows, cu_seqlens, out, lse, grad_out, query_grad, grad, seed, threshold, keep_scale, scale,
    stride_query, stride_token, stride_part, stride_head, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr,
    HEADS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    head = (program % HEADS).to(tl.int32)
    sequence = program // HEADS
    start, row, length, seen = _span(cu_seqlens, rows, sequence, CAUSAL)
    vector = _vector(query + sequence * stride_query + head * stride_head, DIM, WIDTH)
    out_grad = _vector(grad_out + program * DIM, DIM, WIDTH)
    delta = tl.sum(out_grad * _vector(out + program * DIM, DIM, WIDTH), 0)
    row_lse = tl.load(lse + program)
    key_value += start * stride_token + head * stride_head
    grad += start * (2 * HEADS * DIM) + head * DIM
    result = tl.zeros((WIDTH,), tl.float32)
    for first in range(0, length, KEYS):
        keys = first + tl.arange(0, KEYS)
        key = load_rows(key_value, keys, seen, stride_token, DIM, WIDTH).to(tl.float32)
        value = load_rows(key_value + stride_part, keys, seen, stride_token, DIM, WIDTH).to(tl.float32)
        scores = tl.where(keys < seen, tl.sum(key * vector[None, :], 1) * scale, float("-inf"))
        weights = tl.exp(scores - row_lse)
        dropped = weights
        weights_grad = tl.sum(value * out_grad[None, :], 1)
        if DROPOUT:
            kept = kept_weights(seed, threshold, row + tl.zeros((1,), tl.int64), head, first, KEYS)
            kept = tl.reshape(kept, (KEYS,))
            dropped = tl.where(kept, weights * keep_scale, 0.0)
            weights_grad = tl.where(kept, weights_grad * keep_scale, 0.0)
        scores_grad = weights * (weights_grad - delta) * scale
        result += tl.sum(key * scores_grad[:, None], 0)
        # Invisible rows have weight 0, so their gradients are stored as zeros.
        store_rows(grad, keys, length, 2 * HEADS * DIM, scores_grad[:, None] * vector[None, :], DIM, WIDTH)
        store_rows(grad + HEADS * DIM, keys, length, 2 * HEADS * DIM, dropped[:, None] * out_grad[None, :], DIM, WIDTH)
    _put(query_grad + program * DIM, result, DIM, WIDTH)
# fmt: on


def forward(call: SingleQueryCall) -> tuple[Tensor, Tensor]:
    """Same contract as `reference.forward`."""
    query, key_value = _operands(call)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
    _launch(_forward_kernel, call, query, key_value, out, lse)
    return out, lse


def backward(call: SingleQueryCall, grad_out: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Same contract as `reference.backward`."""
    query, key_value = _operands(call)
    query_grad = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    grad = torch.empty(key_value.shape, dtype=query.dtype, device=query.device)
    _launch(_backward_kernel, call, query, key_value, out, lse, grad_out.contiguous(), query_grad, grad)
    return query_grad, grad


def _launch(kernel: Any, call: SingleQueryCall, query: Tensor, key_value: Tensor, *tensors: Tensor) -> None:
    """Run one program per sequence and head."""
    num_sequences, heads, dim = query.shape
    if not num_sequences:
        return
    strides = query.stride(0), key_value.stride(0), key_value.stride(1), dim
    with torch.cuda.device_of(query):
        kernel[(num_sequences * heads,)](
            query,
            key_value,
            call.rows,
            call.cu_seqlens,
            *tensors,
            *gpu_arguments(query.device, call.dropout_p, call.seed),
            call.scale,
            *strides,
            CAUSAL=call.causal,
            DROPOUT=call.seed is not None,
            HEADS=heads,
            **configuration(dim),
        )


def _operands(call: SingleQueryCall) -> tuple[Tensor, Tensor]:
    """Query, keys and values with contiguous heads and elements, as the kernels read them."""
    packed = call.query.shape[-1], 1
    query, key_value = (
        tensor if tensor.stride()[-2:] == packed else tensor.contiguous() for tensor in (call.query, call.key_value)
    )
    return query, key_value
