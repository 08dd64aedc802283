"""The contrastive loss of a batch that is too large to be embedded at once.

Its gradient is that of the whole batch, exactly, in the memory of one micro-batch (Gao et al. 2021, arXiv 2101.06983):

1. every micro-batch is embedded without a graph;
2. the loss of all embeddings, of all ranks, gives the gradient of each embedding;
3. every micro-batch is embedded again, with the same random numbers, and its part of that gradient goes back.

So the towers run forward twice. A single micro-batch is embedded once, with its graph, and nothing is cached.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from bclip_fast.loss import ClipLoss
from bclip_fast.model.packed import Packed

from .engine import Engine


class MicroBatch(NamedTuple):
    """Images (b, S, S, 3) uint8, their captions, and the seed of the random numbers that embed them (dropout, patches).

    What lies on the host goes to the device when its turn comes.
    """

    images: Tensor
    text: Packed
    seed: int

    def to(self, device: torch.device) -> tuple[Tensor, Packed]:
        return self.images.to(device, non_blocking=True), self.text.to(device, non_blocking=True)


class Embedded(NamedTuple):
    """The features (b, D) of a rank's batch and the factor of the logits, with a graph or ready to take gradients."""

    image: Tensor
    text: Tensor
    logit_scale: Tensor
    logit_bias: Tensor | None


def embed(engine: Engine, batch: MicroBatch) -> Embedded:
    torch.manual_seed(batch.seed)
    output = engine(*batch.to(engine.device))
    return Embedded(output["image_features"], output["text_features"], output["logit_scale"], output.get("logit_bias"))


class CachedBatch:
    """The micro-batches of one rank, embedded one after the other, as they come.

    Args:
        whole: there is one micro-batch only.
    """

    def __init__(self, engine: Engine, loss: ClipLoss, whole: bool) -> None:
        self._engine, self._loss, self._whole = engine, loss, whole
        self._batches: list[MicroBatch] = []
        self._parts: list[Embedded] = []

    def add(self, batch: MicroBatch) -> None:
        with torch.set_grad_enabled(self._whole):
            self._parts.append(embed(self._engine, batch))
        self._batches.append(batch)

    @property
    def logit_scale(self) -> float:
        return float(self._parts[0].logit_scale.detach())

    def loss(self) -> Tensor:
        """() the loss of the global batch. A collective of all ranks, as `backward` is."""
        self._leaves = self._parts[0]
        if not self._whole:
            self._leaves = self._as_leaves()
        self._value = self._loss(*self._leaves)
        return self._value.detach()

    def backward(self) -> None:
        """Gradients of the parameters, averaged over ranks."""
        if self._whole:
            self._engine.backward(self._value)
            return
        self._value.backward()
        image_grads = _split(self._leaves.image.grad, self._parts)
        text_grads = _split(self._leaves.text.grad, self._parts)
        last = len(self._batches) - 1
        self._engine.accumulate(
            [
                partial(self._replay, batch, image_grads[i], text_grads[i], i == last)
                for i, batch in enumerate(self._batches)
            ]
        )

    def _as_leaves(self) -> Embedded:
        """All embeddings, in float32 at least: what the loss gives back for them is not rounded to half precision.

        The operands of its products keep the dtype that the towers gave.
        """
        dtype = torch.promote_types(self._parts[0].image.dtype, self._parts[0].text.dtype)
        self._loss.operand_dtype = dtype if dtype in (torch.float16, torch.bfloat16) else None
        wide = torch.promote_types(dtype, torch.float32)
        image = torch.cat([part.image for part in self._parts])
        text = torch.cat([part.text for part in self._parts])
        trained = self._engine.trained
        scale, bias = self._parts[-1].logit_scale.detach().clone(), self._parts[-1].logit_bias
        return Embedded(
            image.to(wide).requires_grad_(trained("visual.")),
            text.to(wide).requires_grad_(trained("text.")),
            scale.requires_grad_(trained("logit_scale")),
            None if bias is None else bias.detach().clone().requires_grad_(trained("logit_bias")),
        )

    def _replay(self, batch: MicroBatch, image_grad: Tensor | None, text_grad: Tensor | None, last: bool) -> Tensor:
        """() of which the gradients are those of the loss."""
        again = embed(self._engine, batch)
        pairs = [(again.image, image_grad), (again.text, text_grad)]
        if last:
            pairs.append((again.logit_scale, self._leaves.logit_scale.grad))
            if again.logit_bias is not None and self._leaves.logit_bias is not None:
                pairs.append((again.logit_bias, self._leaves.logit_bias.grad))
        return torch.stack([(part.to(grad.dtype) * grad).sum() for part, grad in pairs if grad is not None]).sum()


def _split(grad: Tensor | None, parts: Sequence[Embedded]) -> Sequence[Tensor | None]:
    return [None] * len(parts) if grad is None else grad.split([len(part.image) for part in parts])
