"""ClipLoss, the softmax loss of CLIP. The losses with a second term are in coca.py and distill.py."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bclip_fast.ops.contrastive import clip_loss
from bclip_fast.ops.contrastive.call import ContrastiveCall, SoftmaxGradient
from bclip_fast.ops.contrastive.checks import as_scalar, check_options, default_chunk_size
from bclip_fast.ops.contrastive.definition import operand, softmax_terms
from bclip_fast.ops.contrastive.loss_terms import pair_losses, positive_gradient, positive_logits
from bclip_fast.ops.custom_op import without_autocast
from bclip_fast.ops.derivatives import Definition, first_by_kernel
from bclip_fast.ops.dispatch import load_backend
from bclip_fast.ops.dtypes import accumulation_dtype

from .collectives import (
    ColumnRanges,
    DistributedLoss,
    GroupIds,
    Ranks,
    checked_smoothing,
    gather_groups,
    num_rows,
)
from .sums import gather_rows, merge_lse, sum_over_ranks


class ClipLoss(DistributedLoss):
    """open_clip's ClipLoss in O(B * D) memory, with the gradient of the global loss.

    Args:
        local_loss, gather_with_grad: open_clip's ways to gather. All four combinations give the loss and the
            gradient of the global batch. In open_clip, only gather_with_grad=True does.
            `get_logits` and `get_ground_truth` return the shapes that local_loss selects.
        cache_labels: whether `get_ground_truth` keeps its labels. `forward` doesn't need them.
        rank, world_size: this process's rank and the number of ranks, where 0 and 1 mean a single process. `forward`
            raises ValueError if the process group disagrees.
        use_horovod: must be False.
        process_group: the ranks that share the batch. Default: all ranks.
        chunk_size: number of rows of the similarity matrix held at a time. Default: that of `ops.clip_loss`.
        operand_dtype, deterministic, backend, hardness: as in `ops.clip_loss`.
        label_smoothing: as in `F.cross_entropy`, in both directions. A closed form computes it in O(B * D). It can't
            be combined with hardness or groups.
    """

    @staticmethod
    def _global_loss(*arguments: Any) -> Any:
        return _GlobalClipLoss.apply(*arguments)

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        process_group: dist.ProcessGroup | None = None,
        chunk_size: int | None = None,
        operand_dtype: torch.dtype | None = None,
        deterministic: bool = False,
        backend: str = "auto",
        label_smoothing: float = 0.0,
        hardness: float = 0.0,
    ) -> None:
        super().__init__(
            cache_labels, rank, world_size, process_group, chunk_size, operand_dtype, deterministic, backend
        )
        if use_horovod:
            raise ValueError("use_horovod=True isn't supported: the losses communicate through torch.distributed")
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.use_horovod = use_horovod
        self.label_smoothing = checked_smoothing(label_smoothing)
        if label_smoothing and hardness:
            raise ValueError("label_smoothing with hardness isn't defined: weighted negatives aren't probabilities")
        self.hardness = hardness

    def get_ground_truth(self, device: torch.device, num_logits: int) -> Tensor:
        """open_clip's labels (num_logits,) for the logits of `get_logits`. `forward` doesn't use them."""
        if self.prev_num_logits == num_logits and device in self.labels:
            return self.labels[device]
        start = num_logits * self.rank if self.world_size > 1 and self.local_loss else 0
        labels = torch.arange(start, start + num_logits, device=device)
        if self.cache_labels:
            self.labels[device] = labels
            self.prev_num_logits = num_logits
        return labels

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """open_clip's dense logits by image and by text: (b, B) each with local_loss, else (B, B).

        They serve inspection: `forward` never builds them. Gradients reach the features of every rank.
        """
        ranks = self._checked_ranks(image_features)
        images, texts = image_features, text_features
        if ranks.size > 1:
            image_sizes, text_sizes = ranks.batch_sizes(image_features, text_features)
            images = gather_rows(image_features, ranks, image_sizes, "image features")
            texts = gather_rows(text_features, ranks, text_sizes, "text features")
        image_rows, text_rows = (image_features, text_features) if self.local_loss else (images, texts)
        per_image = self._product(logit_scale * image_rows, texts)
        per_text = self._product(logit_scale * text_rows, images)
        return (per_image, per_text) if logit_bias is None else (per_image + logit_bias, per_text + logit_bias)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
        *,
        groups: GroupIds | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """Return the global loss from this rank's features (b, D), or `{"contrastive_loss": loss}` with `output_dict`.

        Texts beyond the b-th are negatives for the images of every rank. `groups` are ids as in `ops.clip_loss`,
        compared across all ranks. Under autocast, float32 features are multiplied in half precision unless
        `operand_dtype` overrides it. All sums are in float32, and gradients have the features' dtype.

        Raises:
            ValueError: shapes, dtypes or a world_size that don't fit. The message names them.
            CollectiveError: another rank is lost or didn't answer in time.
        """
        loss = self._clip_loss(image_features, text_features, logit_scale, logit_bias, groups)
        return {"contrastive_loss": loss} if output_dict else loss

    def _clip_loss(
        self,
        image: Tensor,
        text: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        groups: GroupIds | None = None,
    ) -> Tensor:
        if groups is not None and self.label_smoothing:
            raise ValueError("label_smoothing with groups isn't implemented: the targets of groups are soft already")
        ranks, image, text, dtype = self._prepare(image, text)
        backend = self.backend
        with torch.autocast(image.device.type, enabled=False):
            if ranks.size == 1:
                loss = clip_loss(
                    image,
                    text,
                    logit_scale,
                    logit_bias,
                    groups=groups,
                    hardness=self.hardness,
                    chunk_size=self.chunk_size,
                    operand_dtype=dtype,
                    deterministic=self.deterministic,
                    backend=self.backend,
                )
            else:
                ids = self._checked_ids(image, text, groups)
                check_options(None, groups, self.hardness)
                scale = as_scalar(logit_scale, image)
                backend = self._choose_backend("clip_loss", image, text, dtype)
                loss = self._global_loss(
                    image, text, scale, *ids, self.hardness, ranks, self.chunk_size, dtype, backend
                )
                if logit_bias is not None:
                    loss = loss + 0.0 * as_scalar(logit_bias, image)
            return self._smoothed(loss, image, text, logit_scale, ranks, alike=backend != "reference")

    def _smoothed(
        self, loss: Tensor, image: Tensor, text: Tensor, logit_scale: Tensor | float, ranks: Ranks, *, alike: bool
    ) -> Tensor:
        """Add label smoothing e: e * (mean of the positive logits - mean of all logits), in each direction."""
        if self.label_smoothing == 0.0:
            return loss
        dtype = accumulation_dtype(image)
        image, text = image.to(dtype), text.to(dtype)
        paired = text[: len(image)]
        # The mean over all pairs is the product of the means, so sums of D numbers replace the similarity matrix.
        # Images are smoothed over all texts. Texts that have an image are smoothed over all images.
        sums = image.sum(0), text.sum(0), paired.sum(0), (image * paired).sum(), num_rows(image, text)
        image_sum, text_sum, paired_sum, positive_sum, sizes = sum_over_ranks(ranks, *sums, alike=alike)
        num_images, num_texts = sizes.unbind()
        image_mean, text_means = image_sum / num_images, text_sum / num_texts + paired_sum / num_images
        gap = positive_sum / num_images - image_mean @ text_means / 2
        return loss + self.label_smoothing * as_scalar(logit_scale, image) * gap


@without_autocast
def _definition(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    hardness: float,
    ranks: Ranks,
    _: int | None,
    dtype: torch.dtype,
    __: str,
) -> Tensor:
    """The loss of _GlobalClipLoss in plain torch, on the whole matrix (b, B)."""
    image_sizes, text_sizes = ranks.batch_sizes(image, text)
    texts = gather_rows(operand(text, dtype), ranks, text_sizes, "text features")
    groups = None
    if image_ids is not None and text_ids is not None:
        groups = gather_groups(ranks, image_ids, text_ids, image_sizes, text_sizes)
    positives, weight = ColumnRanges(ranks.rank, text_sizes).local, 1 / (2 * sum(image_sizes))
    terms = operand(image, dtype), texts, scale, positives, weight, hardness, groups, partial(merge_lse, ranks)
    return sum_over_ranks(ranks, softmax_terms(*terms))[0]


class _GlobalClipLoss(torch.autograd.Function):
    """b local images against the B texts of all ranks. An O(B) reduction merges the column sums.

    The tile of the local texts holds all positives. It is computed while features or their gradients travel. Another
    tile holds the texts of all other ranks.
    """

    @staticmethod
    def forward(
        ctx: Any,
        image_input: Tensor,
        text_input: Tensor,
        scale: Tensor,
        image_ids: Tensor | None,
        text_ids: Tensor | None,
        hardness: float,
        ranks: Ranks,
        chunk_size: int | None,
        dtype: torch.dtype,
        backend: str,
    ) -> Tensor:
        image, text = image_input.to(dtype), text_input.to(dtype)
        image_sizes, text_sizes = ranks.batch_sizes(image, text)
        ranges = ColumnRanges(ranks.rank, text_sizes)
        wait_for_texts = ranks.start_gather(text, text_sizes, "text features")
        chunk_size = chunk_size or default_chunk_size(len(image), ranges.total, image.device)
        forward = load_backend("contrastive", backend).forward
        sharpness = scale + hardness if hardness else scale
        positive_offset = 0 if image_ids is None else None
        rows, local_columns = forward(ContrastiveCall(image, text, sharpness, positive_offset, chunk_size))
        texts = wait_for_texts()
        columns = local_columns.new_empty(ranges.total)
        columns[ranges.local] = local_columns
        if ranges.remote:
            remote = ContrastiveCall(image, ranges.remote_of(texts), sharpness, None, chunk_size)
            remote_rows, remote_columns = forward(remote)
            ranges.put_remote(remote_columns, columns)
            rows = torch.logaddexp(rows, remote_rows)
        columns = ranks.merge_lse(columns, "column sums")
        groups = positive_grad = None
        if image_ids is not None and text_ids is not None:
            groups = gather_groups(ranks, image_ids, text_ids, image_sizes, text_sizes)
            lse, sizes = torch.cat([rows, columns]), [len(image), ranges.total]
            of_rows, of_columns = (groups.weights * lse).split(sizes)
            loss = of_rows.sum() + of_columns[ranges.local].sum() - groups.positives(image, texts, scale)
            rows, columns = groups.raised(lse).split(sizes)
            ctx.weight = groups.weight
        else:
            positive = positive_logits(image, text[: len(image)], scale)
            paired_columns = columns[ranges.local][: len(image)]
            ctx.weight = 1 / (2 * sum(image_sizes))
            loss = ctx.weight * pair_losses(rows, paired_columns, positive).sum()
            positive_grad = positive_gradient(rows, paired_columns, positive)
            rows = torch.logaddexp(rows, positive)
            # Every rank needs every column's full sum: O(B) numbers travel.
            full = columns.new_full((len(text),), torch.inf)
            torch.logaddexp(paired_columns, positive, out=full[: len(image)])
            columns = ranks.gather(full[:, None], text_sizes, "column log-sum-exps")[:, 0]
        inputs = image_input, text_input, image_ids, text_ids
        ctx.save_for_backward(image, texts, scale, rows, columns, positive_grad, *inputs)
        ctx.dtype = dtype
        ctx.ranks, ctx.chunk_size, ctx.backend, ctx.hardness = ranks, chunk_size, backend, hardness
        ctx.text_sizes, ctx.ranges, ctx.groups = text_sizes, ranges, None if groups is None else groups.tile
        return ranks.sum(loss, "the loss").to(scale.dtype)

    @staticmethod
    def definition_of(ctx: Any) -> Definition:
        """The definition of the call in plain torch."""
        _, _, scale, *_, image, text, image_ids, text_ids = ctx.saved_tensors
        options = ctx.hardness, ctx.ranks, ctx.chunk_size, ctx.dtype, ctx.backend
        function = _definition if ctx.backend == "reference" else None
        return Definition(ctx.ranks.loss, function, (image, text, scale, image_ids, text_ids, *options))

    @staticmethod
    @partial(first_by_kernel, definition_of)
    @without_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        image, texts, scale, rows_lse, columns_lse, positive_grad, image_input = ctx.saved_tensors[:7]
        ranges, wide, features = ctx.ranges, accumulation_dtype(image), image_input.dtype
        # Data-parallel engines average over ranks. The factor turns that average into the sum of the chain rule.
        weight = grad * ctx.ranks.size * ctx.weight
        backward = load_backend("contrastive", ctx.backend).backward

        def tile(parts: list[slice], positive_offset: int | None, positive_grad: Tensor) -> tuple[Tensor, ...]:
            is_local = parts == [ranges.local]
            text, sums = (
                tensor[ranges.local] if is_local else ranges.remote_of(tensor) for tensor in (texts, columns_lse)
            )
            groups = None if ctx.groups is None else ctx.groups.among(*parts)
            call = ContrastiveCall(image, text, scale, positive_offset, ctx.chunk_size, groups=groups)
            return backward(call, SoftmaxGradient(rows_lse, sums, weight, positive_grad, ctx.hardness), wide)

        # A locked text tower (LiT) needs no reduction of its gradients. It is locked on all ranks or on none.
        with_text = ctx.needs_input_grad[1]
        texts_grad = torch.zeros(texts.shape if with_text else 0, dtype=features, device=texts.device)
        remote_grads = None
        if ranges.remote:
            remote_grads = tile(ranges.remote, None, rows_lse)
            if with_text:
                ranges.put_remote(remote_grads[1], texts_grad)
        wait_for_grad = ctx.ranks.start_reduce(texts_grad, ctx.text_sizes, "text gradients") if with_text else None
        has_pairs = ctx.groups is None
        local = tile([ranges.local], 0 if has_pairs else None, positive_grad if has_pairs else rows_lse)
        image_grad, text_grad, scale_grad = local
        if remote_grads is not None:
            image_grad += remote_grads[0]
            scale_grad += remote_grads[2]
        summed_text_grad = text_grad.add_(wait_for_grad()).to(features) if wait_for_grad else None
        return image_grad.to(features), summed_text_grad, scale_grad, *[None] * 7
