"""The bfloat16 linear layer on a CPU: on the matrix unit of x86 (csrc/matmul.h), else by float32 products.

The matrix unit's three products read their operands in place. Otherwise torch's library multiplies in float32, and the
results are rounded to bfloat16. A bfloat16 weight is upcast once per call, and rows are upcast in blocks that stay in
the cache. Eager PyTorch casts a float32 weight first and its gradient afterwards, and sums the bias's gradient in a
separate pass.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bclip_fast import _cpu
from bclip_fast.ops.pointers import address

from .call import LinearCall, LinearGradientCall

# Rows per thread in a block of float32 products. Fewer rows leave cores idle, more rows overflow the cache.
_ROWS_A_THREAD = 512


def linear(call: LinearCall) -> Tensor:
    """x W^T + b in x's dtype."""
    x, weight, bias = call.x, call.weight, call.bias
    rows, result = x.reshape(-1, x.shape[-1]), x.new_empty(*x.shape[:-1], len(weight))
    added, out = None if bias is None else bias.float(), result.view(-1, len(weight))
    if _cpu.has_amx():
        added = None if added is None else added.contiguous()
        _linear(rows.contiguous(), weight.contiguous(), out, right_transposed=True, bias=added)
    else:
        right = weight.float().T
        for block, part, products in _blocks(rows, len(weight)):
            torch.mm(part, right, out=products)
            out[block] = products if added is None else products.add_(added)
    return result


def linear_backward(call: LinearGradientCall) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, each in its own dtype; empty if not needed."""
    grad, x, weight, bias_dtype = call.grad, call.x, call.weight, call.bias_dtype
    width = x.shape[-1]
    rows, grad = x.reshape(-1, width), grad.reshape(-1, len(weight))
    x_grad = x.new_empty(x.shape if call.x_needs_grad else (0,))
    weight_grad = weight.new_empty(weight.shape if call.weight_needs_grad else (0,))
    sums = torch.empty(len(weight) if bias_dtype else 0, dtype=torch.float32)
    if _cpu.has_amx():
        rows, grad = rows.contiguous(), grad.contiguous()
        if call.x_needs_grad:
            _linear(grad, weight.contiguous(), x_grad.view(-1, width))
        if call.weight_needs_grad:
            _linear(grad, rows, weight_grad, left_transposed=True, left_sums=sums if bias_dtype else None)
        elif bias_dtype:
            torch.sum(grad, 0, dtype=torch.float32, out=sums)
    else:
        right = weight.float() if call.x_needs_grad else weight
        total = weight_grad if weight_grad.dtype == torch.float32 else weight_grad.float()
        total.zero_(), sums.zero_()
        for block, part, products in _blocks(grad, width):
            if call.x_needs_grad:
                x_grad.view(-1, width)[block] = torch.mm(part, right, out=products)
            if call.weight_needs_grad:
                total.addmm_(part.T, products.copy_(rows[block]))
            if bias_dtype:
                sums += part.sum(0)
        if total is not weight_grad:
            weight_grad.copy_(total)
    return x_grad, weight_grad, sums.to(bias_dtype or sums.dtype)


def _blocks(left: Tensor, columns: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Blocks of n rows of `left` (T, K): their slice, the rows in float32, and memory for (n, columns) products."""
    size = min(len(left), _ROWS_A_THREAD * torch.get_num_threads())
    wide = left.new_empty(size, left.shape[1], dtype=torch.float32)
    products = left.new_empty(size, columns, dtype=torch.float32)
    for start in range(0, len(left), max(size, 1)):
        block = slice(start, min(start + size, len(left)))
        count = block.stop - start
        yield block, wide[:count].copy_(left[block]), products[:count]


def _linear(
    left: Tensor,
    right: Tensor,
    result: Tensor,
    *,
    left_transposed: bool = False,
    right_transposed: bool = False,
    bias: Tensor | None = None,
    left_sums: Tensor | None = None,
) -> None:
    (rows, columns), depth = result.shape, left.shape[0 if left_transposed else 1]
    workspace = torch.empty(_cpu.linear_workspace(columns, depth), dtype=torch.bfloat16)
    _cpu.linear(
        rows,
        columns,
        depth,
        address(left, torch.bfloat16, *((depth, rows) if left_transposed else (rows, depth))),
        left_transposed,
        address(right, right.dtype, *((columns, depth) if right_transposed else (depth, columns))),
        right_transposed,
        right.dtype == torch.float32,
        0 if bias is None else address(bias, torch.float32, columns),
        address(result, result.dtype, rows, columns),
        result.dtype == torch.float32,
        0 if left_sums is None else address(left_sums, torch.float32, rows),
        workspace.data_ptr(),
        torch.get_num_threads(),
    )
