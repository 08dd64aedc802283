"""The loss at B = 65536 and D = 512, forward and backward: the bounds of its kernels against the project's goals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from . import store
from .model import Work, bound
from .rates import GPUS, Gpu
from .shapes import LOSSES

# Milliseconds: 75 % of the rate of cuBLAS on a Hopper GPU, and 88 % on an A100.
GOALS_MS = {"a100": 80.0, "h100": 29.7, "h200": 29.7}
LOSS = LOSSES[0]
# By column: the backend, and the start of the names of its kernels.
KERNELS = {
    "CUDA, for all GPUs": ("cuda", "contrastive"),
    "CUDA, for Hopper": ("cuda", "hopper"),
    "Triton": ("triton", "contrastive"),
}


def products_ms(gpu: Gpu) -> float:
    """Return the least time of the two library products, G T and G^T I, which read G from HBM once each."""
    flops = 2 * 2.0 * LOSS.batch**2 * LOSS.width
    moved = 2 * 2.0 * LOSS.batch**2
    return 1e3 * max(flops / gpu.matmul_flops, moved / gpu.hbm_bytes)


def rows(works: Sequence[Work]) -> list[list[str]]:
    """Return a row for each GPU and set of kernels, without the sets that are not built.

    Its cells: GPU, kernels, forward, forward in step, gradient, gradient in step, products, sum, goal, verdict.
    """
    cells = []
    shape = f"B={LOSS.batch}, D={LOSS.width}"
    for name, goal in GOALS_MS.items():
        gpu = GPUS[name]
        for kernels, (backend, family) in KERNELS.items():
            names = {f"{family}_forward": 0, f"{family}_softmax": 1}
            found = [
                work
                for work, _ in store.bounds(works, name)
                if work.backend == backend and work.kernel in names and work.shape == shape
            ]
            found.sort(key=lambda work: names[work.kernel])
            if len(found) < len(names):
                continue
            least = [1e3 * bound(work, gpu).seconds for work in found]
            in_step = [1e3 * bound(replace(work, ahead=0.0), gpu).seconds for work in found]
            products = products_ms(gpu)
            numbers = *(ms for pair in zip(least, in_step, strict=True) for ms in pair), products, sum(least) + products
            cells.append(
                [gpu.name, kernels, *(f"{ms:.1f}" for ms in numbers), f"{goal:g}", _verdict(least, products, goal)]
            )
    return cells


def _verdict(least: Sequence[float], products: float, goal: float) -> str:
    missing = sum(least) + products - goal
    if missing > 0:
        return f"out of reach by {missing:.1f} ms"
    return f"reached if the kernels run at {sum(least) / (goal - products):.0%} of their bounds"
