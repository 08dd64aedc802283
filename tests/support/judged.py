"""The oracle, with the definition and the formula of each operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import formulas
import torch
from oracle import assert_as_accurate_as_eager
from targets import dense, dense_siglip
from torch import Tensor

from bclip_fast.ops.attention import reference
from bclip_fast.ops.attention.single_query import reference as pooled
from bclip_fast.ops.contrastive import reference as contrastive

Draw = Callable[[], Sequence[Tensor]]


def judge_attention(
    kernel: Callable[[Tensor], Tensor], options: tuple[Any, ...], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """`kernel` of qkv (T, 3, H, d), with `options` as `reference.attention` has them and the `shape` (T, H, d)."""
    assert_as_accurate_as_eager(
        lambda *parts: kernel(torch.stack(parts, 1)),
        lambda *parts: reference.attention(torch.stack(parts, 1), *options),
        lambda: [torch.randn(shape).to(dtype) for _ in range(3)],
        formulas.attention(*options),
    )


def judge_pooled_attention(
    kernel: Callable[[Tensor, Tensor], Tensor],
    options: tuple[Any, ...],
    num_rows: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> None:
    """`kernel` of queries (n, H, d), and keys and values (T, 2, H, d), with the `shape` (n, H, d)."""
    assert_as_accurate_as_eager(
        lambda query, *pairs: kernel(query, torch.stack(pairs, 1)),
        lambda query, *pairs: pooled.attention(query, torch.stack(pairs, 1), *options),
        lambda: [torch.randn(rows, *shape[1:]).to(dtype) for rows in (shape[0], num_rows, num_rows)],
        formulas.pooled_attention(*options),
        # Sequences of hundreds of keys, with one query each, have too few rows for the smallest factor.
        4 if num_rows > 300 else None,
    )


def judge_clip_loss(
    kernel: Callable[..., Tensor],
    draw: Draw,
    same: Tensor | None = None,
    hardness: float = 0.0,
    draws: int | None = None,
) -> None:
    """`kernel` of image, text, scale and perhaps a bias; `same` (b, B) marks the positives, unless they pair up."""
    definition = contrastive.dense if same is None else lambda *inputs: dense(*inputs, same, hardness)
    assert_as_accurate_as_eager(kernel, definition, draw, formulas.clip_loss(same, hardness), draws)


def judge_siglip_loss(
    kernel: Callable[..., Tensor], draw: Draw, same: Tensor | None = None, draws: int | None = None
) -> None:
    """`kernel` of image, text, scale and bias."""
    definition = contrastive.dense_siglip if same is None else lambda *inputs: dense_siglip(*inputs, same)
    assert_as_accurate_as_eager(kernel, definition, draw, formulas.siglip_loss(same), draws)
