"""Differentiable collectives: gathered rows, sums over ranks, and the definitions' merged columns.

Each backward pass is a collective too, and differentiable, so derivatives of any order are right. All ranks must take
the same derivatives in the same order.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .collectives import Ranks


class _GatherRows(torch.autograd.Function):
    """`Ranks.gather`. Its backward sums the gradients of all ranks and returns each row's to the rank of that row."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, ranks: Ranks, sizes: list[int], name: str) -> Tensor:
        ctx.ranks, ctx.sizes, ctx.name = ranks, sizes, name
        return ranks.gather(rows, sizes, name)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _ReduceRows.apply(grad, ctx.ranks, ctx.sizes, f"gradients of {ctx.name}"), None, None, None


class _ReduceRows(torch.autograd.Function):
    """`Ranks.reduce`, the adjoint of `_GatherRows`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, ranks: Ranks, sizes: list[int], name: str) -> Tensor:
        ctx.ranks, ctx.sizes, ctx.name = ranks, sizes, name
        return ranks.reduce(rows.contiguous(), sizes, name)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _GatherRows.apply(grad.contiguous(), ctx.ranks, ctx.sizes, f"gradients of {ctx.name}"), None, None, None


class _SumOverRanks(torch.autograd.Function):
    """The sum of a tensor over ranks. With `alike`, every rank computes the same loss from it, and nothing travels."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, ranks: Ranks, alike: bool) -> Tensor:
        ctx.ranks, ctx.alike = ranks, alike
        return ranks.sum(value.clone(), "feature sums")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Data-parallel engines average over ranks, as in _GlobalClipLoss.
        summed = grad * ctx.ranks.size if ctx.alike else _SumOverRanks.apply(grad, ctx.ranks, False)
        return summed, None, None


def gather_rows(rows: Tensor, ranks: Ranks, sizes: list[int], name: str) -> Tensor:
    """`Ranks.gather`, differentiable into the rows of every rank."""
    return rows if ranks.size == 1 else _GatherRows.apply(rows, ranks, sizes, name)


def sum_over_ranks(ranks: Ranks, *values: Tensor, alike: bool = False) -> list[Tensor]:
    """Sum each of several tensors over ranks, in one differentiable all-reduce.

    Args:
        alike: whether every rank's gradient of the sums is the same, and no second derivative is taken. The backward
            pass then needs no all-reduce.
    """
    if ranks.size == 1:
        return list(values)
    total = _SumOverRanks.apply(torch.cat([value.reshape(-1) for value in values]), ranks, alike)
    parts = total.split([value.numel() for value in values])
    return [part.view(value.shape) for part, value in zip(parts, values, strict=True)]


def merge_lse(ranks: Ranks, lse: Tensor) -> Tensor:
    """`Ranks.merge_lse`, differentiable. Every column must have a term on one rank."""
    if ranks.size == 1:
        return lse
    highest = ranks.sum(lse.detach().clone(), "column sums (their maxima)", dist.ReduceOp.MAX)
    return highest + sum_over_ranks(ranks, (lse - highest).exp())[0].log()
