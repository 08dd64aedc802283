"""A linear classifier on the embedding of the image tower."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ClassHead(nn.Module):
    """Logits of C classes from an image embedding x: scale * weight @ (x / |x|) + bias.

    With the embeddings of class prompts as `weight`, the model's logit scale as `scale` and no bias, these are the
    logits of zero-shot classification.

    Args:
        names: the classes.
        multi_label: an image may have any number of classes, so each has a probability of its own (sigmoid). Otherwise
            the probabilities sum to 1 (softmax).
        dim: number of components of an embedding.
        label: name of the label, for reports.
    """

    def __init__(self, names: Sequence[str], multi_label: bool, dim: int, label: str = "label") -> None:
        super().__init__()
        self.names, self.multi_label, self.label = tuple(names), multi_label, label
        self.weight = nn.Parameter(torch.zeros(len(self.names), dim))
        self.bias = nn.Parameter(torch.zeros(len(self.names)))
        self.scale: Tensor
        self.register_buffer("scale", torch.ones(()))

    def forward(self, embeddings: Tensor) -> Tensor:
        """Return the logits (N, C) float32 of embeddings (N, D) of any length."""
        with torch.autocast(embeddings.device.type, enabled=False):
            rows = F.normalize(embeddings.float(), dim=-1)
            return self.scale * F.linear(rows, self.weight) + self.bias

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the probabilities (N, C)."""
        return logits.sigmoid() if self.multi_label else logits.softmax(-1)


class ImageClassifier(nn.Module):
    """An image tower with a `ClassHead`. Without a tower, its inputs are embeddings."""

    def __init__(self, visual: nn.Module | None, head: ClassHead) -> None:
        super().__init__()
        self.visual, self.head = visual, head

    def forward(self, image: Tensor, text: None = None) -> dict[str, Tensor]:
        """Return the logits (N, C) of images (N, 3, S, S), or of embeddings (N, D) without a tower."""
        return {"logits": self.head(image if self.visual is None else self.visual(image))}

    def set_grad_checkpointing(self, enable: bool = True, offload: bool = False) -> None:
        """As `BiomedClip.set_grad_checkpointing`."""
        if self.visual is not None:
            self.visual.grad_checkpointing, self.visual.offload_activations = enable, offload  # type: ignore[assignment]
