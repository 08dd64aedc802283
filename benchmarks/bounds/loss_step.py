"""The bounds of a whole loss, forward and backward: our kernels, and the two products of the library."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .model import Work, bound
from .rates import Gpu
from .shapes import HALF, Loss


class Part(NamedTuple):
    """A part of the loss, its bound, and the resource that limits it."""

    name: str
    seconds: float
    limiter: str


def products(loss: Loss, gpu: Gpu) -> Iterator[Part]:
    """Yield the products of a gradient: dI = G T, and dT = G^T I, which adds to dT in float32 for each chunk of rows.

    The bytes of HBM count G once for each product, and the features and results once for each chunk.
    """
    features, square = loss.batch * loss.width * HALF, loss.batch**2
    chunks = loss.launches("softmax")
    compute = 2.0 * square * loss.width / gpu.peak_flops
    for name, moved in (
        ("dI = G T", HALF * square + chunks * features + 2 * features),
        ("dT = G^T I", HALF * square + features + (2 * chunks - 1) * 2 * features),
    ):
        memory = moved / gpu.hbm_bytes
        yield Part(name, max(compute, memory), "tensor" if compute >= memory else "HBM")


def parts(works: Sequence[Work], loss: Loss, gpu: Gpu, backend: str = "cuda") -> list[Part]:
    """Return the parts of clip_loss: the forward kernel, the kernel that writes G, and the two products."""
    found = []
    for kernel in ("contrastive_forward", "contrastive_softmax"):
        [work] = [
            work
            for work in works
            if (work.kernel, work.backend, work.shape) == (kernel, backend, loss.name)
            and work.architecture == gpu.architecture
        ]
        each = bound(work, gpu)
        found.append(Part(kernel, each.seconds, each.limiter))
    return [*found, *products(loss, gpu)]
