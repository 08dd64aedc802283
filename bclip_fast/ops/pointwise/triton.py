"""The operators in Triton, for NVIDIA GPUs from sm_80 on. Each reads its inputs once and writes its results once.

A program of `add_norm` holds a row in registers and computes mean and variance of the stored row in two passes over
them. The backward has at most 512 programs. Each takes every 512th row and sums the gradients of weight and bias over
its rows, so torch then adds up little. The kernels use no atomics, so sums are reproducible. One call of Philox gives
the random numbers of four elements. All arithmetic is float32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bclip_fast.ops.philox import gpu_arguments

from .call import AddNormCall, AddNormGradientCall

# Programs of a norm's backward: nearly four per multiprocessor of an H100.
MAX_PROGRAMS = 512

# Tile size and launch options of gelu's kernels: 16 elements per thread, in accesses of 16 bytes. Triton compiles them
# once for sizes that are multiples of 16, as every model's are, and once for others, whose last access is partial.
GELU = {"BLOCK": 2048, "enable_fp_fusion": True}


@triton.jit
def _kept(seed, threshold, row, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """(WIDTH,) bool, False for an element that dropout drops."""
    quads = tl.arange(0, WIDTH // 4).to(tl.uint32)
    row = row.to(tl.uint32)
    a, b, c, d = tl.philox(tl.load(seed), quads, row, row * 0, row * 0)
    least = threshold.to(tl.uint32)
    # A join's last dimension varies fastest, so the order is a, b, c, d.
    return tl.reshape(tl.join(tl.join(a >= least, c >= least), tl.join(b >= least, d >= least)), (WIDTH,))


@triton.jit
def _standardised(values, inside, eps, DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    """((x - mean) / deviation, 1 / deviation) of a float32 row that is zero outside."""
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
    """One program per row. `total` and `wide_normed` may be None."""
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
    """partials (2, programs, DIM): gradients of weight and bias over its rows. Upstream gradients may be None."""
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


@triton.jit
def _gelu_kernel(x, out, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < size
    values = tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
    result = 0.5 * values * (1.0 + tl.erf(values * 0.7071067811865476))
    tl.store(out + places, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
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
    """Launch options: 8 elements per thread, and as many warps as a row needs. They are not yet tuned."""
    width = max(128, triton.next_power_of_2(dim))
    return {"DIM": dim, "WIDTH": width, "num_warps": min(max(width // 256, 1), 16), "enable_fp_fusion": True}


def add_norm(call: AddNormCall) -> tuple[Tensor, Tensor, Tensor]:
    """(normed in `dtype`, sum or empty without a branch, normed in the stream's dtype or empty unless `wide`)."""
    stream, weight, bias = call.stream.contiguous(), call.weight.contiguous(), call.bias.contiguous()
    branch = None if call.branch is None else call.branch.contiguous()
    rows, dim = stream.shape
    normed = torch.empty(stream.shape, dtype=call.dtype, device=stream.device)
    total = stream.new_empty(stream.shape if branch is not None else (0,))
    wide_normed = stream.new_empty(stream.shape if call.wide else (0,))
    if stream.numel():
        outputs = (total if branch is not None else None), normed, (wide_normed if call.wide else None)
        dropout = gpu_arguments(stream.device, call.dropout_p, call.seed)
        with torch.cuda.device_of(stream):
            _add_norm_kernel[(rows,)](
                stream,
                branch,
                weight,
                bias,
                *outputs,
                *dropout,
                call.eps,
                DROPOUT=call.seed is not None,
                **configuration(dim),
            )
    return normed, total, wide_normed


def add_norm_backward(call: AddNormGradientCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of stream, branch (empty without `branch_dtype`), weight and bias."""
    total, weight = call.total.contiguous(), call.weight.contiguous()
    grads = [None if part is None else part.contiguous() for part in (call.grad, call.wide_grad, call.total_grad)]
    rows, dim = total.shape
    stream_grad = torch.empty_like(total)
    separate = call.branch_dtype is not None
    branch_shape = total.shape if separate else (0,)
    branch_grad = torch.empty(branch_shape, dtype=call.branch_dtype or total.dtype, device=total.device)
    programs = min(triton.cdiv(rows, 8), MAX_PROGRAMS)
    partials = torch.empty(2, programs, dim, dtype=torch.float32, device=total.device)
    if total.numel():
        outputs = stream_grad, (branch_grad if separate else None), partials
        dropout = gpu_arguments(total.device, call.dropout_p, call.seed)
        inputs = *grads, total, weight, *outputs, *dropout, call.eps, rows
        with torch.cuda.device_of(total):
            _add_norm_backward_kernel[(programs,)](*inputs, DROPOUT=call.seed is not None, **configuration(dim))
    weight_grad, bias_grad = partials.sum(1).to(weight.dtype).unbind(0)
    return stream_grad, branch_grad, weight_grad, bias_grad.clone()


def gelu(x: Tensor) -> Tensor:
    """x * Phi(x)"""
    return _launch_gelu(_gelu_kernel, x)


def gelu_backward(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of `x`."""
    return _launch_gelu(_gelu_backward_kernel, grad, x)


def _launch_gelu(kernel: Any, *inputs: Tensor) -> Tensor:
    inputs = tuple(tensor.contiguous() for tensor in inputs)
    out = torch.empty_like(inputs[-1])
    if size := out.numel():
        with torch.cuda.device_of(out):
            kernel[(triton.cdiv(size, GELU["BLOCK"]),)](*inputs, out, size, **GELU)
    return out
