"""The contrastive loss of a batch that is too large to be embedded at once.

Its gradient is that of the whole batch, exactly, in the memory of one micro-batch (Gao et al. 2021, arXiv 2101.06983):

1. every micro-batch is embedded without a graph;
2. the loss of all embeddings, of all ranks, gives the gradient of each embedding;
3. every micro-batch is embedded again, with the same random numbers, and its part of that gradient goes back.

So the towers run forward twice, but for one that is locked up to its projection, which alone is computed again. Batch
norms, which only a ResNet has, normalise by a micro-batch, as with open_clip's `--accum-freq`, and their running
statistics move in the third part alone. A single micro-batch is embedded once, with its graph, and nothing is cached.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bclip_fast.data.loader import Batch
from bclip_fast.errors import UserError
from bclip_fast.loss import ClipLoss
from bclip_fast.model.packed import Packed
from bclip_fast.model.transformer import PreProjection

from .engine.deepspeed import Engine

# In place of what is in a file.
_NOTHING = torch.empty(0)


class Embedded(NamedTuple):
    """The features (b, D) of a rank's batch and the factor of the logits, with a graph or ready to take gradients."""

    image: Tensor
    text: Tensor
    logit_scale: Tensor
    logit_bias: Tensor | None


def embed(engine: Engine, batch: Batch, seed: int, pooled: Sequence[Tensor | None] = (None, None)) -> Embedded:
    """`seed` gives the random numbers: dropout, dropped patches. pooled: as `Engine.pooled` had it of these pairs; a
    tower that is locked so far draws none."""
    torch.manual_seed(seed)
    image, text = (None if states is None else PreProjection(states) for states in pooled)
    output = engine(
        image or batch.images.to(engine.device, non_blocking=True),
        text or Packed.of(batch.ids, batch.lengths).to(engine.device, non_blocking=True),
    )
    return Embedded(output["image_features"], output["text_features"], output["logit_scale"], output.get("logit_bias"))


class Spool:
    """The micro-batches of a batch until they are embedded again: in memory up to a limit, beyond it in a file without
    a name.

    Args:
        limit: bytes in memory.
        folder: where the file is; empty: the system's folder for temporary files.
    """

    def __init__(self, limit: int, folder: str = "") -> None:
        self._limit, self._folder = limit, folder
        self._file: Any = None
        self.clear()

    def clear(self) -> None:
        """Forgets what it has; the file's room is used again."""
        self._in_memory = self._in_file = 0

    def add(self, batch: Batch) -> Callable[[], Batch]:
        """Keeps a micro-batch and returns what gives it back."""
        tensors = batch.images, batch.ids
        size, start = sum(tensor.nbytes for tensor in tensors), self._in_file
        if self._in_memory + size <= self._limit:
            self._in_memory += size
            return lambda: batch
        self._in_file += size
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="bclip-", dir=self._folder or None)
            self._file.seek(start)
            for tensor in tensors:
                self._file.write(tensor.numpy().data)
            # Here, where a full disk is named, rather than at a later seek.
            self._file.flush()
        except OSError as error:
            raise UserError(
                f"no room for the images of a batch in {self._folder or tempfile.gettempdir()}: {error}; give another "
                f"data.spool_dir, or keep more in memory by data.spool_above_mib"
            ) from error
        images, ids = (tensor.shape for tensor in tensors)
        return partial(self._read, start, images, ids, replace(batch, images=_NOTHING, ids=_NOTHING))

    def _read(self, start: int, images: torch.Size, ids: torch.Size, rest: Batch) -> Batch:
        batch = replace(rest, images=torch.empty(images, dtype=torch.uint8), ids=torch.empty(ids, dtype=torch.int64))
        self._file.seek(start)
        for tensor in (batch.images, batch.ids):
            if self._file.readinto(tensor.numpy().data.cast("B")) != tensor.nbytes:
                raise UserError("the file of a batch's images was cut short by another program")
        return batch


class CachedBatch:
    """The micro-batches of one rank, embedded one after the other, as they come.

    Args:
        num_parts: how many there are.
        spool: of the images where there are several.
    """

    def __init__(self, engine: Engine, loss: ClipLoss, num_parts: int, spool: Spool) -> None:
        self._engine, self._loss, self._spool = engine, loss, spool
        self._num_parts = num_parts
        self._batches: list[tuple[Callable[[], Batch], int]] = []
        self._features: Embedded | None = None
        self._pooled: list[Tensor | None] = []
        spool.clear()

    def add(self, batch: Batch, seed: int) -> None:
        """Embeds the next micro-batch with the random numbers of `seed`."""
        if self._num_parts == 1:
            self._features = embed(self._engine, batch, seed)
            self._batches.append((lambda: batch, seed))
            return
        with torch.no_grad():
            self._keep(embed(self._engine, batch, seed))
        self._batches.append((self._spool.add(batch), seed))

    def batches(self) -> Iterator[tuple[Batch, int]]:
        """What was added."""
        for batch, seed in self._batches:
            yield batch(), seed

    def loss(self) -> Tensor:
        """() the loss of the global batch. A collective of all ranks, as `backward` is."""
        assert self._features is not None
        self.logit_scale = float(self._features.logit_scale.detach())
        if self._num_parts > 1:
            for name, part in zip(("visual.", "text.", "logit_scale", "logit_bias"), self._features, strict=True):
                if part is not None:
                    part.requires_grad_(self._engine.trained(name))
        self._value = self._loss(*self._features)
        return self._value.detach()

    def backward(self) -> None:
        """Gradients of the parameters, averaged over ranks."""
        value, features = self._value, self._features
        # Both are large, and neither is needed beyond its gradient.
        del self._value, self._features
        if self._num_parts == 1:
            self._engine.backward(value)
            return
        assert features is not None
        value.backward()
        grads = [None if part is None else part.grad for part in features]
        del value, features
        last = self._num_parts - 1
        self._engine.accumulate([partial(self._replay, i, grads, i == last) for i in range(last + 1)])

    def _keep(self, part: Embedded) -> None:
        """Puts features among the others, in float32 at least: what the loss gives back for them is not rounded to half
        precision. The operands of its products keep the dtype that the towers gave.

        They all have their place from the first on: kept one by one, between activations that come and go, they would
        leave the heap in pieces too small for the next ones.
        """
        size, done = len(part.image), len(self._batches)
        rows, pooled = self._num_parts * size, self._engine.pooled()
        if self._features is None:
            dtype = torch.promote_types(part.image.dtype, part.text.dtype)
            self._loss.operand_dtype = dtype if dtype in (torch.float16, torch.bfloat16) else None
            wide = torch.promote_types(dtype, torch.float32)
            features = (own.new_empty((rows, own.shape[1]), dtype=wide) for own in part[:2])
            self._features = Embedded(*features, *(None if own is None else own.clone() for own in part[2:]))
            self._pooled = [None if own is None else own.new_empty((rows, own.shape[1])) for own in pooled]
        for whole, own in zip((*self._features[:2], *self._pooled), (*part[:2], *pooled), strict=True):
            if whole is not None and own is not None:
                whole[done * size : (done + 1) * size] = own

    def _replay(self, number: int, grads: Sequence[Tensor | None], last: bool) -> Tensor:
        """() of which the gradients are those of the loss."""
        again, seed = self._batches[number]
        batch = again()
        own = slice(number * len(batch.lengths), (number + 1) * len(batch.lengths))
        pooled = [states if states is None else states[own] for states in self._pooled]
        found = embed(self._engine, batch, seed, pooled)
        of_part = [grad if grad is None else grad[own] for grad in grads[:2]]
        sums = [
            (part.to(grad.dtype) * grad).sum()
            for part, grad in zip(found, [*of_part, *(grads[2:] if last else (None, None))], strict=True)
            if part is not None and grad is not None
        ]
        return torch.stack(sums).sum()
