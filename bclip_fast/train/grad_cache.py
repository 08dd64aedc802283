"""GradCache: the contrastive loss of a batch that is too large to be embedded at once.

The gradient is exactly that of the whole batch, in the memory of one micro-batch (Gao et al. 2021, arXiv 2101.06983):

1. Embed every micro-batch without a graph.
2. Compute the loss of all embeddings of all ranks, and from it the gradient of each embedding.
3. Embed every micro-batch again with the same random numbers, and backpropagate its part of that gradient.

The captions' part of CoCa's loss is a sum over pairs, so only step 3 computes it, with its gradient (captions.py).

So each tower runs forward twice. A tower that is locked up to its projection runs once, and only the projection runs
again. A single micro-batch is embedded once, with its graph, and nothing is cached.

Batch norms, which only a ResNet has, normalise by a micro-batch, as with open_clip's `--accum-freq`. Only step 3
updates their running statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bclip_fast import distributed
from bclip_fast.data.batch import Batch
from bclip_fast.model.packed import Packed
from bclip_fast.model.transformer import PreProjection

from .captions import CaptionLoss, mean_over_ranks
from .engine import Engine
from .losses import CONSTANTS, Loss, total
from .spill import SpillBuffer
from .transfers import packed_to_device, to_device


class Embedded(NamedTuple):
    """The features (b, D) of a rank's batch, with the factor and the bias of the logits.

    The tensors have a graph, or they are leaves that take gradients.
    """

    image: Tensor
    text: Tensor
    logit_scale: Tensor
    logit_bias: Tensor | None


def embed(engine: Engine, batch: Batch, seed: int, pre_projection: Sequence[Tensor | None] = (None, None)) -> Embedded:
    """Embed a micro-batch.

    Args:
        seed: seed of the random numbers for dropout and patch dropout.
        pre_projection: `Engine.pre_projection()` of the same pairs. A tower with such features runs only its
            projection, and draws no random numbers.
    """
    return _run_model(engine, batch, seed, pre_projection)[0]


def embed_with_captions(engine: Engine, batch: Batch, seed: int) -> tuple[Embedded, Tensor]:
    """Embed a micro-batch, and sum the cross-entropies of its captions' tokens, a scalar."""
    embedded, output = _run_model(engine, batch, seed, (None, None), captions=True)
    return embedded, output["caption_losses"]


def _run_model(
    engine: Engine, batch: Batch, seed: int, pre_projection: Sequence[Tensor | None], **options: bool
) -> tuple[Embedded, dict[str, Tensor]]:
    torch.manual_seed(seed)
    image, text = (None if features is None else PreProjection(features) for features in pre_projection)
    output = engine(
        image or to_device(batch.images, engine.device),
        text or packed_to_device(Packed.of(batch.ids, batch.lengths), engine.device),
        **options,
    )
    features = output["image_features"], output["text_features"]
    return Embedded(*features, output["logit_scale"], output.get("logit_bias")), output


class GradCache:
    """The micro-batches of one rank in one step. `add` each, then call `loss`, then `backward`.

    Args:
        sizes: number of pairs in each micro-batch, in the order of `add`. Under ZeRO 3, each rank needs equally many
            micro-batches, because their forward passes gather the weights.
        spill: where to keep the images between the two passes. Unused with a single micro-batch.
    """

    scalars: dict[str, Tensor]
    """Scalars on the device by their keys in metrics.jsonl: `logit_scale`, `shared_positives` of batches with groups,
    and the terms of a loss that has several. Set by `loss` and, for CoCa's terms, by `backward`."""

    def __init__(self, engine: Engine, loss: Loss, sizes: Sequence[int], spill: SpillBuffer) -> None:
        self._engine, self._loss, self._spill = engine, loss, spill
        self._starts = [0, *accumulate(sizes)]
        self._batches: list[tuple[Callable[[], Batch], int]] = []
        self._features: Embedded | None = None
        self._pre_projection: list[Tensor | None] = []
        self._constants: dict[str, list[Tensor]] = {}
        self._captions: CaptionLoss | None = getattr(loss, "captions", None)
        self._num_labels = 0
        self._caption_parts: list[Tensor] = []
        spill.clear()

    def add(self, batch: Batch, seed: int) -> None:
        """Embed the next micro-batch with the random numbers of `seed`."""
        expected = self._rows(len(self._batches))
        assert len(batch.lengths) == expected.stop - expected.start, "a micro-batch has another size than `sizes` says"
        for name in CONSTANTS:
            if (rows := getattr(batch, name)) is not None:
                self._constants.setdefault(name, []).append(to_device(rows, self._engine.device))
        if self._captions is not None:
            self._num_labels += self._captions.num_labels(batch)
        if self._is_single:
            self._features = self._embed_with_graph(batch, seed)
            self._batches.append((lambda: batch, seed))
            return
        with torch.no_grad():
            self._store(embed(self._engine, batch, seed))
        self._batches.append((self._spill.add(batch), seed))

    def micro_batches(self) -> Iterator[tuple[Batch, int]]:
        """The micro-batches and their seeds, in the order of `add`."""
        for load, seed in self._batches:
            yield load(), seed

    def loss(self) -> Tensor:
        """The scalar loss of the global batch without CoCa's captions. Collective, as `backward` is."""
        assert self._features is not None
        if self._captions is not None:
            self._caption_factor = self._captions.factor(self._num_labels)
        self.scalars = {"logit_scale": self._features.logit_scale.detach()}
        if not self._is_single:
            for name, tensor in zip(("visual.", "text.", "logit_scale", "logit_bias"), self._features, strict=True):
                if tensor is not None:
                    tensor.requires_grad_(self._engine.is_trainable(name))
        constants: dict[str, Any] = {name: torch.cat(rows) for name, rows in self._constants.items()}
        if (groups := constants.get("groups")) is not None:
            constants["groups"] = groups, groups
            self.scalars["shared_positives"] = distributed.num_equal(groups)
        self._value, terms = total(self._loss(*self._features, **constants))
        self.scalars |= terms
        return self._value.detach()

    def backward(self) -> Tensor:
        """Compute the gradients of the parameters, averaged over the ranks. Return the scalar loss of the global batch.

        Only the scalar of CoCa differs from that of `loss`.
        """
        value = self._value.detach()
        self._backward()
        if self._captions is None:
            return value
        self.scalars |= {"contrastive_loss": value, "caption_loss": mean_over_ranks(self._caption_parts)}
        return value + self.scalars["caption_loss"]

    def _backward(self) -> None:
        value, features = self._value, self._features
        # Both are large, and only their gradients are needed after this pass.
        del self._value, self._features
        if self._is_single:
            self._engine.backward(torch.stack([value, *self._caption_part()]).sum())
            return
        assert features is not None
        value.backward()
        grads = [None if tensor is None else tensor.grad for tensor in features]
        del value, features
        last = len(self._batches) - 1
        self._engine.accumulate([partial(self._surrogate_loss, i, grads, i == last) for i in range(last + 1)])

    @property
    def _is_single(self) -> bool:
        return len(self._starts) == 2

    def _rows(self, number: int) -> slice:
        """The rows of a micro-batch among those of the rank's part of the batch."""
        return slice(*self._starts[number : number + 2])

    def _store(self, embedded: Embedded) -> None:
        """Append the embeddings of a micro-batch to the buffers, in float32 or float64.

        The buffers are wide so that the loss does not round the embeddings' gradients to half precision. The operands
        of its products keep the dtype of the towers' output.

        The first call allocates the buffers for all micro-batches. Separate tensors would lie between activations that
        come and go, and would fragment the heap.
        """
        num_rows, pre_projection = self._starts[-1], self._engine.pre_projection()
        if self._captions is not None:
            # The decoder reads the tokens of both towers, so these must run again.
            pre_projection = None, None
        if self._features is None:
            dtype = torch.promote_types(embedded.image.dtype, embedded.text.dtype)
            self._loss.operand_dtype = dtype if dtype in (torch.float16, torch.bfloat16) else None
            wide = torch.promote_types(dtype, torch.float32)
            features = (tensor.new_empty((num_rows, tensor.shape[1]), dtype=wide) for tensor in embedded[:2])
            self._features = Embedded(
                *features, *(None if scalar is None else scalar.clone() for scalar in embedded[2:])
            )
            self._pre_projection = [
                None if tensor is None else tensor.new_empty((num_rows, tensor.shape[1])) for tensor in pre_projection
            ]
        buffers = (*self._features[:2], *self._pre_projection)
        for buffer, features_of_part in zip(buffers, (*embedded[:2], *pre_projection), strict=True):
            if buffer is not None and features_of_part is not None:
                buffer[self._rows(len(self._batches))] = features_of_part

    def _surrogate_loss(self, number: int, grads: Sequence[Tensor | None], is_last: bool) -> Tensor:
        """Scalar whose gradients are this micro-batch's part of the loss gradients.

        The last micro-batch includes the gradients of the logit scale and bias.
        """
        load, seed = self._batches[number]
        batch = load()
        rows = self._rows(number)
        pre_projection = [None if features is None else features[rows] for features in self._pre_projection]
        embedded = self._embed_with_graph(batch, seed, pre_projection)
        feature_grads = [None if grad is None else grad[rows] for grad in grads[:2]]
        # The other micro-batches get zeros, so that all backward passes run the same modules. ZeRO 3 prefetches the
        # weights in the order of the pass before.
        scalar_grads = [grad if grad is None or is_last else torch.zeros_like(grad) for grad in grads[2:]]
        products = [
            (tensor.to(grad.dtype) * grad).sum()
            for tensor, grad in zip(embedded, [*feature_grads, *scalar_grads], strict=True)
            if tensor is not None and grad is not None
        ]
        return torch.stack([*products, *self._caption_part()]).sum()

    def _embed_with_graph(
        self, batch: Batch, seed: int, pre_projection: Sequence[Tensor | None] = (None, None)
    ) -> Embedded:
        """Embed a micro-batch whose backward pass follows. For CoCa, also predict its captions."""
        if self._captions is None:
            return embed(self._engine, batch, seed, pre_projection)
        embedded, self._caption_losses = embed_with_captions(self._engine, batch, seed)
        return embedded

    def _caption_part(self) -> list[Tensor]:
        """The last micro-batch's part of the captions' loss on this rank, a scalar. Empty without captions."""
        if self._captions is None:
            return []
        part = self._caption_factor * self._caption_losses
        del self._caption_losses
        self._caption_parts.append(part.detach())
        return [part]
