"""The contrastive losses of CLIP (softmax) and SigLIP (sigmoid), without ever holding the matrix of similarities."""

from __future__ import annotations

import math
import os
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..cuda_device import cuda_refusal, differentiable_once, triton_refusal, without_autocast
from ..dispatch import Limits, choose, kernels
from ..dtypes import accumulation_dtype
from .loss_terms import (
    Groups,
    keeps_products,
    pair_losses,
    positive_gradient,
    positive_logits,
    siglip_gradient_dtype,
)

__all__ = ["LIMITS", "class_of", "clip_loss", "default_chunk_size", "siglip_loss"]


# A limit's inputs: the features, what they are multiplied in (their own dtype unless given), and whether results must
# be the same bits from run to run. All kernels of ours sum in a fixed order and use no atomics.


def _library_limits(
    image: Tensor, text: Tensor, dtype: torch.dtype | None = None, deterministic: bool = False
) -> str | None:
    """cuBLAS promises the same bits from run to run where its workspaces are given (NVIDIA, cuBLAS, 2.1.4)."""
    if deterministic and image.device.type == "cuda":
        if os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in (":4096:8", ":16:8"):
            return "deterministic=True needs CUBLAS_WORKSPACE_CONFIG=:4096:8 in the environment before CUDA starts"
    return None


def _triton_limits(
    image: Tensor, text: Tensor, dtype: torch.dtype | None = None, deterministic: bool = False
) -> str | None:
    reason = triton_refusal(image, dtype)
    if reason is not None:
        return reason
    if image.shape[1] > 2048:
        return f"D is {image.shape[1]}, more than 2048"
    return _library_limits(image, text, dtype, deterministic)


def _cuda_limits(
    image: Tensor, text: Tensor, dtype: torch.dtype | None = None, deterministic: bool = False
) -> str | None:
    return cuda_refusal(image, dtype) or _library_limits(image, text, dtype, deterministic)


def _cpu_limits(
    image: Tensor, text: Tensor, dtype: torch.dtype | None = None, deterministic: bool = False
) -> str | None:
    if image.device.type != "cpu":
        return f"the features are on {image.device}"
    dtype = dtype or image.dtype
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"{dtype} isn't among float32, bfloat16 and float16"
    return None


_FEATURES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

LIMITS: Limits = {
    "triton": _triton_limits,
    "cuda": _cuda_limits,
    "cpu": _cpu_limits,
    "reference": _library_limits,
}


def class_of(text: Tensor) -> str:
    """The class of shapes under which times are recorded."""
    if text.shape[0] <= 256:
        return "B <= 256"
    return "B <= 1024" if text.shape[0] <= 1024 else "B > 1024"


def clip_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    positive: Tensor | None = None,
    groups: Tensor | tuple[Tensor, Tensor] | None = None,
    hardness: float = 0.0,
    chunk_size: int | None = None,
    operand_dtype: torch.dtype | None = None,
    deterministic: bool = False,
    backend: str = "auto",
) -> Tensor:
    """The mean of the image-to-text and text-to-image cross-entropies of S = logit_scale * image @ text.T.

    Row i of `image` belongs to row i of `text` (Radford et al. 2021, arXiv 2103.00020, figure 3); further rows of text
    are negatives of every image. The mean is over images that have a text and texts that have an image. S is computed
    chunk by chunk and again in the backward: memory is O(B * D + chunk_size * B) where the dense form takes O(B * B).
    (On a CPU up to 64 MiB of float32 products are kept for the backward instead, unless `chunk_size` is given.)
    The positive logits stay out of the sums, so loss and gradient are exact also where the softmax rounds to 1; with
    `groups` they are in them, and exact to the rounding of 1.

    Args:
        image, text: (b, D) and (B, D), the same dtype of float64, float32, bfloat16 or float16; usually of unit norm;
            b <= B unless `positive` or `groups` say what belongs together.
        logit_scale: the factor itself (open_clip passes exp of its parameter), a number or 0-dimensional tensor.
        logit_bias: added to every logit, likewise. It cancels: its gradient is 0.
        positive: (b,) int64, the row of text that belongs to each image; -1 makes it a negative of the texts alone.
        groups: an integer id for each pair, (B,), or ids (b,) of the images and (B,) of the texts. All images and texts
            of one id belong together: targets are uniform over a row's positives (Yang et al. 2022, arXiv 2204.03610).
        hardness: multiplies the exponential of each negative by exp(hardness * image . text), taken as a constant
            (Lan et al. 2025, arXiv 2503.04812, equation 5, with 9 there), in both directions.
        chunk_size: rows of S at a time; unless given, 1 GiB worth of them, on a CPU 8 MiB but not fewer than 256.
        operand_dtype: what the features are rounded to before they are multiplied; sums and gradients are not. The
            features' own unless given, but under autocast, where float32 features are multiplied in half precision:
            float16 on CUDA, whose error is an eighth of bfloat16's for features of unit norm (up to 65504, beyond which
            the loss is not a number), and autocast's dtype on a CPU, whose matrix unit knows bfloat16.
        deterministic: refuses a backend that might not give the same bits from run to run, on the same machine with as
            many threads. Ours all do; cuBLAS, which multiplies gradients, must be told by the environment.
        backend: "auto" or one of `ops.BACKENDS`.

    Returns:
        0-dimensional, float64 for float64 inputs and float32 for all others, accumulated in that precision.
        Differentiable once in image, text, logit_scale and logit_bias.

    Raises:
        ValueError: shapes, dtypes, devices or options that don't fit; the message names them.
        BackendError: the named backend cannot run this call.
    """
    keep = chunk_size is None
    scale, bias, chunk_size = checked(image, text, logit_scale, logit_bias, chunk_size)
    dtype = operands_of(image, operand_dtype)
    shapes = class_of(text)
    backend = choose("clip_loss", LIMITS, backend, image, text, dtype, deterministic, dtype=dtype, shapes=shapes)
    check_options(positive, groups, hardness)
    ids = checked_groups(image, text, groups)
    num_pairs = len(image)
    if positive is not None:
        image, text, num_pairs = _with_positives_first(image, text, positive)
    elif groups is None:
        check_pairs(image, text)
    keep = keep and backend == "cpu" and groups is None and num_pairs == len(image)
    keep = keep and keeps_products(image, text, scale, dtype)
    arguments = image, text, scale, *ids, num_pairs, float(hardness), chunk_size, dtype, keep, backend
    loss = _DirectClipLoss.apply(*arguments) if _in_plain_eager(image, text, scale) else _clip_loss(*arguments)[0]
    return loss if bias is None else loss + 0.0 * bias


def siglip_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    positive: Tensor | None = None,
    groups: Tensor | tuple[Tensor, Tensor] | None = None,
    chunk_size: int | None = None,
    operand_dtype: torch.dtype | None = None,
    deterministic: bool = False,
    backend: str = "auto",
) -> Tensor:
    """sum_ij softplus(-y_ij * S_ij) / b with S = logit_scale * image @ text.T + logit_bias, y = 1 for i = j, else -1.

    Zhai et al. 2023, arXiv 2303.15343, algorithm 1. Arguments, result and errors are those of `clip_loss`; y = 1 for
    every pair that belongs together, b is the number of images. Gradients are computed with the loss, in one pass.
    """
    scale, bias, chunk_size = checked(image, text, logit_scale, logit_bias, chunk_size)
    dtype = operands_of(image, operand_dtype)
    shapes = class_of(text)
    backend = choose("siglip_loss", LIMITS, backend, image, text, dtype, deterministic, dtype=dtype, shapes=shapes)
    check_options(positive, groups)
    ids = checked_groups(image, text, groups)
    if positive is not None:
        ids = _ids_of(checked_positive(image, text, positive), len(text))
    elif groups is None:
        check_pairs(image, text)
    wanted = [tensor for tensor in (image, text, scale, bias) if tensor is not None]
    with_gradients = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in wanted)
    arguments = image, text, scale, bias, *ids, chunk_size, dtype, with_gradients, backend
    if _in_plain_eager(*wanted):
        return _DirectSigLipLoss.apply(*arguments)
    return _siglip_loss(*arguments)[0]


def checked(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor | None, int]:
    """Scale, bias and chunk size as the backends take them; ValueError where an argument doesn't fit."""
    check_features(image, text)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    bias = None if logit_bias is None else as_scalar(logit_bias, image)
    return (
        as_scalar(logit_scale, image),
        bias,
        chunk_size or default_chunk_size(image.shape[0], text.shape[0], image.device),
    )


def operands_of(image: Tensor, asked: torch.dtype | None) -> torch.dtype:
    """What these features are multiplied in; `asked` and autocast as the docstring of `clip_loss` says."""
    device = image.device.type
    known = torch.amp.is_autocast_available(device)
    autocast = torch.get_autocast_dtype(device) if known and torch.is_autocast_enabled(device) else None
    return operand_dtype_for(image.dtype, device, asked, autocast)


def operand_dtype_for(
    features: torch.dtype, device: str, asked: torch.dtype | None, autocast: torch.dtype | None
) -> torch.dtype:
    if asked is not None:
        if not asked.is_floating_point or asked.itemsize > features.itemsize or asked.itemsize < 2:
            raise ValueError(f"operand_dtype must be a floating dtype no wider than the features, {features}: {asked}")
        return asked
    if features != torch.float32 or autocast is None:
        return features
    return torch.float16 if device == "cuda" else autocast


def _in_plain_eager(*tensors: Tensor) -> bool:
    """Whether nothing watches the call: torch.library's dispatch, some 50 us of it, may then be left out."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in tensors)


def check_options(positive: Tensor | None, groups: object, hardness: float = 0.0) -> None:
    if positive is not None and groups is not None:
        raise ValueError("positive and groups both say which texts belong to an image: pass one of them")
    if groups is not None and hardness:
        raise ValueError("hardness with groups isn't defined here: the positives share their sums with the negatives")
    if not -math.inf < hardness < math.inf:  # isfinite would break a graph of dynamic shapes
        raise ValueError(f"hardness must be a finite number, got {hardness}")


def check_pairs(image: Tensor, text: Tensor) -> None:
    if image.shape[0] > text.shape[0]:
        raise ValueError(
            f"image and text must have as many rows, or text more, got {image.shape[0]} and {text.shape[0]}: "
            "pass positive= (each image's row of text, or -1) or groups="
        )


def checked_groups(
    image: Tensor, text: Tensor, groups: Tensor | tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """(ids of the images (b,), ids of the texts (B,)), or Nones."""
    if groups is None:
        return None, None
    if not isinstance(groups, Tensor) and not (isinstance(groups, tuple) and len(groups) == 2):
        raise ValueError(f"groups must be a tensor of ids or one for the images and one for the texts, got {groups!r}")
    image_ids, text_ids = (groups, groups) if isinstance(groups, Tensor) else groups
    for name, ids, features in (("images", image_ids, image), ("texts", text_ids, text)):
        if ids.shape != features.shape[:1] or ids.is_floating_point() or ids.is_complex():
            raise ValueError(
                f"groups of the {name} must be {features.shape[0]} integers, got {ids.dtype} {tuple(ids.shape)}"
            )
    return image_ids.to(image.device, torch.int64), text_ids.to(image.device, torch.int64)


def checked_positive(image: Tensor, text: Tensor, positive: Tensor) -> Tensor:
    """Every image's row of text or -1, on the features' device."""
    if positive.shape != image.shape[:1] or positive.dtype != torch.int64:
        raise ValueError(f"positive must be {image.shape[0]} int64, got {positive.dtype} {tuple(positive.shape)}")
    rows = positive.tolist()
    if min(rows) < -1 or max(rows) >= text.shape[0] or max(rows) == -1:
        raise ValueError(
            f"positive must hold rows of text below {text.shape[0]}, or -1 where there is none, and one at least; "
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


def _with_positives_first(image: Tensor, text: Tensor, positive: Tensor) -> tuple[Tensor, Tensor, int]:
    """Image and text in an order where row i of the first n belongs to row i, and n."""
    positive = checked_positive(image, text, positive)
    has, has_not = ((positive < 0).argsort(stable=True)).split(
        [num_pairs := int((positive >= 0).sum()), len(positive) - num_pairs]
    )
    rest = torch.ones(len(text), dtype=torch.bool, device=text.device)
    rest[positive[has]] = False
    order = torch.cat([positive[has], rest.nonzero()[:, 0]])
    return image.index_select(0, torch.cat([has, has_not])), text.index_select(0, order), num_pairs


def _ids_of(positive: Tensor, num_texts: int) -> tuple[Tensor, Tensor]:
    """Groups of one image and one text each: the images' ids are their rows, a text that has none gets -1."""
    image_ids = torch.arange(len(positive), device=positive.device)
    text_ids = torch.full((num_texts,), -1, device=positive.device)
    text_ids[positive[positive >= 0]] = image_ids[positive >= 0]
    return image_ids, text_ids


def check_features(image: Tensor, text: Tensor) -> None:
    if image.dim() != 2 or text.dim() != 2 or image.shape[1] != text.shape[1]:
        raise ValueError(f"image and text must be (b, D) and (B, D), got {tuple(image.shape)} and {tuple(text.shape)}")
    if image.shape[0] == 0 or text.shape[0] == 0 or image.shape[1] == 0:
        raise ValueError(
            f"image and text need at least one row, the mean over no pairs isn't defined, and one column, got "
            f"{tuple(image.shape)} and {tuple(text.shape)}"
        )
    if image.dtype not in _FEATURES or image.dtype != text.dtype:
        raise ValueError(
            f"image and text must share a dtype of float64, float32, bfloat16 or float16, got {image.dtype} and "
            f"{text.dtype}"
        )
    if image.device != text.device:
        raise ValueError(f"image and text must be on one device, got {image.device} and {text.device}")


def as_scalar(value: Tensor | float, like: Tensor) -> Tensor:
    """A 0-dimensional tensor on the features' device, in the accumulation dtype; keeps the gradient's path."""
    dtype = accumulation_dtype(like)
    if not isinstance(value, Tensor):
        # Written there by a kernel: a copy would wait for the device, which a CUDA graph forbids.
        return torch.full((), value, dtype=dtype, device=like.device)
    if value.numel() != 1:
        raise ValueError(f"logit_scale and logit_bias must hold one number, got shape {tuple(value.shape)}")
    return value.reshape(()).to(like.device, dtype)


def default_chunk_size(num_rows: int, num_columns: int, device: torch.device) -> int:
    """Rows of S that fill 8 MiB in fp32 on a CPU, where caches reward small chunks, and 1 GiB on an accelerator.

    On a CPU not fewer than 256, below which matmuls slow down.
    """
    budget, least = (8 << 20, 256) if device.type == "cpu" else (1 << 30, 1)
    return min(num_rows, max(least, budget // (4 * num_columns)))


@without_autocast
def _clip_forward(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    num_pairs: int,
    hardness: float,
    chunk_size: int,
    dtype: torch.dtype,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, log-sum-exps by row (b,) and by column (B,), positive logits (num_pairs,), products (b, B) or nothing).

    The log-sum-exps are those of the negatives, or with ids of all pairs; then there are no positive logits. They and
    the positive logits are float64. The products of all pairs of rows are there where `keep` asks for them.
    """
    image, text = image.to(dtype), text.to(dtype)
    forward = kernels("contrastive", backend).forward
    products = image.new_empty((len(image), len(text)) if keep else (0,), dtype=torch.float32)
    if image_ids is not None and text_ids is not None:
        groups = Groups.of(image_ids, image_ids, text_ids)
        rows, columns = forward(image, text, scale, None, chunk_size)
        loss = (groups.row_weights * rows).sum() + (groups.column_weights * columns).sum()
        loss = loss - groups.positives(image, text, scale)
        return loss.to(scale.dtype), rows, columns, rows.new_empty(0), products
    sharpness = scale + hardness if hardness else scale
    kept = {"products": products} if keep else {}
    rows, columns = forward(image[:num_pairs], text, sharpness, 0, chunk_size, **kept)
    if num_pairs < len(image):
        own = columns[:num_pairs]
        others = forward(image[num_pairs:], text[:num_pairs], sharpness, None, chunk_size)[1]
        torch.logaddexp(own, others, out=own)
    positive = positive_logits(image[:num_pairs], text[:num_pairs], scale)
    loss = pair_losses(rows, columns[:num_pairs], positive).mean() / 2
    return loss.to(scale.dtype), rows, columns, positive, products


_clip_loss = torch.library.custom_op("bclip::clip_loss", _clip_forward, mutates_args=())


@_clip_loss.register_fake
def _(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    num_pairs: int,
    hardness: float,
    chunk_size: int,
    dtype: torch.dtype,
    keep: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    paired = num_pairs if image_ids is None else 0
    sizes = num_pairs if image_ids is None else len(image), len(text), paired
    sums = (scale.new_empty(size, dtype=torch.float64) for size in sizes)
    products = scale.new_empty((len(image), len(text)) if keep else (0,), dtype=torch.float32)
    return scale.new_empty(()), *sums, products


@without_autocast
def _clip_gradients(
    grad: Tensor,
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    rows: Tensor,
    columns: Tensor,
    positive: Tensor,
    products: Tensor,
    num_pairs: int,
    hardness: float,
    chunk_size: int,
    dtype: torch.dtype,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of image, text and scale."""
    result, wide = image.dtype, accumulation_dtype(image)
    image, text = image.to(dtype), text.to(dtype)
    backward = partial(kernels("contrastive", backend).backward, hardness=hardness)
    if image_ids is not None and text_ids is not None:
        groups = Groups.of(image_ids, image_ids, text_ids)
        lse = groups.raised(rows, columns)
        weight = grad * groups.weight
        return backward(image, text, scale, None, *lse, weight, positive, chunk_size, result, groups=groups)
    weight = grad / (2 * num_pairs)
    own = columns[:num_pairs]
    rows_lse, columns_lse = torch.logaddexp(rows, positive), torch.full_like(columns, torch.inf)
    torch.logaddexp(own, positive, out=columns_lse[:num_pairs])
    positive_grad = (weight * positive_gradient(rows, own, positive)).to(scale.dtype)
    if num_pairs == len(image):
        saved = rows_lse, columns_lse, weight, positive_grad
        kept = {"products": products} if keep else {}
        return backward(image, text, scale, 0, *saved, chunk_size, result, **kept)
    # Images without a text of their own are negatives of the texts that have an image.
    pairs, others = image.tensor_split([num_pairs])
    saved = rows_lse, columns_lse, weight, positive_grad
    image_grad, text_grad, scale_grad = backward(pairs, text, scale, 0, *saved, chunk_size, wide)
    saved = rows.new_full((len(others),), torch.inf), columns_lse[:num_pairs], weight, positive_grad
    rest = backward(others, text[:num_pairs], scale, None, *saved, chunk_size, wide)
    text_grad[:num_pairs] += rest[1]
    return torch.cat([image_grad, rest[0]]).to(result), text_grad.to(result), scale_grad + rest[2]


_clip_loss_backward = torch.library.custom_op("bclip::clip_loss_backward", _clip_gradients, mutates_args=())


@_clip_loss_backward.register_fake
def _(
    grad: Tensor,
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    rows: Tensor,
    columns: Tensor,
    positive: Tensor,
    products: Tensor,
    num_pairs: int,
    hardness: float,
    chunk_size: int,
    dtype: torch.dtype,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    # Contiguous whatever the inputs' layout, as the kernels allocate them.
    return image.new_empty(image.shape), text.new_empty(text.shape), torch.empty_like(scale)


def _clip_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.options = inputs[5:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:5], *output[1:])


def _clip_backward(ctx, grad, *_):  # type: ignore[no-untyped-def]
    return *_clip_loss_backward(grad, *ctx.saved_tensors, *ctx.options), *[None] * 8


_clip_loss.register_autograd(_clip_backward, setup_context=_clip_setup)


class _DirectClipLoss(torch.autograd.Function):
    """`_clip_loss` without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:  # type: ignore[override]
        output = _clip_forward(*inputs)
        ctx.options = inputs[5:]
        ctx.save_for_backward(*inputs[:5], *output[1:])
        return output[0]

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return *_clip_gradients(grad, *ctx.saved_tensors, *ctx.options), *[None] * 8


@without_autocast
def _siglip_forward(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    chunk_size: int,
    dtype: torch.dtype,
    with_gradients: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, and its gradients for image, text, scale and bias)"""
    siglip, weight, result = kernels("contrastive", backend).siglip, 1 / image.shape[0], siglip_gradient_dtype(image)
    features, image, text = image.dtype, image.to(dtype), text.to(dtype)
    groups = first = None
    if image_ids is None or text_ids is None:
        first = 0
    else:
        groups = Groups.of(image_ids, image_ids, text_ids)
    loss, *gradients = siglip(
        image, text, scale, bias, first, weight, chunk_size, result, with_gradients, groups=groups
    )
    if not with_gradients:
        gradients[:2] = image.new_empty(0, dtype=features), image.new_empty(0, dtype=features)
    return loss, *gradients


_siglip_loss = torch.library.custom_op("bclip::siglip_loss", _siglip_forward, mutates_args=())


@_siglip_loss.register_fake
def _(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    chunk_size: int,
    dtype: torch.dtype,
    with_gradients: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    result = siglip_gradient_dtype(image) if with_gradients else image.dtype
    image_grad = image.new_empty(image.shape if with_gradients else (0,), dtype=result)
    text_grad = text.new_empty(text.shape if with_gradients else (0,), dtype=result)
    return scale.new_empty(()), image_grad, text_grad, scale.new_empty(()), scale.new_empty(())


def _siglip_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.has_bias, ctx.dtype = inputs[3] is not None, inputs[0].dtype
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])


def _siglip_backward(ctx, grad, *_):  # type: ignore[no-untyped-def]
    image_grad, text_grad, scale_grad, bias_grad = ctx.saved_tensors[:4]
    bias = grad * bias_grad if ctx.has_bias else None
    features = [(grad * tensor).to(ctx.dtype) for tensor in (image_grad, text_grad)]
    return *features, grad * scale_grad, bias, *[None] * 6


_siglip_loss.register_autograd(_siglip_backward, setup_context=_siglip_setup)


class _DirectSigLipLoss(torch.autograd.Function):
    """`_siglip_loss` without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:  # type: ignore[override]
        output = _siglip_forward(*inputs)
        ctx.has_bias, ctx.dtype = inputs[3] is not None, inputs[0].dtype
        ctx.save_for_backward(*output[1:], *inputs[:4])
        return output[0]

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return _siglip_backward(ctx, grad)
