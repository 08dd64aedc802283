"""The softmax losses but distillation: ClipLoss and CoCaLoss."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..ops import linear
from ..ops.contrastive import LIMITS, clip_loss
from ..ops.contrastive.call import ContrastiveCall, SoftmaxGradient
from ..ops.contrastive.checks import (
    as_scalar,
    check_features,
    check_options,
    check_pairs,
    checked_groups,
    default_chunk_size,
    operand_dtype_of,
)
from ..ops.contrastive.limits import shape_class
from ..ops.contrastive.loss_terms import pair_losses, positive_gradient, positive_logits
from ..ops.custom_op import without_autocast
from ..ops.dispatch import choose, load_backend
from ..ops.dtypes import accumulation_dtype
from .ranks import Columns, GatherRows, RankedLoss, Ranks, SumOverRanks, gather_groups, one_dtype


class ClipLoss(RankedLoss):
    """open_clip's ClipLoss in O(B * D) memory, with the gradient of the global loss.

    Args:
        local_loss, gather_with_grad: open_clip's ways to gather. `forward` gives the loss and gradient of the global
            batch with each of the four combinations, which open_clip gives with gather_with_grad=True alone;
            `get_logits` and `get_ground_truth` have the shapes that local_loss asks for.
        cache_labels: whether `get_ground_truth` keeps its labels; `forward` needs none.
        rank, world_size: open_clip's; a process group that has others is a ValueError of `forward`.
        use_horovod: must be False.
        process_group: the ranks that share the batch; all of them unless given.
        chunk_size: rows of the similarity matrix held at a time; as in `ops.clip_loss` unless given.
        operand_dtype, deterministic, backend, hardness: as in `ops.clip_loss`.
        label_smoothing: as of `F.cross_entropy`, in both directions: a closed form that costs O(B * D). Not with
            hardness nor groups.
    """

    @staticmethod
    def _over_ranks(*arguments: Any) -> Any:
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
            raise ValueError("use_horovod=True: the losses communicate through torch.distributed only")
        if not 0.0 <= label_smoothing <= 1.0:
            raise ValueError(f"label_smoothing must be within 0 and 1, got {label_smoothing}")
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.use_horovod = use_horovod
        if label_smoothing and hardness:
            raise ValueError("label_smoothing with hardness isn't defined: weighted negatives are no probabilities")
        self.label_smoothing = label_smoothing
        self.hardness = hardness

    def get_ground_truth(self, device: torch.device, num_logits: int) -> Tensor:
        """open_clip's labels (num_logits,) of the logits that `get_logits` gives; `forward` doesn't use them."""
        if self.prev_num_logits == num_logits and device in self.labels:
            return self.labels[device]
        first = num_logits * self.rank if self.world_size > 1 and self.local_loss else 0
        labels = torch.arange(first, first + num_logits, device=device)
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

        For inspection: `forward` never builds them. Differentiable into the features of every rank.
        """
        ranks = self._ranks(image_features)
        images, texts = image_features, text_features
        if ranks.size > 1:
            sizes = ranks.batch_sizes(image_features, text_features)
            images = GatherRows.apply(image_features, ranks, sizes[0], "image features")
            texts = GatherRows.apply(text_features, ranks, sizes[1], "text features")
        own = (image_features, text_features) if self.local_loss else (images, texts)
        per_image, per_text = linear(logit_scale * own[0], texts), linear(logit_scale * own[1], images)
        return (per_image, per_text) if logit_bias is None else (per_image + logit_bias, per_text + logit_bias)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
        *,
        groups: Tensor | tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of (b, D) features of this rank; `{"contrastive_loss": loss}` with `output_dict`.

        Further rows of text are negatives of every rank's images. `groups` are ids as in `ops.clip_loss`, compared over
        all ranks. Under autocast float32 features are multiplied in half precision (`operand_dtype` overrides); all
        sums are float32, and gradients have the features' dtype.

        Raises:
            ValueError: shapes, dtypes or a world_size that don't fit; the message names them.
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
        groups: Tensor | tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if groups is not None and self.label_smoothing:
            raise ValueError("label_smoothing with groups isn't implemented: their targets are soft already")
        ranks = self._ranks(image)
        image, text = one_dtype(image, text)
        dtype = operand_dtype_of(image, self.operand_dtype)
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
                check_features(image, text)
                check_options(None, groups, self.hardness)
                ids = checked_groups(image, text, groups)
                if groups is None:
                    check_pairs(image, text)
                scale = as_scalar(logit_scale, image)
                inputs = image, text, dtype, self.deterministic
                backend = choose("clip_loss", LIMITS, self.backend, *inputs, dtype=dtype, shapes=shape_class(text))
                loss = self._over_ranks(image, text, scale, *ids, self.hardness, ranks, self.chunk_size, dtype, backend)
                if logit_bias is not None:
                    loss = loss + 0.0 * as_scalar(logit_bias, image)
            return self._smoothed(loss, image, text, logit_scale, ranks)

    def _smoothed(self, loss: Tensor, image: Tensor, text: Tensor, logit_scale: Tensor | float, ranks: Ranks) -> Tensor:
        """Adds label smoothing e: e * (mean of the positive logits - mean of all logits), in each direction."""
        if self.label_smoothing == 0.0:
            return loss
        dtype = accumulation_dtype(image)
        image, text = image.to(dtype), text.to(dtype)
        own = text[: len(image)]
        # The mean over all pairs is the product of the means, so that vectors of D numbers say all about S. An image is
        # smoothed over all texts, a text that has an image over all images.
        sizes = image.new_tensor([len(image), len(text)])
        sums = torch.cat([image.sum(0), text.sum(0), own.sum(0), (image * own).sum()[None], sizes])
        *sums, positives, num_images, num_texts = SumOverRanks.apply(sums, ranks).split([image.shape[1]] * 3 + [1] * 3)
        images, texts, owns = sums[0] / num_images, sums[1] / num_texts, sums[2] / num_images
        gap = (positives / num_images).squeeze(0) - images @ (texts + owns) / 2
        return loss + self.label_smoothing * as_scalar(logit_scale, image) * gap


class CoCaLoss(ClipLoss):
    """open_clip's CoCaLoss: the contrastive loss of the global batch and the captions' cross-entropy of this rank.

    Args:
        caption_loss_weight, clip_loss_weight: factors of the two.
        pad_id: the label that counts for nothing.
        others, extras: those of `ClipLoss`.
    """

    def __init__(
        self,
        caption_loss_weight: float,
        clip_loss_weight: float,
        pad_id: int = 0,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        **extras: Any,
    ) -> None:
        super().__init__(local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod, **extras)
        self.clip_loss_weight = clip_loss_weight
        self.caption_loss_weight = caption_loss_weight
        self.caption_loss = nn.CrossEntropyLoss(ignore_index=pad_id)

    def forward(  # type: ignore[override]
        self,
        image_features: Tensor,
        text_features: Tensor,
        logits: Tensor,
        labels: Tensor,
        logit_scale: Tensor | float,
        output_dict: bool = False,
        *,
        groups: Tensor | tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        """(contrastive, caption) loss of (b, D) features, (b, L, V) logits and (b, L) labels; groups as in ClipLoss.

        `{"contrastive_loss": ..., "caption_loss": ...}` with `output_dict`.
        """
        if self.clip_loss_weight:
            features = image_features, text_features
            contrastive = self.clip_loss_weight * self._clip_loss(*features, logit_scale, groups=groups)
        else:
            contrastive = torch.tensor(0, device=logits.device)
        caption = self.caption_loss_weight * self.caption_loss(logits.permute(0, 2, 1), labels)
        if output_dict:
            return {"contrastive_loss": contrastive, "caption_loss": caption}
        return contrastive, caption


class _GlobalClipLoss(torch.autograd.Function):
    """b local images against the B texts of all ranks; column sums are merged by an O(B) reduction.

    The tile of the local texts, which holds all positives, is computed while features or their gradients travel.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        image_ids: Tensor | None,
        text_ids: Tensor | None,
        hardness: float,
        ranks: Ranks,
        chunk_size: int | None,
        dtype: torch.dtype,
        backend: str,
    ) -> Tensor:
        ctx.result, image, text = image.dtype, image.to(dtype), text.to(dtype)
        image_sizes, text_sizes = ranks.batch_sizes(image, text)
        at = Columns(ranks.rank, text_sizes)
        travelling = ranks.start_gather(text, text_sizes, "text features")
        chunk_size = chunk_size or default_chunk_size(len(image), at.total, image.device)
        forward = load_backend("contrastive", backend).forward
        sharpness, positive_offset = scale + hardness if hardness else scale, 0 if image_ids is None else None
        rows, own_columns = forward(ContrastiveCall(image, text, sharpness, positive_offset, chunk_size))
        texts = travelling()
        columns = own_columns.new_empty(at.total)
        columns[at.own] = own_columns
        for part in at.remote:
            others, columns[part] = forward(ContrastiveCall(image, texts[part], sharpness, None, chunk_size))
            rows = torch.logaddexp(rows, others)
        columns = ranks.merge_lse(columns, "column sums")
        groups = positive_grad = None
        if image_ids is not None and text_ids is not None:
            groups = gather_groups(ranks, image_ids, text_ids, image_sizes, text_sizes)
            loss = (groups.row_weights * rows).sum() + (groups.column_weights[at.own] * columns[at.own]).sum()
            loss = loss - groups.positives(image, texts, scale)
            rows, columns = groups.raised(rows, columns)
            ctx.weight = groups.weight
        else:
            positive, own = positive_logits(image, text[: len(image)], scale), columns[at.own][: len(image)]
            ctx.weight = 1 / (2 * sum(image_sizes))
            loss = ctx.weight * pair_losses(rows, own, positive).sum()
            positive_grad = positive_gradient(rows, own, positive)
            rows = torch.logaddexp(rows, positive)
            # Every rank needs every column's full sum: O(B) numbers travel.
            full = columns.new_full((len(text),), torch.inf)
            torch.logaddexp(own, positive, out=full[: len(image)])
            columns = ranks.gather(full[:, None], text_sizes, "column log-sum-exps")[:, 0]
        ctx.save_for_backward(image, texts, scale, rows, columns, positive_grad)
        ctx.ranks, ctx.chunk_size, ctx.backend, ctx.hardness = ranks, chunk_size, backend, hardness
        ctx.sizes, ctx.at, ctx.groups = text_sizes, at, groups
        return ranks.sum(loss, "the loss").to(scale.dtype)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        image, texts, scale, rows_lse, columns_lse, positive_grad = ctx.saved_tensors
        at, wide = ctx.at, accumulation_dtype(image)
        # Data-parallel engines average over ranks; the factor turns that average into the sum that the chain rule asks.
        weight = grad * ctx.ranks.size * ctx.weight
        backward = load_backend("contrastive", ctx.backend).backward

        def tile(part: slice, positive_offset: int | None, positive_grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            groups = None if ctx.groups is None else ctx.groups.among(part)
            call = ContrastiveCall(image, texts[part], scale, positive_offset, ctx.chunk_size, groups=groups)
            upstream = SoftmaxGradient(rows_lse, columns_lse[part], weight, positive_grad, ctx.hardness)
            return backward(call, upstream, wide)

        # A locked text tower (LiT) spares the way back; it is locked on all ranks or on none.
        with_text = ctx.needs_input_grad[1]
        texts_grad = torch.zeros(texts.shape if with_text else 0, dtype=ctx.result, device=texts.device)
        parts = []
        for part in at.remote:
            image_grad, text_grad, scale_grad = tile(part, None, rows_lse)
            parts.append((image_grad, scale_grad))
            if with_text:
                texts_grad[part] = text_grad
        travelling = ctx.ranks.start_reduce(texts_grad, ctx.sizes, "text gradients") if with_text else None
        if ctx.groups is None:
            image_grad, text_grad, scale_grad = tile(at.own, 0, (weight * positive_grad).to(wide))
        else:
            image_grad, text_grad, scale_grad = tile(at.own, None, rows_lse)
        for remote_image, remote_scale in parts:
            image_grad += remote_image
            scale_grad += remote_scale
        total = text_grad.add_(travelling()).to(ctx.result) if travelling else None
        return image_grad.to(ctx.result), total, scale_grad, *[None] * 7
