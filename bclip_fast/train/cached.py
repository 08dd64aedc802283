"""The contrastive loss of a batch that is too large to be embedded at once.

Its gradient is that of the whole batch, exactly, in the memory of one micro-batch (Gao et al. 2021, arXiv 2101.06983):

1. every micro-batch is embedded without a graph;
2. the loss of all embeddings, of all ranks, gives the gradient of each embedding;
3. every micro-batch is embedded again, with the same random numbers, and its part of that gradient goes back.

So the towers run forward twice. Batch norms, which only a ResNet has, normalise by a micro-batch, as with open_clip's
`--accum-freq`, and their running statistics move in the third part alone. A single micro-batch is embedded once, with
its graph, and nothing is cached.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bclip_fast.data.native import Batch
from bclip_fast.errors import UserError
from bclip_fast.loss import ClipLoss
from bclip_fast.model.packed import Packed

from .engine import Engine


class Embedded(NamedTuple):
    """The features (b, D) of a rank's batch and the factor of the logits, with a graph or ready to take gradients."""

    image: Tensor
    text: Tensor
    logit_scale: Tensor
    logit_bias: Tensor | None


def embed(engine: Engine, batch: Batch, seed: int) -> Embedded:
    """`seed` gives the random numbers: dropout, dropped patches."""
    torch.manual_seed(seed)
    images = batch.images.to(engine.device, non_blocking=True)
    text = Packed.of(batch.ids, batch.lengths).to(engine.device, non_blocking=True)
    output = engine(images, text)
    return Embedded(output["image_features"], output["text_features"], output["logit_scale"], output.get("logit_bias"))


class Spool:
    """The images of a batch until they are embedded again: in memory up to a limit, beyond it in a file without a name.

    Args:
        limit: bytes in memory.
        folder: where the file is; empty: the system's folder for temporary files.
    """

    def __init__(self, limit: int, folder: str = "") -> None:
        self._limit, self._folder = limit, folder
        self._file: Any = None
        self.clear()

    def clear(self) -> None:
        """Forgets all images; the file's room is used again."""
        self._in_memory = self._in_file = 0

    def add(self, images: Tensor) -> Callable[[], Tensor]:
        """Keeps images (b, S, S, 3) uint8 and returns what gives them back."""
        if self._in_memory + images.numel() <= self._limit:
            self._in_memory += images.numel()
            return lambda: images
        start, shape = self._in_file, images.shape
        self._in_file += images.numel()
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="bclip-", dir=self._folder or None)
            self._file.seek(start)
            self._file.write(images.numpy().data)
            # Here, where a full disk is named, rather than at a later seek.
            self._file.flush()
        except OSError as error:
            raise UserError(
                f"no room for the images of a batch in {self._folder or tempfile.gettempdir()}: {error}; give another "
                f"data.spool_dir, or keep more in memory by data.spool_above_mib"
            ) from error
        return partial(self._read, start, shape)

    def _read(self, start: int, shape: torch.Size) -> Tensor:
        images = torch.empty(shape, dtype=torch.uint8)
        self._file.seek(start)
        if self._file.readinto(images.numpy().data.cast("B")) != images.numel():
            raise UserError("the file of a batch's images was cut short by another program")
        return images


class CachedBatch:
    """The micro-batches of one rank, embedded one after the other, as they come.

    Args:
        spool: of the images where there are several; None: there is one micro-batch only.
    """

    def __init__(self, engine: Engine, loss: ClipLoss, spool: Spool | None) -> None:
        self._engine, self._loss, self._spool = engine, loss, spool
        self._batches: list[tuple[Batch, int, Callable[[], Tensor]]] = []
        self._parts: list[Embedded] = []
        if spool is not None:
            spool.clear()

    def add(self, batch: Batch, seed: int) -> None:
        """Embeds the next micro-batch with the random numbers of `seed`."""
        with torch.set_grad_enabled(self._spool is None):
            self._parts.append(embed(self._engine, batch, seed))
        if self._spool is None:
            self._batches.append((batch, seed, lambda: batch.images))
        else:
            images = self._spool.add(batch.images)
            self._batches.append((replace(batch, images=batch.images[:0].clone()), seed, images))

    def batches(self) -> Iterator[tuple[Batch, int]]:
        """What was added."""
        for batch, seed, images in self._batches:
            yield replace(batch, images=images()), seed

    @property
    def logit_scale(self) -> float:
        return float(self._parts[0].logit_scale.detach())

    def loss(self) -> Tensor:
        """() the loss of the global batch. A collective of all ranks, as `backward` is."""
        self._leaves = self._parts[0]
        if self._spool is not None:
            self._leaves = self._as_leaves()
        self._value = self._loss(*self._leaves)
        return self._value.detach()

    def backward(self) -> None:
        """Gradients of the parameters, averaged over ranks."""
        if self._spool is None:
            self._engine.backward(self._value)
            return
        self._value.backward()
        image_grads = _split(self._leaves.image.grad, self._parts)
        text_grads = _split(self._leaves.text.grad, self._parts)
        last = len(self._batches) - 1
        self._engine.accumulate(
            [partial(self._replay, i, image_grads[i], text_grads[i], i == last) for i in range(last + 1)]
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

    def _replay(self, number: int, image_grad: Tensor | None, text_grad: Tensor | None, last: bool) -> Tensor:
        """() of which the gradients are those of the loss."""
        batch, seed, images = self._batches[number]
        again = embed(self._engine, replace(batch, images=images()), seed)
        pairs = [(again.image, image_grad), (again.text, text_grad)]
        if last:
            pairs.append((again.logit_scale, self._leaves.logit_scale.grad))
            if again.logit_bias is not None and self._leaves.logit_bias is not None:
                pairs.append((again.logit_bias, self._leaves.logit_bias.grad))
        return torch.stack([(part.to(grad.dtype) * grad).sum() for part, grad in pairs if grad is not None]).sum()


def _split(grad: Tensor | None, parts: Sequence[Embedded]) -> Sequence[Tensor | None]:
    return [None] * len(parts) if grad is None else grad.split([len(part.image) for part in parts])
