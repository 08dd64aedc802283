"""SigLipLoss: every pair on its own."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ops.contrastive import (
    LIMITS,
    as_scalar,
    check_features,
    default_chunk_size,
    siglip_loss,
)
from ..ops.contrastive.terms import siglip_gradient_dtype
from ..ops.dispatch import choose, kernels
from .ranks import RankedLoss, Ranks, check_rows, one_dtype


class SigLipLoss(RankedLoss):
    """open_clip's SigLipLoss (Zhai et al. 2023, arXiv 2303.15343) in O(B * D) memory.

    The sum over all pairs of images and texts, divided by the number of images of all ranks. open_clip returns each
    rank's part, divided by its own images; with equal batches its mean over the ranks is what every rank returns here.

    Args:
        cache_labels: open_clip's; without effect, as there.
        rank, world_size, process_group, backend: those of `ClipLoss`.
        dist_impl: open_clip's way for texts to travel: bidir, shift, reduce or gather; all of them give one result,
            and here all of them gather once.
        chunk_size: rows of the similarity matrix held at a time; as in `ops.siglip_loss` with None or 0.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int | None = None,
        *,
        process_group: dist.ProcessGroup | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(cache_labels, rank, world_size, process_group, chunk_size, backend)
        if dist_impl not in (None, "bidir", "shift", "reduce", "gather"):
            raise ValueError(f"dist_impl must be bidir, shift, reduce or gather, got {dist_impl!r}")
        self.dist_impl = dist_impl or "bidir"

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
        logits = logit_scale * image_features @ text_features.T
        return logits if logit_bias is None else logits + logit_bias

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
            CollectiveError: another rank is lost or didn't answer in time.
        """
        ranks = self._ranks()
        image, text = one_dtype(image_features, text_features)
        with torch.autocast(image.device.type, enabled=False):
            if ranks.size == 1:
                loss = siglip_loss(
                    image, text, logit_scale, logit_bias, chunk_size=self.chunk_size, backend=self.backend
                )
            else:
                check_features(image, text)
                check_rows(image, text)
                scale = as_scalar(logit_scale, image)
                bias = None if logit_bias is None else as_scalar(logit_bias, image)
                backend = choose("siglip_loss", LIMITS, self.backend, image, text)
                wanted = [tensor for tensor in (image, text, scale, bias) if tensor is not None]
                with_gradients = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in wanted)
                loss = _GlobalSigLipLoss.apply(
                    image, text, scale, bias, ranks, self.chunk_size, with_gradients, backend
                )
        return {"contrastive_loss": loss} if output_dict else loss


class _GlobalSigLipLoss(torch.autograd.Function):
    """b local images against the B texts of all ranks; gradients are known with the loss."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        ranks: Ranks,
        chunk_size: int | None,
        with_gradients: bool,
        backend: str,
    ) -> Tensor:
        sizes = ranks.batch_sizes(image, text)
        texts = ranks.gather(text, sizes, "text features")
        first, weight = sum(sizes[: ranks.rank]), 1 / len(texts)
        chunk_size = chunk_size or default_chunk_size(len(image), len(texts), image.device)
        loss, image_grad, texts_grad, scale_grad, bias_grad = kernels("contrastive", backend).siglip(
            image, texts, scale, bias, first, weight, chunk_size, siglip_gradient_dtype(image), with_gradients
        )
        if with_gradients:
            text_grad = ranks.reduce(texts_grad, sizes, "text gradients") if ctx.needs_input_grad[1] else None
            ctx.save_for_backward(image_grad, text_grad, scale_grad, None if bias is None else bias_grad)
        ctx.num_ranks, ctx.dtype = ranks.size, image.dtype
        return ranks.sum(loss, "the loss")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        factor = grad * ctx.num_ranks  # for the averaging, as in _GlobalClipLoss
        image_grad, text_grad, scale_grad, bias_grad = (
            None if saved is None else factor * saved for saved in ctx.saved_tensors
        )
        image_grad, text_grad = (None if part is None else part.to(ctx.dtype) for part in (image_grad, text_grad))
        return image_grad, text_grad, scale_grad, bias_grad, None, None, None, None
