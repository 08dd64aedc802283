"""CoCaLoss: ClipLoss and the cross-entropy of generated captions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .clip import ClipLoss
from .collectives import GroupIds


class CoCaLoss(ClipLoss):
    """open_clip's CoCaLoss: the contrastive loss of the global batch, and the cross-entropy of this rank's captions.

    Args:
        caption_loss_weight, clip_loss_weight: factors of the two losses.
        pad_id: the label that the cross-entropy ignores.
        extras: further keywords of `ClipLoss`. Arguments without a description are those of `ClipLoss`.
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
        groups: GroupIds | None = None,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        """Return the (contrastive, caption) losses of features (b, D), logits (b, L, V) and labels (b, L).

        With `output_dict` they come as `{"contrastive_loss": ..., "caption_loss": ...}`. `groups` are as in
        `ClipLoss.forward`.
        """
        if self.clip_loss_weight:
            features = image_features, text_features
            contrastive = self.clip_loss_weight * self._clip_loss(*features, logit_scale, groups=groups)
        else:
            contrastive = torch.zeros((), dtype=torch.int64, device=logits.device)
        caption = self.caption_loss_weight * self.caption_loss(logits.permute(0, 2, 1), labels)
        if output_dict:
            return {"contrastive_loss": contrastive, "caption_loss": caption}
        return contrastive, caption
