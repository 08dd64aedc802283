"""`python -m benchmarks.bounds.mlp`: bounds of an MLP's first layer with GELU, and of FP8 in a linear layer.

A product needs its FLOP at the dense rate, or its bytes at HBM's rate, whichever takes longer. A kernel without a
product needs its bytes. These are bounds, not times: cuBLAS reaches about 80 % of the dense rate.
"""

from __future__ import annotations

from typing import NamedTuple

from .rates import GPUS, Gpu
from .shapes import HALF, TOKENS


class Bound(NamedTuple):
    """A choice's bounds in seconds, and the bytes that it keeps for the backward pass."""

    forward: float
    backward: float
    saved: int


def linear_gelu(rows: int, width: int, hidden: int, gpu: Gpu) -> dict[str, Bound]:
    """Bounds of GELU(x W^T + b) for x (rows, width) and W (hidden, width), by the place where GELU is computed.

    The backward pass is the gradient of the pre-activation, and the product before it that gives the gradient of
    GELU's output: dO (rows, width) by the next layer's weight (width, hidden). Both products have the same FLOP.
    """
    flops = 2.0 * rows * width * hidden
    narrow, wide, weight = HALF * rows * width, HALF * rows * hidden, HALF * width * hidden

    def product(moved: int) -> float:
        return max(flops / gpu.peak_flops, (narrow + weight + moved) / gpu.hbm_bytes)

    def kernel(moved: int) -> float:
        return moved / gpu.hbm_bytes

    kept = 2 * wide  # the pre-activation for GELU, and GELU's output for the next layer
    return {
        "product, then GELU": Bound(product(wide) + kernel(2 * wide), product(wide) + kernel(3 * wide), kept),
        "GELU in the product": Bound(product(2 * wide), product(2 * wide), kept),
        "GELU recomputed": Bound(product(wide) + kernel(2 * wide), product(wide) + kernel(4 * wide), wide),
    }


def float8_linear(rows: int, width: int, columns: int, gpu: Gpu) -> tuple[float, float, float]:
    """(bf16 products, FP8 products, casts): bounds in seconds of a linear layer, forward and backward.

    Three products need 6 * rows * width * columns FLOP, in FP8 at twice the rate. A cast reads its operand for the
    largest value, reads it again and writes it in FP8. The input is cast in both passes, the incoming gradient once.
    The weight's product needs both of them a second time, transposed.
    """
    flops = 6.0 * rows * width * columns / gpu.peak_flops
    casts = 2 * (2 * HALF + 1) * width + (2 * HALF + 1) * columns + 2 * (width + columns)
    return flops, flops / 2, rows * casts / gpu.hbm_bytes


def tables(gpu: Gpu = GPUS["h100"]) -> str:
    """Two tables in Markdown, for ViT-B/16 with a batch of 256 images, and for wider towers."""
    lines = [
        f"| {TOKENS} x 768 x 3072 on an {gpu.name} | forward | backward | kept |",
        "|---|---|---|---|",
    ]
    for name, bound in linear_gelu(TOKENS, 768, 3072, gpu).items():
        milliseconds = " | ".join(f"{1e3 * seconds:.2f} ms" for seconds in bound[:2])
        lines.append(f"| {name} | {milliseconds} | {bound.saved / 1e6:.0f} MB |")
    lines += ["", "| MLP's first layer | bf16 products | FP8 products | casts | FP8 in all |", "|---|---|---|---|---|"]
    for name, width in (("ViT-S", 384), ("ViT-B", 768), ("ViT-L", 1024), ("ViT-H", 1280), ("ViT-g", 1408)):
        exact, products, casts = (1e3 * seconds for seconds in float8_linear(TOKENS, width, 4 * width, gpu))
        cells = f"{exact:.2f} ms | {products:.2f} ms | {casts:.2f} ms | {(products + casts) / exact:.0%}"
        lines.append(f"| {name}, {width} to {4 * width} | {cells} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(tables())
