"""The linear layer on the matrix unit of x86 (csrc/linear.h): three products, each reading its operands as they lie.

Eager PyTorch casts a float32 weight first and its gradient afterwards, and sums the bias's in a pass of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bclip_fast import _cpu

from ..arguments import address


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows, result = x.reshape(-1, x.shape[-1]).contiguous(), x.new_empty(*x.shape[:-1], len(weight))
    added = None if bias is None else bias.float().contiguous()
    _product(rows, weight.contiguous(), result.view(-1, len(weight)), right_transposed=True, bias=added)
    return result


def linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias_dtype: torch.dtype | None, x_wanted: bool, weight_wanted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    width = x.shape[-1]
    rows, grad = x.reshape(-1, width).contiguous(), grad.reshape(-1, len(weight)).contiguous()
    x_grad = x.new_empty(x.shape if x_wanted else (0,))
    weight_grad = weight.new_empty(weight.shape if weight_wanted else (0,))
    sums = torch.empty(len(weight) if bias_dtype else 0, dtype=torch.float32)
    if x_wanted:
        _product(grad, weight.contiguous(), x_grad.view(-1, width))
    if weight_wanted:
        _product(grad, rows, weight_grad, left_transposed=True, left_sums=sums if bias_dtype else None)
    elif bias_dtype:
        torch.sum(grad, 0, dtype=torch.float32, out=sums)
    return x_grad, weight_grad, sums.to(bias_dtype or sums.dtype)


def _product(
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
    workspace = torch.empty(_cpu.product_workspace(columns, depth), dtype=torch.bfloat16)
    _cpu.amx_product(
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
