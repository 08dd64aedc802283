"""The softmax losses but distillation: ClipLoss and CoCaLoss."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..ops.contrastive import (
    LIMITS,
    as_scalar,
    check_features,
    clip_loss,
    default_chunk_size,
)
from ..ops.contrastive.terms import accumulation_dtype, pair_losses, positive_gradient, positive_logits
from ..ops.dispatch import choose, kernels
from .ranks import GatherRows, RankedLoss, Ranks, SumOverRanks, check_rows, one_dtype


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
        backend: "auto" or one of `ops.BACKENDS`.
        label_smoothing: as of `F.cross_entropy`, in both directions: a closed form that costs O(B * D).
    """

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
        backend: str = "auto",
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(cache_labels, rank, world_size, process_group, chunk_size, backend)
        if use_horovod:
            raise ValueError("use_horovod=True: the losses communicate through torch.distributed only")
        if not 0.0 <= label_smoothing <= 1.0:
            raise ValueError(f"label_smoothing must be within 0 and 1, got {label_smoothing}")
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.use_horovod = use_horovod
        self.label_smoothing = label_smoothing

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
        ranks = self._ranks()
        images, texts = image_features, text_features
        if ranks.size > 1:
            sizes = ranks.batch_sizes(image_features, text_features)
            images = GatherRows.apply(image_features, ranks, sizes, "image features")
            texts = GatherRows.apply(text_features, ranks, sizes, "text features")
        own = (image_features, text_features) if self.local_loss else (images, texts)
        per_image, per_text = logit_scale * own[0] @ texts.T, logit_scale * own[1] @ images.T
        return (per_image, per_text) if logit_bias is None else (per_image + logit_bias, per_text + logit_bias)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of (b, D) features of this rank; `{"contrastive_loss": loss}` with `output_dict`.

        Autocast is off inside: half-precision features are read as they are and summed in float32.

        Raises:
            ValueError: shapes, dtypes or a world_size that don't fit; the message names them.
            CollectiveError: another rank is lost or didn't answer in time.
        """
        loss = self._clip_loss(image_features, text_features, logit_scale, logit_bias)
        return {"contrastive_loss": loss} if output_dict else loss

    def _clip_loss(
        self, image: Tensor, text: Tensor, logit_scale: Tensor | float, logit_bias: Tensor | float | None = None
    ) -> Tensor:
        ranks = self._ranks()
        image, text = one_dtype(image, text)
        with torch.autocast(image.device.type, enabled=False):
            if ranks.size == 1:
                loss = clip_loss(image, text, logit_scale, logit_bias, chunk_size=self.chunk_size, backend=self.backend)
            else:
                check_features(image, text)
                check_rows(image, text)
                scale = as_scalar(logit_scale, image)
                backend = choose("clip_loss", LIMITS, self.backend, image, text)
                loss = _GlobalClipLoss.apply(image, text, scale, ranks, self.chunk_size, backend)
                if logit_bias is not None:
                    loss = loss + 0.0 * as_scalar(logit_bias, image)
            return self._smoothed(loss, image, text, logit_scale, ranks)

    def _smoothed(self, loss: Tensor, image: Tensor, text: Tensor, logit_scale: Tensor | float, ranks: Ranks) -> Tensor:
        """Adds label smoothing e: e * (mean of the positive logits - mean of all logits), in each direction."""
        if self.label_smoothing == 0.0:
            return loss
        dtype = accumulation_dtype(image)
        image, text = image.to(dtype), text.to(dtype)
        # The mean over all pairs is the product of the means, so that vectors of D numbers say all about S.
        sums = torch.cat([image.sum(0), text.sum(0), (image * text).sum()[None], image.new_full((1,), len(image))])
        width = image.shape[1]
        images, texts, positives, size = SumOverRanks.apply(sums, ranks).split([width, width, 1, 1])
        gap = positives.squeeze(0) / size.squeeze(0) - (images / size) @ (texts / size)
        return loss + self.label_smoothing * as_scalar(logit_scale, image) * gap


class CoCaLoss(ClipLoss):
    """open_clip's CoCaLoss: the contrastive loss of the global batch and the captions' cross-entropy of this rank.

    Args:
        caption_loss_weight, clip_loss_weight: factors of the two.
        pad_id: the label that counts for nothing.
        others: those of `ClipLoss`.
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
        *,
        process_group: dist.ProcessGroup | None = None,
        chunk_size: int | None = None,
        backend: str = "auto",
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(
            local_loss,
            gather_with_grad,
            cache_labels,
            rank,
            world_size,
            use_horovod,
            process_group=process_group,
            chunk_size=chunk_size,
            backend=backend,
            label_smoothing=label_smoothing,
        )
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
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        """(contrastive, caption) loss of (b, D) features, (b, L, V) logits and (b, L) labels.

        `{"contrastive_loss": ..., "caption_loss": ...}` with `output_dict`.
        """
        if self.clip_loss_weight:
            contrastive = self.clip_loss_weight * self._clip_loss(image_features, text_features, logit_scale)
        else:
            contrastive = torch.tensor(0, device=logits.device)
        caption = self.caption_loss_weight * self.caption_loss(logits.permute(0, 2, 1), labels)
        if output_dict:
            return {"contrastive_loss": contrastive, "caption_loss": caption}
        return contrastive, caption


class _GlobalClipLoss(torch.autograd.Function):
    """b local images against the B texts of all ranks; column sums are merged by an O(B) reduction."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        ranks: Ranks,
        chunk_size: int | None,
        backend: str,
    ) -> Tensor:
        sizes = ranks.batch_sizes(image, text)
        first = sum(sizes[: ranks.rank])
        texts = ranks.gather(text, sizes, "text features")
        chunk_size = chunk_size or default_chunk_size(len(image), len(texts), image.device)
        rows, columns = kernels("contrastive", backend).forward(image, texts, scale, first, chunk_size)
        positive = positive_logits(image, text, scale)
        columns = ranks.merge_lse(columns, "column sums")
        own = columns[first : first + len(text)]
        total = ranks.sum(pair_losses(rows, own, positive).sum(), "the loss")
        # Every rank needs every column's full sum, so the positives travel too: O(B) numbers.
        positives = ranks.gather(positive[:, None], sizes, "positive logits")[:, 0]
        columns_lse = torch.logaddexp(columns, positives)
        ctx.save_for_backward(image, texts, scale, rows, own, positive, columns_lse)
        ctx.ranks, ctx.chunk_size, ctx.backend, ctx.sizes, ctx.first = ranks, chunk_size, backend, sizes, first
        return (total / (2 * len(texts))).to(scale.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        image, texts, scale, rows, own, positive, columns_lse = ctx.saved_tensors
        # Data-parallel engines average over ranks; the factor turns that average into the sum that the chain rule asks.
        weight = grad * ctx.ranks.size / (2 * len(texts))
        rows_lse = torch.logaddexp(rows, positive)
        positive_grad = (weight * positive_gradient(rows, own, positive)).to(scale.dtype)
        image_grad, texts_grad, scale_grad = kernels("contrastive", ctx.backend).backward(
            image, texts, scale, ctx.first, rows_lse, columns_lse, weight, positive_grad, ctx.chunk_size, image.dtype
        )
        # A locked text tower (LiT) spares the way back; it is locked on all ranks or on none.
        text_grad = ctx.ranks.reduce(texts_grad, ctx.sizes, "text gradients") if ctx.needs_input_grad[1] else None
        return image_grad, text_grad, scale_grad, None, None, None
