"""The softmax loss's registration with torch: its schema, fake and gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bclip_fast.ops import custom_op
from bclip_fast.ops.dispatch import load_backend
from bclip_fast.ops.dtypes import accumulation_dtype

from .call import ClipCall, ContrastiveCall, SoftmaxGradient
from .groups import Groups
from .loss_terms import pair_losses, positive_gradient, positive_logits


@custom_op.without_autocast
def _forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, log-sum-exps by row (b,) and by column (B,), positive logits (num_pairs,), products (b, B) or empty).

    The log-sum-exps are those of the negatives. With ids they are those of all pairs, and there are no positive logits.
    Both are float64. The products are those of all rows of image and text, if `keep_products` asks for them.
    """
    call = ClipCall(*inputs[:-1])
    image, text, scale = call.image.to(call.dtype), call.text.to(call.dtype), call.scale
    forward = load_backend("contrastive", inputs[-1]).forward
    shape = (len(image), len(text)) if call.keep_products else (0,)
    products = image.new_empty(shape, dtype=torch.float32)
    if call.image_ids is not None and call.text_ids is not None:
        groups = Groups.of(call.image_ids, call.image_ids, call.text_ids)
        rows, columns = forward(ContrastiveCall(image, text, scale, None, call.chunk_size))
        loss = (groups.row_weights * rows).sum() + (groups.column_weights * columns).sum()
        loss = loss - groups.positives(image, text, scale)
        return loss.to(scale.dtype), rows, columns, rows.new_empty(0), products
    num_pairs = call.num_pairs
    sharpness = scale + call.hardness if call.hardness else scale
    kept = {"products": products} if call.keep_products else {}
    rows, columns = forward(ContrastiveCall(image[:num_pairs], text, sharpness, 0, call.chunk_size), **kept)
    if num_pairs < len(image):
        pair_columns = columns[:num_pairs]
        unpaired = ContrastiveCall(image[num_pairs:], text[:num_pairs], sharpness, None, call.chunk_size)
        torch.logaddexp(pair_columns, forward(unpaired)[1], out=pair_columns)
    positive = positive_logits(image[:num_pairs], text[:num_pairs], scale)
    loss = pair_losses(rows, columns[:num_pairs], positive).mean() / 2
    return loss.to(scale.dtype), rows, columns, positive, products


def _forward_fake(*inputs: Any) -> tuple[Tensor, ...]:
    call = ClipCall(*inputs[:-1])
    scale, num_images, num_texts = call.scale, call.image.shape[0], call.text.shape[0]
    paired = call.num_pairs if call.image_ids is None else 0
    sizes = call.num_pairs if call.image_ids is None else num_images, num_texts, paired
    sums = (scale.new_empty(size, dtype=torch.float64) for size in sizes)
    products = scale.new_empty((num_images, num_texts) if call.keep_products else (0,), dtype=torch.float32)
    return scale.new_empty(()), *sums, products


@custom_op.without_autocast
def _backward(
    grad: Tensor, rows: Tensor, columns: Tensor, positive: Tensor, products: Tensor, *inputs: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of image, text and scale."""
    call = ClipCall(*inputs[:-1])
    result, wide = call.image.dtype, accumulation_dtype(call.image)
    image, text, scale, chunk_size = call.image.to(call.dtype), call.text.to(call.dtype), call.scale, call.chunk_size
    backward = load_backend("contrastive", inputs[-1]).backward
    if call.image_ids is not None and call.text_ids is not None:
        groups = Groups.of(call.image_ids, call.image_ids, call.text_ids)
        upstream = SoftmaxGradient(*groups.raised(rows, columns), grad * groups.weight, positive, call.hardness)
        return backward(ContrastiveCall(image, text, scale, None, chunk_size, groups=groups), upstream, result)
    num_pairs = call.num_pairs
    weight = grad / (2 * num_pairs)
    pair_columns = columns[:num_pairs]
    rows_lse, columns_lse = torch.logaddexp(rows, positive), torch.full_like(columns, torch.inf)
    torch.logaddexp(pair_columns, positive, out=columns_lse[:num_pairs])
    positive_grad = (weight * positive_gradient(rows, pair_columns, positive)).to(scale.dtype)
    upstream = SoftmaxGradient(rows_lse, columns_lse, weight, positive_grad, call.hardness)
    if num_pairs == len(image):
        kept = {"products": products} if call.keep_products else {}
        return backward(ContrastiveCall(image, text, scale, 0, chunk_size), upstream, result, **kept)
    # Images without a text are negatives of the texts that have an image.
    paired, unpaired = image.tensor_split([num_pairs])
    paired_grads = backward(ContrastiveCall(paired, text, scale, 0, chunk_size), upstream, wide)
    image_grad, text_grad, scale_grad = paired_grads
    no_loss = rows.new_full((len(unpaired),), torch.inf)
    upstream = SoftmaxGradient(no_loss, columns_lse[:num_pairs], weight, positive_grad, call.hardness)
    rest = backward(ContrastiveCall(unpaired, text[:num_pairs], scale, None, chunk_size), upstream, wide)
    text_grad[:num_pairs] += rest[1]
    return torch.cat([image_grad, rest[0]]).to(result), text_grad.to(result), scale_grad + rest[2]


def _backward_fake(
    grad: Tensor, rows: Tensor, columns: Tensor, positive: Tensor, products: Tensor, *inputs: Any
) -> tuple[Tensor, Tensor, Tensor]:
    image, text, scale = inputs[:3]
    # Contiguous for any layout of the inputs, because the kernels allocate them.
    return image.new_empty(image.shape), text.new_empty(text.shape), torch.empty_like(scale)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.options = inputs[5:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:], *inputs[:5])


def _gradient(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return *clip_loss_backward(grad, *ctx.saved_tensors, *ctx.options), *[None] * 8


_ARGUMENTS = f"{custom_op.arguments(ClipCall)}, str backend"
clip_loss = custom_op.define(
    "clip_loss",
    f"({_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    setup=_setup,
    gradient=_gradient,
)
clip_loss_backward = custom_op.define(
    "clip_loss_backward",
    f"(Tensor grad, Tensor rows, Tensor columns, Tensor positive, Tensor products, {_ARGUMENTS})"
    " -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
