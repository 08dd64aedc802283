"""The contrastive losses of CLIP (softmax) and SigLIP (sigmoid), without ever holding the matrix of similarities."""

from __future__ import annotations

import torch
from torch import Tensor

from bclip_fast.ops.dispatch import choose

from . import clip_op, siglip_op
from .checks import (
    check_options,
    check_pairs,
    checked,
    checked_groups,
    checked_positive,
    ids_of_positive,
    operand_dtype_of,
    positives_first,
)
from .limits import LIMITS, shape_class
from .loss_terms import keeps_products

__all__ = ["LIMITS", "clip_loss", "siglip_loss"]


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

    Row i of `image` belongs to row i of `text` (Radford et al. 2021, arXiv 2103.00020, figure 3). Further rows of text
    are negatives of every image. The mean covers the images with a text and the texts with an image. The operator
    computes S chunk by chunk, and again in the backward pass. Memory is O(B * D + chunk_size * B) instead of the dense
    form's O(B * B). On a CPU without `chunk_size`, the operator keeps up to 64 MiB of float32 products for the backward
    pass instead.

    The sums exclude the positive logits, so loss and gradient stay exact when the softmax rounds to 1. With `groups`
    the sums include them, and the results have the rounding error of numbers near 1.

    Args:
        image, text: (b, D) and (B, D), both float64, float32, bfloat16 or float16, usually of unit norm. b <= B, unless
            `positive` or `groups` name the pairs.
        logit_scale: factor of the similarities, a number or 0-dimensional tensor. open_clip passes exp of its
            parameter.
        logit_bias: number or 0-dimensional tensor added to every logit. It cancels, so its gradient is 0.
        positive: (b,) int64: row of text of each image. An image with -1 is only a negative of the texts.
        groups: integer ids (B,) of the pairs, or ids (b,) of the images and (B,) of the texts. All images and texts
            with one id belong together: targets are uniform over a row's positives (Yang et al. 2022,
            arXiv 2204.03610).
        hardness: weight of hard negatives. The exponential of each negative is multiplied by
            exp(hardness * image . text), taken as a constant, in both directions (Lan et al. 2025, arXiv 2503.04812,
            equation 5, which uses 9).
        chunk_size: number of rows of S at a time, in float32. A GPU takes twice as many rows of a half-precision
            gradient in the same memory. The default fills 1 GiB, or on a CPU 8 MiB with at least 256 rows.
        operand_dtype: dtype to which the features are rounded before they are multiplied. Sums and gradients keep their
            precision. The default is the features' dtype. Under autocast, float32 features are multiplied in autocast's
            dtype on a CPU, whose matrix unit takes bfloat16, and in float16 on CUDA. For features of unit norm, the
            error of float16 is an eighth of bfloat16's. Features above 65504 make the loss NaN.
        deterministic: whether to refuse a backend whose bits may differ from run to run, on the same machine with the
            same number of threads. Our kernels always give the same bits. cuBLAS, which multiplies the gradients, needs
            an environment variable.
        backend: "auto" or one of `ops.BACKENDS`.

    Returns:
        0-dimensional loss, float64 for float64 inputs and float32 for all others, accumulated in that precision. It is
        differentiable in image, text, logit_scale and logit_bias: once, or any number of times and in forward mode with
        backend="reference", which then holds the matrix of similarities.

    Raises:
        ValueError: shapes, dtypes, devices or options are wrong. The message names them.
        BackendError: the named backend cannot run this call.
    """
    keep = chunk_size is None
    scale, bias, chunk_size = checked(image, text, logit_scale, logit_bias, chunk_size)
    dtype = operand_dtype_of(image, operand_dtype)
    shapes = shape_class(text)
    backend = choose("clip_loss", LIMITS, backend, image, text, dtype, deterministic, dtype=dtype, shapes=shapes)
    check_options(positive, groups, hardness)
    ids = checked_groups(image, text, groups)
    num_pairs = len(image)
    if positive is not None:
        image, text, num_pairs = positives_first(image, text, positive)
    elif groups is None:
        check_pairs(image, text)
    keep = keep and backend == "cpu" and groups is None and num_pairs == len(image)
    keep = keep and keeps_products(image, text, scale, dtype)
    flat = image, text, scale, *ids, num_pairs, float(hardness), chunk_size, dtype, keep
    loss = clip_op.clip_loss(*flat, backend)[0]
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

    Zhai et al. 2023, arXiv 2303.15343, algorithm 1. y = 1 for every pair that belongs together. b is the number of
    images. One pass computes the loss and its gradients. Arguments, result and errors are those of `clip_loss`.
    """
    scale, bias, chunk_size = checked(image, text, logit_scale, logit_bias, chunk_size)
    dtype = operand_dtype_of(image, operand_dtype)
    shapes = shape_class(text)
    backend = choose("siglip_loss", LIMITS, backend, image, text, dtype, deterministic, dtype=dtype, shapes=shapes)
    check_options(positive, groups)
    ids = checked_groups(image, text, groups)
    if positive is not None:
        ids = ids_of_positive(checked_positive(image, text, positive), len(text))
    elif groups is None:
        check_pairs(image, text)
    inputs = [tensor for tensor in (image, text, scale, bias) if tensor is not None]
    with_gradients = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    flat = image, text, scale, bias, *ids, chunk_size, dtype, with_gradients
    return siglip_op.siglip_loss(*flat, backend)[0]
