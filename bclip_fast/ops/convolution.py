"""bfloat16 convolutions from float32 products, for CPUs without bfloat16 instructions.

On such a CPU, torch's bfloat16 convolution is 5 to 20 times slower than its float32 convolution. The backward pass
keeps the bfloat16 input, so a step takes no more memory than on a CPU with such instructions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .derivatives import transformed
from .dispatch import is_exporting
from .processor import lacks_bfloat16


def conv2d(x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
    """`F.conv2d` without a bias: (B, C, H, W) and (N, C, h, w) -> (B, N, H', W') in x's dtype, or in autocast's.

    A CPU without bfloat16 instructions multiplies bfloat16 x in float32 by the unrounded weight, and rounds the result.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(kind))
    if x.dtype == torch.bfloat16 and lacks_bfloat16(x.device) and not is_exporting():
        if transformed((x, weight)):
            return F.conv2d(x.float(), weight.float(), None, stride, padding).to(x.dtype)
        return _Convolution.apply(x, weight, stride, padding)
    return F.conv2d(x, weight, None, stride, padding)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        with torch.autocast("cpu", enabled=False):
            return F.conv2d(x.float(), weight.float(), None, stride, padding).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        needs_grad = [*ctx.needs_input_grad[:2], False]
        x_grad, weight_grad, _ = torch.ops.aten.convolution_backward(
            grad.float(), x.float(), weight.float(), None, ctx.stride, ctx.padding, (1, 1), False, (0, 0), 1, needs_grad
        )
        return (
            x_grad.to(x.dtype) if needs_grad[0] else None,
            weight_grad.to(weight.dtype) if needs_grad[1] else None,
            None,
            None,
        )
