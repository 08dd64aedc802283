"""The contrastive losses of CLIP (softmax) and SigLIP (sigmoid), without ever holding the matrix of similarities."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..arguments import triton_refusal
from ..dispatch import Limits, choose, kernels

__all__ = ["LIMITS", "clip_loss", "default_chunk_size", "siglip_loss"]


def _triton_limits(image: Tensor, text: Tensor) -> str | None:
    reason = triton_refusal(image)
    if reason is not None:
        return reason
    if image.shape[1] > 2048:
        return f"D is {image.shape[1]}, more than 2048"
    return None


def _cpu_limits(image: Tensor, text: Tensor) -> str | None:
    if image.device.type != "cpu":
        return f"the features are on {image.device}"
    if image.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"{image.dtype} isn't among float32, bfloat16 and float16"
    return None


LIMITS: Limits = {"triton": _triton_limits, "cpu": _cpu_limits, "reference": lambda image, text: None}


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
    by chunk and again in the backward, so memory is O(B * D + chunk_size * B) where the dense form takes O(B * B). The
    positive logits stay out of the sums, so loss and gradient are exact also where the softmax rounds to 1.

    Args:
        image, text: (B, D), the same dtype of float64, float32, bfloat16 or float16; usually of unit norm.
        logit_scale: the factor itself (open_clip passes exp of its parameter), a number or 0-dimensional tensor.
        logit_bias: added to every logit, likewise.
        chunk_size: rows of S at a time; 8 MiB worth of them on a CPU and 1 GiB on an accelerator, unless given.
        backend: "auto" or one of `ops.BACKENDS`.

    Returns:
        0-dimensional, float64 for float64 inputs and float32 for all others, accumulated in that precision.
        Differentiable once in image, text, logit_scale and logit_bias.

    Raises:
        ValueError: shapes, dtypes or devices that don't fit; the message names them.
        BackendError: the named backend cannot run this call.
    """
    scale, bias, chunk_size = checked(image, text, logit_scale, logit_bias, chunk_size)
    backend = choose("clip_loss", LIMITS, backend, image, text)
    return _clip_loss(image, text, scale, bias, chunk_size, backend)[0]


def siglip_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """sum_ij softplus(-y_ij * S_ij) / B with S = logit_scale * image @ text.T + logit_bias, y = 1 for i = j, else -1.

    Zhai et al. 2023, arXiv 2303.15343, algorithm 1. Arguments, result and errors are those of `clip_loss`; gradients
    are computed with the loss, in one pass over S.
    """
    scale, bias, chunk_size = checked(image, text, logit_scale, logit_bias, chunk_size)
    backend = choose("siglip_loss", LIMITS, backend, image, text)
    wanted = [tensor for tensor in (image, text, scale, bias) if tensor is not None]
    with_gradients = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in wanted)
    return _siglip_loss(image, text, scale, bias, chunk_size, with_gradients, backend)[0]


def checked(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor | None, int]:
    """Scale, bias and chunk size as the backends take them; ValueError where an argument doesn't fit."""
    check_features(image, text)
    if image.shape[0] != text.shape[0]:
        raise ValueError(f"image and text must have as many rows, got {image.shape[0]} and {text.shape[0]}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    bias = None if logit_bias is None else as_scalar(logit_bias, image)
    return (
        as_scalar(logit_scale, image),
        bias,
        chunk_size or default_chunk_size(image.shape[0], text.shape[0], image.device),
    )


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


def default_chunk_size(num_rows: int, num_columns: int, device: torch.device) -> int:
    """Rows of S that fill 8 MiB in fp32 on a CPU, where caches reward small chunks, and 1 GiB on an accelerator."""
    budget = (8 if device.type == "cpu" else 1024) << 20
    return max(1, min(num_rows, budget // (4 * num_columns)))


def positive_gradient(rows_lse: Tensor, columns_lse: Tensor, positive: Tensor) -> Tensor:
    """dL/dS at the positives, before the weight: minus the probabilities that go astray in row and column."""
    return -((rows_lse - positive).sigmoid() + (columns_lse - positive).sigmoid())


@torch.library.custom_op("bclip::clip_loss", mutates_args=())
def _clip_loss(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, chunk_size: int, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, log-sum-exps of the negatives by row (B,) and by column (B,), positive logits (B,))"""
    rows, columns, positive = kernels("contrastive", backend).forward(image, text, scale, bias, 0, chunk_size)
    loss = (F.softplus(rows - positive) + F.softplus(columns - positive)).mean() / 2
    return loss, rows, columns, positive


@_clip_loss.register_fake
def _(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, chunk_size: int, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    size = image.shape[0]
    return scale.new_empty(()), scale.new_empty(size), scale.new_empty(size), scale.new_empty(size)


@torch.library.custom_op("bclip::clip_loss_backward", mutates_args=())
def _clip_loss_backward(
    grad: Tensor,
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    columns: Tensor,
    positive: Tensor,
    chunk_size: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of image, text, scale and bias."""
    weight = grad / (2 * image.shape[0])
    rows_lse, columns_lse = torch.logaddexp(rows, positive), torch.logaddexp(columns, positive)
    positive_grad = weight * positive_gradient(rows, columns, positive)
    return kernels("contrastive", backend).backward(
        image, text, scale, bias, 0, rows_lse, columns_lse, weight, positive_grad, chunk_size
    )


@_clip_loss_backward.register_fake
def _(
    grad: Tensor,
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    columns: Tensor,
    positive: Tensor,
    chunk_size: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # Contiguous whatever the inputs' layout, as the kernels allocate them.
    return image.new_empty(image.shape), text.new_empty(text.shape), torch.empty_like(scale), torch.empty_like(scale)


def _clip_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    image, text, scale, bias, ctx.chunk_size, ctx.backend = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(image, text, scale, bias, *output[1:])


def _clip_backward(ctx, grad, *_):  # type: ignore[no-untyped-def]
    saved = ctx.saved_tensors
    grads = _clip_loss_backward(grad, *saved, ctx.chunk_size, ctx.backend)
    return *grads[:3], (None if saved[3] is None else grads[3]), None, None


_clip_loss.register_autograd(_clip_backward, setup_context=_clip_setup)


@torch.library.custom_op("bclip::siglip_loss", mutates_args=())
def _siglip_loss(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    chunk_size: int,
    with_gradients: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, and its gradients for image, text, scale and bias)"""
    weight = 1 / image.shape[0]
    return kernels("contrastive", backend).siglip(image, text, scale, bias, 0, weight, chunk_size, with_gradients)


@_siglip_loss.register_fake
def _(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    chunk_size: int,
    with_gradients: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    image_grad = image.new_empty(image.shape if with_gradients else (0,))
    text_grad = text.new_empty(text.shape if with_gradients else (0,))
    return scale.new_empty(()), image_grad, text_grad, scale.new_empty(()), scale.new_empty(())


def _siglip_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.has_bias = inputs[3] is not None
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])


def _siglip_backward(ctx, grad, *_):  # type: ignore[no-untyped-def]
    image_grad, text_grad, scale_grad, bias_grad = ctx.saved_tensors
    bias = grad * bias_grad if ctx.has_bias else None
    # The product takes the wider dtype of the two; a gradient must have its input's.
    features = [(grad * tensor).to(tensor.dtype) for tensor in (image_grad, text_grad)]
    return *features, grad * scale_grad, bias, None, None, None


_siglip_loss.register_autograd(_siglip_backward, setup_context=_siglip_setup)
