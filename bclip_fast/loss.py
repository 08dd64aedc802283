"""Losses over all ranks, with open_clip's constructors."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .ops.contrastive import (
    LIMITS,
    as_scalar,
    check_features,
    clip_loss,
    default_chunk_size,
    positive_gradient,
)
from .ops.dispatch import choose, kernels

__all__ = ["ClipLoss"]


class ClipLoss(nn.Module):
    """open_clip's ClipLoss in O(B * D) memory, with the gradient of the global loss.

    Every rank returns the mean loss over the global batch. After data-parallel averaging (DDP, DeepSpeed) the
    gradients of the towers, of logit_scale and of logit_bias are those of that global loss, whatever the flags:
    `local_loss` and `gather_with_grad` are taken for compatibility and change nothing. (In open_clip only
    gather_with_grad=True gives the global gradient; see reference in README.) Only the text features travel; ranks
    may hold batches of different sizes.

    Args:
        local_loss, gather_with_grad, cache_labels: open_clip's; without effect here.
        rank, world_size: open_clip's; checked against the process group on the first call.
        process_group: the ranks that share the batch; all of them unless given.
        chunk_size: rows of the similarity matrix held at a time; as in `ops.clip_loss` unless given.
        backend: "auto" or one of `ops.BACKENDS`.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        *,
        process_group: dist.ProcessGroup | None = None,
        chunk_size: int | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.process_group = process_group
        self.chunk_size = chunk_size
        self.backend = backend

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of (b, D) features of this rank; `{"contrastive_loss": loss}` with `output_dict`.

        Raises:
            ValueError: shapes, dtypes or a world_size that don't fit; the message names them.
        """
        if self.world_size == 1:
            loss = clip_loss(
                image_features,
                text_features,
                logit_scale,
                logit_bias,
                chunk_size=self.chunk_size,
                backend=self.backend,
            )
        else:
            loss = self._over_ranks(image_features, text_features, logit_scale, logit_bias)
        return {"contrastive_loss": loss} if output_dict else loss

    def _over_ranks(
        self, image: Tensor, text: Tensor, logit_scale: Tensor | float, logit_bias: Tensor | float | None
    ) -> Tensor:
        group_size = dist.get_world_size(self.process_group) if dist.is_initialized() else 1
        if group_size != self.world_size:
            raise ValueError(f"ClipLoss has world_size={self.world_size}, but the process group has {group_size} ranks")
        check_features(image, text)
        if len(image) != len(text):
            raise ValueError(f"image and text must have as many rows, got {len(image)} and {len(text)}")
        scale = as_scalar(logit_scale, image)
        bias = None if logit_bias is None else as_scalar(logit_bias, image)
        backend = choose("clip_loss", LIMITS, self.backend, image, text)
        return _GlobalClipLoss.apply(image, text, scale, bias, self.process_group, self.chunk_size, backend)


class _GlobalClipLoss(torch.autograd.Function):
    """b local images against the B texts of all ranks; column sums are merged by an O(B) reduction."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        group: dist.ProcessGroup | None,
        chunk_size: int | None,
        backend: str,
    ) -> Tensor:
        sizes = _gather_sizes(len(text), text.device, group)
        first = sum(sizes[: dist.get_rank(group)])
        texts = _gather_rows(text, sizes, group)
        chunk_size = chunk_size or default_chunk_size(len(image), len(texts), image.device)
        rows, columns, positive = kernels("contrastive", backend).forward(image, texts, scale, bias, first, chunk_size)
        columns = _merge_lse(columns, group)
        own = columns[first : first + len(text)]
        total = (F.softplus(rows - positive) + F.softplus(own - positive)).sum()
        dist.all_reduce(total, group=group)
        # Every rank needs every column's full sum, so the positives travel too: O(B) numbers.
        positives = _gather_rows(positive[:, None], sizes, group)[:, 0]
        columns_lse = torch.logaddexp(columns, positives)
        ctx.save_for_backward(image, texts, scale, bias, rows, own, positive, columns_lse)
        ctx.group, ctx.chunk_size, ctx.backend, ctx.sizes, ctx.first = group, chunk_size, backend, sizes, first
        return total / (2 * len(texts))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        image, texts, scale, bias, rows, own, positive, columns_lse = ctx.saved_tensors
        # Data-parallel engines average over ranks; the factor turns that average into the sum that the chain rule asks.
        weight = grad * len(ctx.sizes) / (2 * len(texts))
        rows_lse = torch.logaddexp(rows, positive)
        positive_grad = weight * positive_gradient(rows, own, positive)
        image_grad, texts_grad, scale_grad, bias_grad = kernels("contrastive", ctx.backend).backward(
            image, texts, scale, bias, ctx.first, rows_lse, columns_lse, weight, positive_grad, ctx.chunk_size
        )
        text_grad = _reduce_rows(texts_grad, ctx.sizes, ctx.group)
        return image_grad, text_grad, scale_grad, None if bias is None else bias_grad, None, None, None


def _gather_sizes(size: int, device: torch.device, group: dist.ProcessGroup | None) -> list[int]:
    sizes = torch.empty(dist.get_world_size(group), dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(sizes, torch.tensor([size], device=device), group=group)
    return sizes.tolist()


def _gather_rows(rows: Tensor, sizes: list[int], group: dist.ProcessGroup | None) -> Tensor:
    """All ranks' rows, one under the other; shorter parts are padded on the way, as collectives want equal shapes."""
    padded = rows.new_zeros(max(sizes), rows.shape[1])
    padded[: len(rows)] = rows
    gathered = rows.new_empty(len(sizes) * max(sizes), rows.shape[1])
    dist.all_gather_into_tensor(gathered, padded, group=group)
    parts = gathered.view(len(sizes), max(sizes), -1)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def _reduce_rows(rows: Tensor, sizes: list[int], group: dist.ProcessGroup | None) -> Tensor:
    """This rank's rows of the sum over ranks: the reverse of `_gather_rows`."""
    padded = rows.new_zeros(len(sizes), max(sizes), rows.shape[1])
    for part, own in zip(padded, rows.split(sizes), strict=True):
        part[: len(own)] = own
    reduced = rows.new_empty(max(sizes), rows.shape[1])
    dist.reduce_scatter_tensor(reduced, padded.flatten(0, 1), group=group)
    return reduced[: sizes[dist.get_rank(group)]]


def _merge_lse(lse: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    highest = lse.clone()
    dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
    highest.clamp_min_(torch.finfo(lse.dtype).min)  # a column without negatives anywhere: -inf - -inf would be NaN
    sums = (lse - highest).exp()
    dist.all_reduce(sums, group=group)
    return highest + sums.log()
