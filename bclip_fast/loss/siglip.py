"""SigLipLoss, the sigmoid loss: every pair of an image and a text is a separate binary decision."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bclip_fast.ops.contrastive import siglip_loss
from bclip_fast.ops.contrastive.call import ContrastiveCall
from bclip_fast.ops.contrastive.checks import as_scalar, default_chunk_size
from bclip_fast.ops.contrastive.definition import operand, sigmoid_terms
from bclip_fast.ops.contrastive.loss_terms import siglip_gradient_dtype
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
from .sums import gather_rows, sum_over_ranks


class SigLipLoss(DistributedLoss):
    """open_clip's SigLipLoss (Zhai et al. 2023, arXiv 2303.15343) in O(B * D) memory.

    Every rank returns the sum over all pairs divided by the number of images of all ranks. In open_clip, a rank returns
    its own part divided by its own images. With equal batches the mean of those parts is our loss.

    Args:
        cache_labels: no effect, as in open_clip.
        rank, world_size, process_group, operand_dtype, deterministic, backend: as in `ClipLoss`.
        dist_impl: open_clip's ways to send texts: bidir, shift, reduce or gather. All four give the same result, and
            here all four use one gather.
        chunk_size: number of rows of the similarity matrix held at a time. None or 0: that of `ops.siglip_loss`.
        label_smoothing: makes the targets of all pairs 1 - e / 2 and e / 2. A closed form computes it in O(B * D). It
            can't be combined with groups.
    """

    @staticmethod
    def _global_loss(*arguments: Any) -> Any:
        return _GlobalSigLipLoss.apply(*arguments)

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int | None = 0,
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
        self.dist_impl = dist_impl or "bidir"
        if self.dist_impl not in ("bidir", "shift", "reduce", "gather"):
            raise ValueError(f"dist_impl={dist_impl!r} must be bidir, shift, reduce or gather")
        self.label_smoothing = checked_smoothing(label_smoothing)

    def get_ground_truth(
        self, device: torch.device, dtype: torch.dtype, num_logits: int, negative_only: bool = False
    ) -> Tensor:
        """open_clip's (num_logits, num_logits) labels: -1, with 1 on the diagonal. `forward` never builds them."""
        labels = -torch.ones(num_logits, num_logits, device=device, dtype=dtype)
        return labels if negative_only else labels.fill_diagonal_(1)

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
    ) -> Tensor:
        """The dense logits of these images and texts. `forward` never builds them."""
        logits = self._product(logit_scale * image_features, text_features)
        return logits if logit_bias is None else logits + logit_bias

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

        Additional texts, groups and autocast work as in `ClipLoss.forward`.

        Raises:
            ValueError: shapes, dtypes or a world_size that don't fit. The message names them.
            CollectiveError: another rank is lost or didn't answer in time.
        """
        if groups is not None and self.label_smoothing:
            raise ValueError("label_smoothing with groups isn't implemented: pass one of them")
        ranks, image, text, dtype = self._prepare(image_features, text_features)
        backend = self.backend
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
                ids = self._checked_ids(image, text, groups)
                scale = as_scalar(logit_scale, image)
                bias = None if logit_bias is None else as_scalar(logit_bias, image)
                backend = self._choose_backend("siglip_loss", image, text, dtype)
                inputs = [tensor for tensor in (image, text, scale, bias) if tensor is not None]
                with_gradients = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
                loss = self._global_loss(
                    image, text, scale, bias, *ids, ranks, self.chunk_size, dtype, with_gradients, backend
                )
            if self.label_smoothing:
                smoothing = self._smoothing(image, text, logit_scale, logit_bias, ranks, alike=backend != "reference")
                loss = loss + self.label_smoothing * smoothing
        return {"contrastive_loss": loss} if output_dict else loss

    @staticmethod
    def _smoothing(
        image: Tensor,
        text: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None,
        ranks: Ranks,
        *,
        alike: bool,
    ) -> Tensor:
        """Change of the loss per unit of smoothing: (sum of positive logits - half the sum of all) / number of images.

        softplus(S) - t * S is linear in the target t, and the sums of the features give the sum of all logits S.
        """
        dtype = accumulation_dtype(image)
        image, text = image.to(dtype), text.to(dtype)
        positives = (image * text[: len(image)]).sum()
        sums = image.sum(0), text.sum(0), positives, num_rows(image, text)
        image_sum, text_sum, positive_sum, sizes = sum_over_ranks(ranks, *sums, alike=alike)
        num_images, num_texts = sizes.unbind()
        gap = as_scalar(logit_scale, image) * (positive_sum - image_sum @ text_sum / 2)
        if logit_bias is not None:
            gap = gap + as_scalar(logit_bias, image) * num_images * (1 - num_texts / 2)
        return gap / num_images


@without_autocast
def _definition(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    ranks: Ranks,
    *options: Any,
) -> Tensor:
    """The loss of _GlobalSigLipLoss in plain torch, on the whole matrix (b, B)."""
    dtype = options[1]
    image_sizes, text_sizes = ranks.batch_sizes(image, text)
    texts = gather_rows(operand(text, dtype), ranks, text_sizes, "text features")
    groups = None
    if image_ids is not None and text_ids is not None:
        groups = gather_groups(ranks, image_ids, text_ids, image_sizes, text_sizes).tile
    first, weight = ColumnRanges(ranks.rank, text_sizes).local.start, 1 / sum(image_sizes)
    return sum_over_ranks(ranks, sigmoid_terms(operand(image, dtype), texts, scale, bias, first, weight, groups))[0]


class _GlobalSigLipLoss(torch.autograd.Function):
    """b local images against the B texts of all ranks. The forward pass computes the gradients with the loss.

    The tile of the local texts is computed while the other ranks' texts travel.
    """

    @staticmethod
    def forward(
        ctx: Any,
        image_input: Tensor,
        text_input: Tensor,
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
        grad_dtype, wide = siglip_gradient_dtype(image_input), accumulation_dtype(image_input)
        image, text = image_input.to(dtype), text_input.to(dtype)
        image_sizes, text_sizes = ranks.batch_sizes(image, text)
        ranges, weight = ColumnRanges(ranks.rank, text_sizes), 1 / sum(image_sizes)
        chunk_size = chunk_size or default_chunk_size(len(image), ranges.total, image.device)
        siglip = load_backend("contrastive", backend).siglip
        groups = None
        wait_for_texts = ranks.start_gather(text, text_sizes, "text features")
        if image_ids is not None and text_ids is not None:
            groups = gather_groups(ranks, image_ids, text_ids, image_sizes, text_sizes).tile

        def tile(text: Tensor, part: slice, positive_offset: int | None) -> tuple[Tensor, ...]:
            tile_groups = None if groups is None else groups.among(part)
            call = ContrastiveCall(image, text, scale, positive_offset, chunk_size, bias=bias, groups=tile_groups)
            return siglip(call, weight, wide, with_gradients)

        loss, image_grad, text_grad, scale_grad, bias_grad = tile(text, ranges.local, 0 if groups is None else None)
        # One buffer for the gradients of all texts, and no second copy of a tile's: they are the largest tensors.
        texts_grad = None
        if with_gradients and ctx.needs_input_grad[1]:
            texts_grad = text_grad.new_empty((ranges.total, text.shape[1]), dtype=grad_dtype)
            texts_grad[ranges.local] = text_grad
        texts = wait_for_texts()
        del text_grad, wait_for_texts
        for part in ranges.remote:
            part_loss, part_image_grad, part_text_grad, part_scale_grad, part_bias_grad = tile(texts[part], part, None)
            loss, image_grad = loss + part_loss, image_grad.add_(part_image_grad)
            scale_grad, bias_grad = scale_grad + part_scale_grad, bias_grad + part_bias_grad
            if texts_grad is not None:
                texts_grad[part] = part_text_grad
            del part_image_grad, part_text_grad
        del texts
        loss = loss.to(scale.dtype)
        if not with_gradients:
            return ranks.sum(loss, "the loss")
        wait_for_grad = None
        if texts_grad is not None:
            wait_for_grad = ranks.start_reduce(texts_grad, text_sizes, "text gradients")
        loss = ranks.sum(loss, "the loss")
        ctx.num_ranks, ctx.features = ranks.size, image_input.dtype
        ctx.options = ranks, chunk_size, dtype, with_gradients, backend
        ctx.save_for_backward(
            image_grad.to(grad_dtype),
            wait_for_grad() if wait_for_grad else None,
            scale_grad,
            None if bias is None else bias_grad,
            *(image_input, text_input, scale, bias, image_ids, text_ids),
        )
        return loss

    @staticmethod
    def definition_of(ctx: Any) -> Definition:
        """The definition of the call in plain torch."""
        function = _definition if ctx.options[-1] == "reference" else None
        return Definition(ctx.options[0].loss, function, (*ctx.saved_tensors[4:], *ctx.options))

    @staticmethod
    @partial(first_by_kernel, definition_of)
    @without_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Data-parallel engines average over ranks, as in _GlobalClipLoss.
        factor = grad * ctx.num_ranks
        image_grad, text_grad, scale_grad, bias_grad = (
            None if saved is None else factor * saved for saved in ctx.saved_tensors[:4]
        )
        image_grad, text_grad = (None if part is None else part.to(ctx.features) for part in (image_grad, text_grad))
        return image_grad, text_grad, scale_grad, bias_grad, *[None] * 7
