"""The named shapes, with the least FLOP and bytes of each kernel there."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .cache import Order, bytes_read

HALF = 2  # bytes


@dataclass(frozen=True)
class Loss:
    """A contrastive loss of `batch` pairs with features of `width` elements in float16."""

    batch: int
    width: int

    @property
    def name(self) -> str:
        """The sizes, as the reports name them."""
        return f"B={self.batch}, D={self.width}"

    @property
    def chunk(self) -> int:
        """Rows of S that take 1 GiB in float32, as checks.py chooses on a GPU."""
        return min(self.batch, 2**30 // (4 * self.batch))

    def launches(self, kernel: str) -> int:
        """Launches of a kernel. The rows of a launch of a gradient's kernel take as much in float16 as a chunk."""
        return 1 if kernel == "forward" else self.batch // min(self.batch, 2 * self.chunk)

    def work(
        self, kernel: str, rows: int, columns: int, elements: int, order: Order | None, cache: int, multicast: int = 1
    ) -> dict[str, Any]:
        """Return a work's fields for tiles of rows x columns.

        kernel: "forward", "softmax" or "sigmoid". elements: elements of a tile for each thread.
        order: order of the tiles of a launch. Without it, HBM reads the features once.
        cache: bytes of L2 that can hold features.
        multicast: number of tiles of a cluster. They lie below one another, and read the features of their columns from
            L2 once.
        """
        batch, width = self.batch, self.width
        launches = self.launches(kernel)
        # A cluster is complete, also at the end of the rows.
        tiles = multicast * math.ceil(batch / (multicast * rows)) * math.ceil(batch / columns)
        square = batch * batch
        # Gradients write G in float16. The forward pass writes partial log-sum-exps for each tile.
        written = 4 * (square / rows + square / columns) if kernel == "forward" else HALF * square
        read = 2 * batch * width * HALF
        if order:
            grid = tiles // launches // (batch // columns), batch // columns
            operands = rows * width * HALF, columns * width * HALF
            # A gradient's launches have matrix products in between, which use the cache too.
            read = launches * bytes_read(order, grid, operands, int(written // tiles), cache)
        return {
            "operator": "siglip_loss" if kernel == "sigmoid" else "clip_loss",
            "shape": self.name,
            "blocks": tiles // launches,
            "launches": launches,
            "flops": 2.0 * square * width,
            "l2_bytes": tiles * (rows + columns / multicast) * width * HALF + written,
            "hbm_bytes": read + written,
            "elements": elements,
        }


@dataclass(frozen=True)
class Attention:
    """Attention of sequences of equal length without a mask, in float16."""

    sequences: int
    tokens: int
    heads: int
    dim: int

    @property
    def name(self) -> str:
        """The sizes, as the reports name them."""
        return f"{self.sequences} x {self.tokens}, {self.heads} x {self.dim}"

    @property
    def bytes_of_rows(self) -> float:
        """Bytes of one of Q, K, V and the result."""
        return float(self.sequences * self.tokens * self.heads * self.dim * HALF)

    def work(self, kernel: str, blocks: int, flops: float | None = None, parts: float | None = None) -> dict[str, Any]:
        """Return a work's fields.

        kernel: "forward" or "backward".
        flops: number of matrix products of the size of Q K^T, by default 2 forward and 5 backward.
        parts: number of tensors of the size of Q that the kernel reads or writes, by default 4 forward and 8 backward.
        """
        forward = kernel == "forward"
        products = flops or (2 if forward else 5)
        moved = (parts or (4 if forward else 8)) * self.bytes_of_rows
        lse = 4.0 * self.sequences * self.tokens * self.heads
        return {
            "operator": "fused_attention",
            "shape": self.name,
            "blocks": blocks,
            "flops": products * 2.0 * self.sequences * self.heads * self.tokens**2 * self.dim,
            "l2_bytes": moved + lse,
            "hbm_bytes": moved + lse,
        }


@dataclass(frozen=True)
class Images:
    """A batch of images, resized to squares in float16."""

    count: int
    height: int
    width: int
    size: int

    def _shape(self) -> dict[str, Any]:
        return {
            "operator": "image",
            "shape": f"{self.count} x {self.width}x{self.height} to {self.size}",
            "flops": 0.0,
        }

    def work(self, blocks: int) -> dict[str, Any]:
        """Return the fields of the kernel that resizes. It reads the central square."""
        moved = float(self.count * 3 * (self.height**2 + HALF * self.size**2))
        return {**self._shape(), "blocks": blocks, "l2_bytes": moved, "hbm_bytes": moved}

    def work_of_weights(self, blocks: int) -> dict[str, Any]:
        """Return the fields of the kernel that writes the weights."""
        taps = 4 * self.height / self.size + 2
        moved = self.count * 2 * self.size * 4 * (2 + taps)
        return {**self._shape(), "blocks": blocks, "l2_bytes": moved, "hbm_bytes": moved}


@dataclass(frozen=True)
class Rows:
    """Rows of a pointwise operator."""

    rows: int
    width: int

    def work(self, operator: str, blocks: int, moved: float) -> dict[str, Any]:
        """Return a work's fields, with the bytes of each element that the kernel reads or writes."""
        total = moved * self.rows * self.width
        return {
            "operator": operator,
            "shape": f"{self.rows} x {self.width}",
            "blocks": blocks,
            "flops": 0.0,
            "l2_bytes": total,
            "hbm_bytes": total,
        }


LOSSES = (Loss(65536, 512), Loss(4096, 512), Loss(512, 512), Loss(128, 512))
# Shapes that only serve the order of backends. There, launches cost more than the kernels.
SMALL = ("B=512, D=512", "B=128, D=512")
# ViT-B of 224 pixels, the longest caption, short ones, other head dimensions of the same width, and long sequences.
ATTENTION = (
    Attention(256, 197, 12, 64),
    Attention(256, 256, 12, 64),
    Attention(256, 128, 12, 64),
    Attention(256, 197, 24, 32),
    Attention(256, 197, 8, 96),
    Attention(256, 197, 6, 128),
    Attention(64, 577, 12, 64),
    Attention(64, 577, 6, 128),
)
IMAGES = (Images(256, 480, 640, 224),)
TOKENS = 256 * 197  # a batch of 256 images
NORM, GELU, POOL = Rows(TOKENS, 768), Rows(TOKENS, 3072), Attention(256, 197, 12, 64)
