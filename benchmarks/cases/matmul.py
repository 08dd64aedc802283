"""Cases of the linear layer."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from bclip_fast import ops
from bclip_fast.ops import matmul

from .case import DEVICE, Case, Contender, Inputs, ours, with_gradients


def linear_case(rows: int, width: int, columns: int) -> Case:
    """Return a linear layer as under autocast: a bfloat16 input, float32 weight and bias."""

    def make_inputs() -> Inputs:
        generator = torch.Generator().manual_seed(0)
        x, weight = torch.randn(rows, width, generator=generator), torch.randn(columns, width, generator=generator)
        bias = torch.randn(columns, generator=generator)
        # The contenders multiply the rounded weight, so the truth has to use it too.
        masters = weight.to(DEVICE, torch.bfloat16).float(), bias.to(DEVICE, torch.bfloat16).float()
        return [x.to(DEVICE, torch.bfloat16).requires_grad_(), *(master.requires_grad_() for master in masters)]

    def autocast(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            return F.linear(x, weight, bias)

    def run(backend: str) -> Contender:
        return with_gradients(functools.partial(ops.linear, backend=backend))

    tiny = torch.zeros(1, 1, dtype=torch.bfloat16, device=DEVICE)
    return Case(
        operator="affine",  # the name in recorded rows
        name=f"linear-{rows}x{width}-{columns}",
        make_inputs=make_inputs,
        truth=run("reference"),
        contenders={**ours(matmul.LIMITS, run, tiny, tiny), "torch autocast": lambda: with_gradients(autocast)},
        flops=6 * rows * width * columns,
        bytes=2 * 2 * rows * (width + columns) + 3 * 4 * columns * (width + 1),
        dtype=torch.bfloat16,
    )
