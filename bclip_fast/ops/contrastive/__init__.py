"""The symmetric contrastive (InfoNCE) loss of CLIP, without ever holding the matrix of similarities."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import Limits, choose, kernels

__all__ = ["LIMITS", "clip_loss", "default_chunk_size"]

LIMITS: Limits = {"reference": lambda image, text: None}


def clip_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """The mean of the image-to-text and text-to-image cross-entropies of S = logit_scale * image @ text.T + logit_bias.

    Row i of `image` belongs to row i of `text` (Radford et al. 2021, arXiv 2103.00020, figure 3). S is computed chunk
    by chunk and again in the backward, so memory is O(B * D + chunk_size * B) where the dense form takes O(B * B).

    Args:
        image, text: (B, D), the same dtype of float64, float32, bfloat16 or float16; usually of unit norm.
        logit_scale: the factor itself (open_clip passes exp of its parameter), a number or 0-dimensional tensor.
        logit_bias: added to every logit, likewise.
        chunk_size: rows of S at a time; 64 MiB worth of them unless given.
        backend: "auto" or one of `ops.BACKENDS`.

    Returns:
        0-dimensional, float64 for float64 inputs and float32 for all others, accumulated in that precision.
        Differentiable once in image, text, logit_scale and logit_bias.

    Raises:
        ValueError: shapes, dtypes or devices that don't fit; the message names them.
        BackendError: the named backend cannot run this call.
    """
    check_features(image, text)
    if image.shape[0] != text.shape[0]:
        raise ValueError(f"image and text must have as many rows, got {image.shape[0]} and {text.shape[0]}")
    backend = choose("clip_loss", LIMITS, backend, image, text)
    scale = as_scalar(logit_scale, image)
    bias = None if logit_bias is None else as_scalar(logit_bias, image)
    chunk_size = default_chunk_size(image.shape[0], text.shape[0]) if chunk_size is None else chunk_size
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    return _clip_loss(image, text, scale, bias, chunk_size, backend)[0]


def check_features(image: Tensor, text: Tensor) -> None:
    if image.dim() != 2 or text.dim() != 2 or image.shape[1] != text.shape[1]:
        raise ValueError(f"image and text must be (b, D) and (B, D), got {tuple(image.shape)} and {tuple(text.shape)}")
    if image.shape[0] == 0 or text.shape[0] == 0:
        raise ValueError("image and text need at least one row: the mean over no pairs isn't defined")
    if not image.is_floating_point() or image.dtype != text.dtype:
        raise ValueError(f"image and text must share a floating dtype, got {image.dtype} and {text.dtype}")
    if image.device != text.device:
        raise ValueError(f"image and text must be on one device, got {image.device} and {text.device}")


def as_scalar(value: Tensor | float, like: Tensor) -> Tensor:
    """A 0-dimensional tensor on the features' device, in the accumulation dtype; keeps the gradient's path."""
    dtype = accumulation_dtype(like)
    if not isinstance(value, Tensor):
        return torch.tensor(value, dtype=dtype, device=like.device)
    if value.numel() != 1:
        raise ValueError(f"logit_scale and logit_bias must hold one number, got shape {tuple(value.shape)}")
    return value.reshape(()).to(like.device, dtype)


def accumulation_dtype(features: Tensor) -> torch.dtype:
    return torch.float64 if features.dtype == torch.float64 else torch.float32


def default_chunk_size(num_rows: int, num_columns: int) -> int:
    return max(1, min(num_rows, (64 << 20) // (4 * num_columns)))


@torch.library.custom_op("bclip::clip_loss", mutates_args=())
def _clip_loss(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, chunk_size: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, row log-sum-exp (B,), column log-sum-exp (B,))"""
    row_lse, column_lse = kernels("contrastive", backend).lse(image, text, scale, bias, chunk_size)
    positive = positive_logits(image, text, scale, bias)
    return (row_lse + column_lse - 2 * positive).mean() / 2, row_lse, column_lse


@_clip_loss.register_fake
def _(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, chunk_size: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return scale.new_empty(()), scale.new_empty(image.shape[0]), scale.new_empty(text.shape[0])


@torch.library.custom_op("bclip::clip_loss_backward", mutates_args=())
def _clip_loss_backward(
    grad: Tensor,
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    row_lse: Tensor,
    column_lse: Tensor,
    chunk_size: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of image, text, scale and bias."""
    weight = grad / (2 * image.shape[0])
    return kernels("contrastive", backend).gradients(
        image, text, scale, bias, row_lse, column_lse, weight, 0, chunk_size
    )


@_clip_loss_backward.register_fake
def _(
    grad: Tensor,
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    row_lse: Tensor,
    column_lse: Tensor,
    chunk_size: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # Contiguous whatever the inputs' layout, as the kernels allocate them.
    return image.new_empty(image.shape), text.new_empty(text.shape), torch.empty_like(scale), torch.empty_like(scale)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    image, text, scale, bias, ctx.chunk_size, ctx.backend = inputs
    _, row_lse, column_lse = output
    ctx.mark_non_differentiable(row_lse, column_lse)
    ctx.save_for_backward(image, text, scale, bias, row_lse, column_lse)


def _backward(ctx, grad, _row, _column):  # type: ignore[no-untyped-def]
    saved = ctx.saved_tensors
    grads = _clip_loss_backward(grad, *saved, ctx.chunk_size, ctx.backend)
    return *grads[:3], (None if saved[3] is None else grads[3]), None, None


_clip_loss.register_autograd(_backward, setup_context=_setup)


def positive_logits(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """(b,) logits of the matching pairs, in the accumulation dtype."""
    dtype = accumulation_dtype(image)
    logits = scale * (image.to(dtype) * text.to(dtype)).sum(-1)
    return logits if bias is None else logits + bias
