"""Cases of the pointwise operators."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bclip_fast import ops
from bclip_fast.ops import pointwise

from .case import DEVICE, Case, Contender, Inputs, ours, with_gradients


def norm_case(rows: int, width: int, dropout_p: float) -> Case:
    """Return a residual sum with its norm as under autocast: a float32 residual, a bfloat16 branch and output."""

    def make_inputs() -> Inputs:
        generator = torch.Generator().manual_seed(0)
        stream, branch = torch.randn(2, rows, width, generator=generator).unbind(0)
        branch = branch.to(DEVICE, torch.bfloat16)
        # The upstream gradient is the output. With equal weights its gradient would be zero.
        weight, bias = torch.rand(width, generator=generator) + 0.5, torch.randn(width, generator=generator)
        return [stream.to(DEVICE).requires_grad_(), branch.requires_grad_(), weight.to(DEVICE), bias.to(DEVICE)]

    def run(backend: str) -> Contender:
        seed = 1 if dropout_p else None
        return with_gradients(
            lambda x, y, weight, bias: ops.add_norm(
                x, y, weight, bias, 1e-6, dropout_p=dropout_p, seed=seed, dtype=y.dtype, backend=backend
            )[0]
        )

    def eager(stream: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(stream + branch, (width,), weight, bias, 1e-6).to(branch.dtype)

    row = torch.zeros(1, width, device=DEVICE)
    return Case(
        operator="pointwise",
        name=f"add-norm-{rows}x{width}" + f"-dropout-{dropout_p}" * bool(dropout_p),
        make_inputs=make_inputs,
        truth=run("reference"),
        contenders={
            **ours(pointwise.LIMITS, run, row, row.bfloat16(), row[0], row[0]),
            **({} if dropout_p else {"torch": lambda: with_gradients(eager)}),
        },
        bytes=(4 + 2 + 4 + 2 + 2 + 4 + 4 + 2) * rows * width,
        dtype=torch.bfloat16,
        unit="row",
        num_units=rows,
    )
