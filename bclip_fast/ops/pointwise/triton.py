"""The operators in Triton, for NVIDIA GPUs from sm_80 on: each reads its inputs once and writes its results once.

A program of `add_norm` holds a row in registers: mean and variance are those of the row as it is stored, in two passes
over registers. The backward has at most 512 programs, each taking every 512th row and summing the gradients of weight
and bias over its own, so that what torch then adds up is small; no atomics, so the sums come out the same every time.
One call of Philox decides on four elements. All arithmetic is float32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Of a norm's backward: nearly four for a multiprocessor of an H100.
MAX_PROGRAMS = 512

GELU_BLOCK = 2048


@triton.jit
def _kept(seed, threshold, row, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """(WIDTH,) bool, False where dropout takes the element."""
    quads = tl.arange(0, WIDTH // 4).to(tl.uint32)
    row = row.to(tl.uint32)
    a, b, c, d = tl.philox(tl.load(seed), quads, row, row * 0, row * 0)
    least = threshold.to(tl.uint32)
    # The last dimension of a join counts fastest: a, b, c, d.
    return tl.reshape(tl.join(tl.join(a >= least, c >= least), tl.join(b >= least, d >= least)), (WIDTH,))


@triton.jit
def _standardised(values, inside, eps, DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    """((x - mean) / deviation, 1 / deviation) of a row in float32 that is zero outside."""
    centred = tl.where(inside, values - tl.sum(values, 0) / DIM, 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / DIM + eps)
    return centred * inverse, inverse


@triton.jit(do_not_specialize=["threshold"])
def _add_norm_kernel(  # type: ignore[no-untyped-def]
    stream,
    branch,
    weight,
    bias,
    total,
    normed,
    wide_normed,
    seed,
    threshold,
    keep_scale,
    eps,
    DROPOUT: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """A program for a row; `total` and `wide_normed` may be None."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    inside = columns < DIM
    places = row * DIM + columns
    values = tl.load(stream + places, mask=inside, other=0.0).to(tl.float32)
    if branch is not None:
        added = tl.load(branch + places, mask=inside, other=0.0).to(tl.float32)
        if DROPOUT:
            added = tl.where(_kept(seed, threshold, row, WIDTH), added * keep_scale, 0.0)
        stored = (values + added).to(stream.dtype.element_ty)
        tl.store(total + places, stored, mask=inside)
        values = stored.to(tl.float32)
    result, _ = _standardised(values, inside, eps, DIM)
    result *= tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    result += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + places, result.to(normed.dtype.element_ty), mask=inside)
    if wide_normed is not None:
        tl.store(wide_normed + places, result.to(wide_normed.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["threshold", "num_rows"])
def _add_norm_backward_kernel(  # type: ignore[no-untyped-def]
    grad,
    wide_grad,
    total_grad,
    total,
    weight,
    stream_grad,
    branch_grad,
    partials,
    seed,
    threshold,
    keep_scale,
    eps,
    num_rows,
    DROPOUT: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """partials (2, programs, DIM): gradients of weight and bias over a program's rows. Any gradient may be None."""
    columns = tl.arange(0, WIDTH)
    inside = columns < DIM
    scales = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    weight_grad = tl.zeros((WIDTH,), tl.float32)
    bias_grad = tl.zeros((WIDTH,), tl.float32)
    row = tl.program_id(0).to(tl.int64)
    for _ in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        places = row * DIM + columns
        values = tl.load(total + places, mask=inside, other=0.0).to(tl.float32)
        standard, inverse = _standardised(values, inside, eps, DIM)
        upstream = tl.zeros((WIDTH,), tl.float32)
        if grad is not None:
            upstream += tl.load(grad + places, mask=inside, other=0.0).to(tl.float32)
        if wide_grad is not None:
            upstream += tl.load(wide_grad + places, mask=inside, other=0.0).to(tl.float32)
        weight_grad += upstream * standard
        bias_grad += upstream
        scaled = upstream * scales
        result = scaled - tl.sum(scaled, 0) / DIM - standard * (tl.sum(scaled * standard, 0) / DIM)
        result *= inverse
        if total_grad is not None:
            result += tl.load(total_grad + places, mask=inside, other=0.0).to(tl.float32)
        tl.store(stream_grad + places, result.to(stream_grad.dtype.element_ty), mask=inside)
        if branch_grad is not None:
            if DROPOUT:
                result = tl.where(_kept(seed, threshold, row, WIDTH), result * keep_scale, 0.0)
            tl.store(branch_grad + places, result.to(branch_grad.dtype.element_ty), mask=inside)
        row += tl.num_programs(0)
    place = tl.program_id(0) * DIM + columns
    tl.store(partials + place, weight_grad, mask=inside)
    tl.store(partials + tl.num_programs(0) * DIM + place, bias_grad, mask=inside)


@triton.jit(do_not_specialize=["size"])
def _gelu_kernel(x, out, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < size
    values = tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
    result = 0.5 * values * (1.0 + tl.erf(values * 0.7071067811865476))
    tl.store(out + places, result.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["size"])
def _gelu_backward_kernel(grad, x, out, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """grad * (Phi(x) + x * phi(x))"""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < size
    values = tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
    slope = 0.5 * (1.0 + tl.erf(values * 0.7071067811865476))
    slope += values * (tl.exp(-0.5 * values * values) * 0.3989422804014327)
    result = tl.load(grad + places, mask=inside, other=0.0).to(tl.float32) * slope
    tl.store(out + places, result.to(out.dtype.element_ty), mask=inside)


def configuration(dim: int) -> dict[str, Any]:
    """Fixed; reasoned, not yet tuned on a GPU: 8 elements a thread, as few warps as rows of that width leave."""
    width = max(128, triton.next_power_of_2(dim))
    return {"DIM": dim, "WIDTH": width, "num_warps": min(max(width // 256, 1), 16), "enable_fp_fusion": True}


def add_norm(
    stream: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    dtype: torch.dtype,
    wide: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    stream, weight, bias = stream.contiguous(), weight.contiguous(), bias.contiguous()
    branch = None if branch is None else branch.contiguous()
    rows, dim = stream.shape
    normed = torch.empty(stream.shape, dtype=dtype, device=stream.device)
    total = stream.new_empty(stream.shape if branch is not None else (0,))
    wide_normed = stream.new_empty(stream.shape if wide else (0,))
    if stream.numel():
        outputs = (total if branch is not None else None), normed, (wide_normed if wide else None)
        inputs = stream, branch, weight, bias, *outputs, *_dropout(stream, dropout_p, seed), eps
        with torch.cuda.device_of(stream):
            _add_norm_kernel[(rows,)](*inputs, DROPOUT=seed is not None, **configuration(dim))
    return normed, total, wide_normed


def add_norm_backward(
    grad: Tensor | None,
    total_grad: Tensor | None,
    wide_grad: Tensor | None,
    total: Tensor,
    weight: Tensor,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    branch_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total, weight = total.contiguous(), weight.contiguous()
    grads = [None if part is None else part.contiguous() for part in (grad, wide_grad, total_grad)]
    rows, dim = total.shape
    stream_grad = torch.empty_like(total)
    apart = branch_dtype is not None
    branch_grad = torch.empty(total.shape if apart else (0,), dtype=branch_dtype or total.dtype, device=total.device)
    programs = min(triton.cdiv(rows, 8), MAX_PROGRAMS)
    partials = torch.empty(2, programs, dim, dtype=torch.float32, device=total.device)
    if total.numel():
        outputs = stream_grad, (branch_grad if apart else None), partials
        inputs = *grads, total, weight, *outputs, *_dropout(total, dropout_p, seed), eps, rows
        with torch.cuda.device_of(total):
            _add_norm_backward_kernel[(programs,)](*inputs, DROPOUT=seed is not None, **configuration(dim))
    weight_grad, bias_grad = partials.sum(1).to(weight.dtype).unbind(0)
    return stream_grad, branch_grad, weight_grad, bias_grad.clone()


def gelu(x: Tensor) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    if x.numel():
        with torch.cuda.device_of(x):
            _gelu_kernel[(triton.cdiv(x.numel(), GELU_BLOCK),)](x, out, x.numel(), BLOCK=GELU_BLOCK)
    return out


def gelu_backward(grad: Tensor, x: Tensor) -> Tensor:
    grad, x = grad.contiguous(), x.contiguous()
    out = torch.empty_like(x)
    if x.numel():
        with torch.cuda.device_of(x):
            _gelu_backward_kernel[(triton.cdiv(x.numel(), GELU_BLOCK),)](grad, x, out, x.numel(), BLOCK=GELU_BLOCK)
    return out


def _dropout(like: Tensor, dropout_p: float, seed: Tensor | None) -> tuple[Tensor | None, int, float]:
    """(seed, threshold, factor of what is kept). The seed is read on the device, where a graph may replay the call."""
    if seed is None:
        return None, 0, 1.0
    return seed.to(like.device, non_blocking=True), int(dropout_p * 2**32), 1 / (1 - dropout_p)
