"""Calls of the operators: tiles, as every backend receives them, and complete losses, as in torch's schemas."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .groups import GroupTile


@dataclass(frozen=True)
class ContrastiveCall:
    """A tile of S = scale * image @ text.T + bias, b rows of images against B rows of text."""

    image: Tensor  # (b, D)
    text: Tensor  # (B, D)
    scale: Tensor  # ()
    positive_offset: int | None  # row of text that belongs to image 0, or None in a tile without positives
    chunk_size: int  # rows of S to compute at a time
    bias: Tensor | None = None  # (), for the sigmoid loss
    groups: GroupTile | None = None  # positives by group, instead of `positive_offset`


@dataclass(frozen=True)
class SoftmaxGradient:
    """The inputs of the softmax loss's gradient in addition to the tile."""

    rows_lse: Tensor  # (b,) float64: R
    columns_lse: Tensor  # (B,) float64: Q
    weight: Tensor  # (): w
    positive_grad: Tensor  # (b,): G / w at the positives, ignored without `positive_offset`
    hardness: float = 0.0


@dataclass(frozen=True)
class ClipCall:
    """A softmax loss. The first `num_pairs` rows of image and text belong together, unless there are ids."""

    image: Tensor
    text: Tensor
    scale: Tensor
    image_ids: Tensor | None
    text_ids: Tensor | None
    num_pairs: int
    hardness: float
    chunk_size: int
    dtype: torch.dtype  # dtype in which the features are multiplied
    keep_products: bool


@dataclass(frozen=True)
class SiglipCall:
    """A sigmoid loss. Rows of image and text belong together, unless there are ids."""

    image: Tensor
    text: Tensor
    scale: Tensor
    bias: Tensor | None
    image_ids: Tensor | None
    text_ids: Tensor | None
    chunk_size: int
    dtype: torch.dtype  # dtype in which the features are multiplied
    with_gradients: bool
