"""Checks of the losses' arguments, and the values that the backends take instead of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bclip_fast.ops.dtypes import accumulation_dtype, has_autocast

_FEATURES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def checked(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor | None, int]:
    """Scale, bias and chunk size as the backends take them. Raises ValueError if an argument is wrong."""
    check_features(image, text)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    bias = None if logit_bias is None else as_scalar(logit_bias, image)
    return (
        as_scalar(logit_scale, image),
        bias,
        chunk_size or default_chunk_size(image.shape[0], text.shape[0], image.device),
    )


def operand_dtype_of(image: Tensor, requested: torch.dtype | None) -> torch.dtype:
    """The dtype in which these features are multiplied. `clip_loss` describes `requested` and autocast."""
    device = image.device.type
    enabled = has_autocast(device) and torch.is_autocast_enabled(device)
    return operand_dtype_for(image.dtype, device, requested, torch.get_autocast_dtype(device) if enabled else None)


def operand_dtype_for(
    features: torch.dtype, device: str, requested: torch.dtype | None, autocast: torch.dtype | None
) -> torch.dtype:
    """`operand_dtype_of` for features of a dtype and kind of device, under autocast to a dtype or None."""
    if requested is not None:
        size = requested.itemsize
        if not requested.is_floating_point or size > features.itemsize or size < 2:
            raise ValueError(
                f"operand_dtype must be a floating dtype no wider than the features, {features}: {requested}"
            )
        return requested
    if features != torch.float32 or autocast is None:
        return features
    return torch.float16 if device == "cuda" else autocast


def check_options(positive: Tensor | None, groups: object, hardness: float = 0.0) -> None:
    """Raise ValueError for options that exclude each other, and for a hardness that isn't finite."""
    if positive is not None and groups is not None:
        raise ValueError("positive and groups both name the texts of an image: pass one of them")
    if groups is not None and hardness:
        raise ValueError("hardness with groups isn't defined: positives and negatives share their sums")
    if not -math.inf < hardness < math.inf:  # math.isfinite would break a graph with dynamic shapes
        raise ValueError(f"hardness must be a finite number, got {hardness}")


def check_pairs(image: Tensor, text: Tensor) -> None:
    """Raise ValueError if an image has no row of text."""
    if image.shape[0] > text.shape[0]:
        raise ValueError(
            f"text needs at least as many rows as image, got {image.shape[0]} images and {text.shape[0]} texts: "
            "pass positive= (each image's row of text, or -1) or groups="
        )


def checked_groups(
    image: Tensor, text: Tensor, groups: Tensor | tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """(ids of the images (b,), ids of the texts (B,)), or two Nones."""
    if groups is None:
        return None, None
    if not isinstance(groups, Tensor) and not (isinstance(groups, tuple) and len(groups) == 2):
        raise ValueError(f"groups must be a tensor of ids, or a pair of tensors for images and texts, got {groups!r}")
    image_ids, text_ids = (groups, groups) if isinstance(groups, Tensor) else groups
    for name, ids, features in (("images", image_ids, image), ("texts", text_ids, text)):
        if ids.shape != features.shape[:1] or ids.is_floating_point() or ids.is_complex():
            raise ValueError(
                f"groups of the {name} must be {features.shape[0]} integers, got {ids.dtype} {tuple(ids.shape)}"
            )
    return image_ids.to(image.device, torch.int64), text_ids.to(image.device, torch.int64)


def checked_positive(image: Tensor, text: Tensor, positive: Tensor) -> Tensor:
    """The row of text of every image, or -1, on the features' device."""
    if positive.shape != image.shape[:1] or positive.dtype != torch.int64:
        raise ValueError(f"positive must be {image.shape[0]} int64, got {positive.dtype} {tuple(positive.shape)}")
    rows = positive.tolist()
    if min(rows) < -1 or max(rows) >= text.shape[0] or max(rows) == -1:
        raise ValueError(
            f"positive must hold rows of text below {text.shape[0]}, or -1 for no text, and at least one row of text; "
            f"got {min(rows)} to {max(rows)}"
        )
    seen: dict[int, int] = {}
    for row, column in enumerate(rows):
        if column >= 0 and seen.setdefault(column, row) != row:
            raise ValueError(
                f"positive: images {seen[column]} and {row} have the same text {column}; "
                "for several positives pass groups="
            )
    return positive.to(image.device)


def positives_first(image: Tensor, text: Tensor, positive: Tensor) -> tuple[Tensor, Tensor, int]:
    """Image and text reordered so that the first n rows belong together, and n."""
    positive = checked_positive(image, text, positive)
    with_text, without_text = ((positive < 0).argsort(stable=True)).split(
        [num_pairs := int((positive >= 0).sum()), len(positive) - num_pairs]
    )
    unpaired = torch.ones(len(text), dtype=torch.bool, device=text.device)
    unpaired[positive[with_text]] = False
    order = torch.cat([positive[with_text], unpaired.nonzero()[:, 0]])
    return image.index_select(0, torch.cat([with_text, without_text])), text.index_select(0, order), num_pairs


def ids_of_positive(positive: Tensor, num_texts: int) -> tuple[Tensor, Tensor]:
    """Ids that pair each image with its text. An image's id is its row. A text without an image has the id -1."""
    image_ids = torch.arange(len(positive), device=positive.device)
    text_ids = torch.full((num_texts,), -1, device=positive.device)
    text_ids[positive[positive >= 0]] = image_ids[positive >= 0]
    return image_ids, text_ids


def check_features(image: Tensor, text: Tensor) -> None:
    """Raise ValueError if shapes, dtypes or devices of the features are wrong."""
    if image.dim() != 2 or text.dim() != 2 or image.shape[1] != text.shape[1]:
        raise ValueError(f"image and text must be (b, D) and (B, D), got {tuple(image.shape)} and {tuple(text.shape)}")
    if image.shape[0] == 0 or text.shape[0] == 0 or image.shape[1] == 0:
        raise ValueError(
            f"image and text need at least one row and one column, got {tuple(image.shape)} and {tuple(text.shape)}: "
            "the mean over no pairs isn't defined"
        )
    if image.dtype not in _FEATURES or image.dtype != text.dtype:
        raise ValueError(
            f"image and text must share a dtype of float64, float32, bfloat16 or float16, got {image.dtype} and "
            f"{text.dtype}"
        )
    if image.device != text.device:
        raise ValueError(f"image and text must be on one device, got {image.device} and {text.device}")


def as_scalar(value: Tensor | float, like: Tensor) -> Tensor:
    """The number as a differentiable 0-dimensional tensor on the features' device, in the accumulation dtype."""
    dtype = accumulation_dtype(like)
    if not isinstance(value, Tensor):
        # A kernel writes the number. A copy would wait for the device, which a CUDA graph forbids.
        return torch.full((), value, dtype=dtype, device=like.device)
    if value.numel() != 1:
        raise ValueError(f"logit_scale and logit_bias must hold one number, got shape {tuple(value.shape)}")
    return value.reshape(()).to(like.device, dtype)


def default_chunk_size(num_rows: int, num_columns: int, device: torch.device) -> int:
    """The number of rows of S that fill 8 MiB in fp32 on a CPU, where small chunks stay in cache, or 1 GiB elsewhere.

    A CPU takes at least 256 rows, because smaller matmuls are slower.
    """
    budget, least = (8 << 20, 256) if device.type == "cpu" else (1 << 30, 1)
    return min(num_rows, max(least, budget // (4 * num_columns)))
