"""SigLipLoss: every pair on its own."""

from __future__ import annotations

from operator import itemgetter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ops import linear
from ..ops.contrastive import LIMITS, siglip_loss
from ..ops.contrastive.call import ContrastiveCall
from ..ops.contrastive.checks import (
    as_scalar,
    check_features,
    check_pairs,
    checked_groups,
    default_chunk_size,
    operand_dtype_of,
)
from ..ops.contrastive.limits import shape_class
from ..ops.contrastive.loss_terms import siglip_gradient_dtype
from ..ops.custom_op import without_autocast
from ..ops.dispatch import choose, load_backend
from ..ops.dtypes import accumulation_dtype
from .ranks import Columns, RankedLoss, Ranks, SumOverRanks, gather_groups, one_dtype


class SigLipLoss(RankedLoss):
    """open_clip's SigLipLoss (Zhai et al. 2023, arXiv 2303.15343) in O(B * D) memory.

    The sum over all pairs of images and texts, divided by the number of images of all ranks. open_clip returns each
    rank's part, divided by its own images; with equal batches its mean over the ranks is what every rank returns here.

    Args:
        cache_labels: open_clip's; without effect, as there.
        rank, world_size, process_group, operand_dtype, deterministic, backend: those of `ClipLoss`.
        dist_impl: open_clip's way for texts to travel: bidir, shift, reduce or gather; all of them give one result,
            and here all of them gather once.
        chunk_size: rows of the similarity matrix held at a time; as in `ops.siglip_loss` with None or 0.
        label_smoothing: e makes the targets of all pairs 1 - e / 2 and e / 2: a closed form that
            costs O(B * D); not with groups.
    """

    @staticmethod
    def _over_ranks(*arguments: Any) -> Any:
        return _GlobalSigLipLoss.apply(*arguments)

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int | None = None,
        *,
        process_group: dist.ProcessGroup | None = None,
        label_smoothing: float = 0.0,
        operand_dtype: torch.dtype | None = None,
        deterministic: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            cache_labels, rank, world_size, process_group, chunk_size, operand_dtype, deterministic, backend
        )
        if dist_impl not in (None, "bidir", "shift", "reduce", "gather"):
            raise ValueError(f"dist_impl must be bidir, shift, reduce or gather, got {dist_impl!r}")
        if not 0.0 <= label_smoothing <= 1.0:
            raise ValueError(f"label_smoothing must be within 0 and 1, got {label_smoothing}")
        self.dist_impl = dist_impl or "bidir"
        self.label_smoothing = label_smoothing

    def get_ground_truth(
        self, device: torch.device, dtype: torch.dtype, num_logits: int, negative_only: bool = False
    ) -> Tensor:
        """open_clip's (num_logits, num_logits) matrix of -1, with 1 on its diagonal; `forward` never builds it."""
        labels = -torch.ones(num_logits, num_logits, device=device, dtype=dtype)
        return labels if negative_only else labels.fill_diagonal_(1)

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
    ) -> Tensor:
        """The dense logits of these images and texts; `forward` never builds them."""
        logits = linear(logit_scale * image_features, text_features)
        return logits if logit_bias is None else logits + logit_bias

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

        Further rows of text, groups and autocast are as in `ClipLoss.forward`.

        Raises:
            ValueError: shapes, dtypes or a world_size that don't fit; the message names them.
            CollectiveError: another rank is lost or didn't answer in time.
        """
        if groups is not None and self.label_smoothing:
            raise ValueError("label_smoothing with groups isn't defined here: pass one of them")
        ranks = self._ranks(image_features)
        image, text = one_dtype(image_features, text_features)
        dtype = operand_dtype_of(image, self.operand_dtype)
        with torch.autocast(image.device.type, enabled=False):
            if ranks.size == 1:
                loss = siglip_loss(
                    image,
                    text,
                    logit_scale,
                    logit_bias,
                    groups=groups,
                    chunk_size=self.chunk_size,
                    operand_dtype=dtype,
                    deterministic=self.deterministic,
                    backend=self.backend,
                )
            else:
                check_features(image, text)
                ids = checked_groups(image, text, groups)
                if groups is None:
                    check_pairs(image, text)
                scale = as_scalar(logit_scale, image)
                bias = None if logit_bias is None else as_scalar(logit_bias, image)
                inputs = image, text, dtype, self.deterministic
                backend = choose("siglip_loss", LIMITS, self.backend, *inputs, dtype=dtype, shapes=shape_class(text))
                wanted = [tensor for tensor in (image, text, scale, bias) if tensor is not None]
                with_gradients = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in wanted)
                loss = self._over_ranks(
                    image, text, scale, bias, *ids, ranks, self.chunk_size, dtype, with_gradients, backend
                )
            if self.label_smoothing:
                loss = loss + self.label_smoothing * self._gap(image, text, logit_scale, logit_bias, ranks)
        return {"contrastive_loss": loss} if output_dict else loss

    @staticmethod
    def _gap(
        image: Tensor, text: Tensor, logit_scale: Tensor | float, logit_bias: Tensor | float | None, ranks: Ranks
    ) -> Tensor:
        """(sum of the positive logits - half the sum of all) / number of images: what smoothing adds by its factor.

        softplus(S) - t * S is linear in the target t, and the sum of all S is that of the features' sums.
        """
        width, dtype = image.shape[1], accumulation_dtype(image)
        image, text = image.to(dtype), text.to(dtype)
        positives = (image * text[: len(image)]).sum()[None]
        sums = torch.cat([image.sum(0), text.sum(0), positives, image.new_tensor([len(image), len(text)])])
        images, texts, positive, *sizes = SumOverRanks.apply(sums, ranks).split([width, width, 1, 1, 1])
        num_images, num_texts = (size.squeeze(0) for size in sizes)
        gap = as_scalar(logit_scale, image) * (positive.squeeze(0) - images @ texts / 2)
        if logit_bias is not None:
            gap = gap + as_scalar(logit_bias, image) * num_images * (1 - num_texts / 2)
        return gap / num_images


class _GlobalSigLipLoss(torch.autograd.Function):
    """b local images against the B texts of all ranks; gradients are known with the loss.

    The tile of the local texts is computed while the others travel.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        image_ids: Tensor | None,
        text_ids: Tensor | None,
        ranks: Ranks,
        chunk_size: int | None,
        dtype: torch.dtype,
        with_gradients: bool,
        backend: str,
    ) -> Tensor:
        ctx.num_ranks, ctx.dtype, result = ranks.size, image.dtype, siglip_gradient_dtype(image)
        wide, image, text = accumulation_dtype(image), image.to(dtype), text.to(dtype)
        image_sizes, text_sizes = ranks.batch_sizes(image, text)
        at, weight = Columns(ranks.rank, text_sizes), 1 / sum(image_sizes)
        chunk_size = chunk_size or default_chunk_size(len(image), at.total, image.device)
        siglip = load_backend("contrastive", backend).siglip
        groups = None
        travelling = ranks.start_gather(text, text_sizes, "text features")
        if image_ids is not None and text_ids is not None:
            groups = gather_groups(ranks, image_ids, text_ids, image_sizes, text_sizes)

        def tile(text: Tensor, part: slice, positive_offset: int | None) -> tuple[Tensor, ...]:
            own = None if groups is None else groups.among(part)
            call = ContrastiveCall(image, text, scale, positive_offset, chunk_size, bias=bias, groups=own)
            return siglip(call, weight, wide, with_gradients)

        parts = {at.own.start: tile(text, at.own, 0 if groups is None else None)}
        texts = travelling()
        parts |= {part.start: tile(texts[part], part, None) for part in at.remote}
        losses, image_grads, _, scale_grads, bias_grads = zip(*parts.values(), strict=True)
        text_grads = [part[2] for _, part in sorted(parts.items(), key=itemgetter(0))]
        loss = torch.stack(losses).sum()
        if not with_gradients:
            return ranks.sum(loss, "the loss")
        returning = None
        if ctx.needs_input_grad[1]:
            returning = ranks.start_reduce(torch.cat(text_grads).to(result), text_sizes, "text gradients")
        loss = ranks.sum(loss, "the loss")
        ctx.save_for_backward(
            sum(image_grads[1:], image_grads[0]).to(result),
            returning() if returning else None,
            torch.stack(scale_grads).sum(),
            None if bias is None else torch.stack(bias_grads).sum(),
        )
        return loss

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        factor = grad * ctx.num_ranks  # for the averaging, as in _GlobalClipLoss
        image_grad, text_grad, scale_grad, bias_grad = (
            None if saved is None else factor * saved for saved in ctx.saved_tensors
        )
        image_grad, text_grad = (None if part is None else part.to(ctx.dtype) for part in (image_grad, text_grad))
        return image_grad, text_grad, scale_grad, bias_grad, *[None] * 7
