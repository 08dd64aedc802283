"""The losses of a tile by their definition, on the whole matrix of similarities in plain torch.

reference.py computes the same losses in chunks and has the formulas. These functions give the derivatives that no
backend computes: see `bclip_fast.ops.derivatives`. They return sums over this tile's terms, so that a loss over ranks
is the sum of its ranks' tiles.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bclip_fast.ops.dtypes import widened

from .call import ClipCall, SiglipCall
from .groups import Groups, GroupTile


def operand(features: Tensor, dtype: torch.dtype) -> Tensor:
    """The features rounded to `dtype`, in the accumulation dtype. Their gradient isn't rounded."""
    if dtype == features.dtype:
        return widened(features)
    return features + (features.detach().to(dtype).to(features.dtype) - features.detach())


def softmax_terms(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    positives: slice,
    weight: float,
    hardness: float = 0.0,
    groups: Groups | None = None,
    merge_columns: Callable[[Tensor], Tensor] = lambda lse: lse,
) -> Tensor:
    """The softmax loss of the tile's rows (b, D), and of those columns (B, D) that `positives` selects.

    Args:
        positives: the columns that have a loss. Without groups, the first of them belong to the first rows.
        weight: factor of each row's and column's loss, without groups.
        groups: the positives and the weights, instead.
        merge_columns: merges the log-sum-exps (B,) of the columns over ranks.
    """
    cosines = image @ text.T
    logits = scale * cosines
    sharpened = logits
    num_pairs = min(len(image), positives.stop - positives.start)
    if hardness:
        is_positive = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
        is_positive.diagonal(positives.start)[:num_pairs] = True
        sharpened = logits + hardness * cosines.detach().masked_fill(is_positive, 0.0)
    rows, columns = sharpened.logsumexp(1), merge_columns(sharpened.logsumexp(0))
    if groups is None:
        positive = logits.diagonal(positives.start)[:num_pairs]
        return (weight * (rows[:num_pairs] + columns[positives][:num_pairs] - 2 * positive)).sum()
    row_weights, column_weights = groups.weights.to(logits.dtype).split([len(image), len(text)])
    tile = groups.tile
    positive_weights = groups.positive_weights.to(logits.dtype)[:, None] * (tile.rows[:, None] == tile.columns)
    terms = (row_weights * rows).sum() + (column_weights * columns)[positives].sum()
    return terms - (positive_weights * logits).sum()


def sigmoid_terms(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, first: int, weight: float, groups: GroupTile | None
) -> Tensor:
    """The sigmoid loss of the tile. Without groups, row i belongs to column `first` + i."""
    logits = scale * (image @ text.T)
    if bias is not None:
        logits = logits + bias
    if groups is None:
        is_positive = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
        is_positive.diagonal(first).fill_(True)
    else:
        is_positive = groups.rows[:, None] == groups.columns
    return (weight * F.softplus(torch.where(is_positive, -logits, logits), threshold=50)).sum()


def clip_loss(*inputs: object) -> Tensor:
    """The softmax loss of a `ClipCall`."""
    call = ClipCall(*inputs[:-1])  # type: ignore[arg-type]
    image, text = operand(call.image, call.dtype), operand(call.text, call.dtype)
    if call.image_ids is not None and call.text_ids is not None:
        groups = Groups.of(call.image_ids, call.image_ids, call.text_ids)
        return softmax_terms(image, text, call.scale, slice(0, len(text)), 1.0, groups=groups)
    num_pairs = call.num_pairs
    return softmax_terms(image, text, call.scale, slice(0, num_pairs), 1 / (2 * num_pairs), call.hardness)


def siglip_loss(*inputs: object) -> Tensor:
    """The sigmoid loss of a `SiglipCall`."""
    call = SiglipCall(*inputs[:-1])  # type: ignore[arg-type]
    image, text = operand(call.image, call.dtype), operand(call.text, call.dtype)
    groups = None
    if call.image_ids is not None and call.text_ids is not None:
        groups = Groups.of(call.image_ids, call.image_ids, call.text_ids).tile
    return sigmoid_terms(image, text, call.scale, call.bias, 0, 1 / len(image), groups)
