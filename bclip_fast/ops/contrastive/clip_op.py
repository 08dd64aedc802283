"""The softmax loss's registration with torch: its schema, fake and gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bclip_fast.ops import custom_op
from bclip_fast.ops.dispatch import load_backend
from bclip_fast.ops.dtypes import accumulation_dtype

from . import definition
from .call import ClipCall, ContrastiveCall, SoftmaxGradient
from .groups import Groups, group_tile
from .loss_terms import pair_losses, positive_gradient, positive_logits


@custom_op.without_autocast
def _forward(*inputs: Any) -> tuple[Tensor, ...]:
    """(loss, log-sum-exps of rows, then columns, positive logits, products (b, B), ids (b + B,), shares (b + B,), w).

    Log-sum-exps are float64. Without ids, they are r and q of the negatives, (num_pairs + B,), because only the first
    `num_pairs` images have an r and a positive logit. With ids, they are (b + B,) as the kernels take them. The last
    three are the fields of `Groups`. With `keep_products`, the products are those of all rows of image and text.
    Tensors that don't apply are empty.
    """
    call = ClipCall(*inputs[:-1])
    image, text, scale = call.image.to(call.dtype), call.text.to(call.dtype), call.scale
    forward = load_backend("contrastive", inputs[-1]).forward
    shape = (len(image), len(text)) if call.keep_products else (0,)
    products = image.new_empty(shape, dtype=torch.float32)
    if call.image_ids is not None and call.text_ids is not None:
        groups = Groups.of(call.image_ids, call.image_ids, call.text_ids)
        lse = torch.cat(forward(ContrastiveCall(image, text, scale, None, call.chunk_size)))
        loss = ((groups.weights * lse).sum() - groups.positives(image, text, scale)).to(scale.dtype)
        weight = torch.full((), groups.weight, dtype=torch.float64, device=image.device)
        shares = groups.shares.to(scale.dtype)
        return loss, groups.raised(lse), lse.new_empty(0), products, groups.ids, shares, weight
    num_pairs = call.num_pairs
    sharpness = scale + call.hardness if call.hardness else scale
    kept = {"products": products} if call.keep_products else {}
    rows, columns = forward(ContrastiveCall(image[:num_pairs], text, sharpness, 0, call.chunk_size), **kept)
    pair_columns = columns[:num_pairs]
    if num_pairs < len(image):
        unpaired = ContrastiveCall(image[num_pairs:], text[:num_pairs], sharpness, None, call.chunk_size)
        torch.logaddexp(pair_columns, forward(unpaired)[1], out=pair_columns)
    positive = positive_logits(image[:num_pairs], text[:num_pairs], scale)
    loss = pair_losses(rows, pair_columns, positive).mean().to(scale.dtype)
    unused = (rows.new_empty(0, dtype=dtype) for dtype in (torch.int32, scale.dtype, torch.float64))
    return loss, torch.cat([rows, columns]), positive, products, *unused


def _forward_fake(*inputs: Any) -> tuple[Tensor, ...]:
    call = ClipCall(*inputs[:-1])
    scale, num_images, num_texts = call.scale, call.image.shape[0], call.text.shape[0]
    products = scale.new_empty((num_images, num_texts) if call.keep_products else (0,), dtype=torch.float32)
    has_ids, num_pairs = call.image_ids is not None, call.num_pairs
    size = num_images + num_texts if has_ids else 0
    lse = scale.new_empty(size if has_ids else num_pairs + num_texts, dtype=torch.float64)
    positive = scale.new_empty(0 if has_ids else num_pairs, dtype=torch.float64)
    ids, shares = scale.new_empty(size, dtype=torch.int32), scale.new_empty(size)
    weight = scale.new_empty(() if has_ids else 0, dtype=torch.float64)
    return scale.new_empty(()), lse, positive, products, ids, shares, weight


@custom_op.without_autocast
def _backward(
    grad: Tensor,
    lse: Tensor,
    positive: Tensor,
    products: Tensor,
    ids: Tensor,
    shares: Tensor,
    group_weight: Tensor,
    *inputs: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of image, text and scale."""
    call = ClipCall(*inputs[:-1])
    image, text, scale, chunk_size = call.image.to(call.dtype), call.text.to(call.dtype), call.scale, call.chunk_size
    num_pairs, result = call.num_pairs, call.image.dtype
    backward = load_backend("contrastive", inputs[-1]).backward
    if call.image_ids is not None:
        groups = group_tile(ids, shares, len(image))
        sums = lse[: len(image)], lse[len(image) :]
        upstream = SoftmaxGradient(*sums, grad * group_weight, positive, call.hardness)
        grads = backward(ContrastiveCall(image, text, scale, None, chunk_size, groups=groups), upstream, result)
        return *grads[:2], grads[2].to(scale.dtype)
    weight = grad / (2 * num_pairs)
    rows, columns = lse[:num_pairs], lse[num_pairs:]
    pair_columns = columns[:num_pairs]
    columns_lse = torch.logaddexp(pair_columns, positive)
    if num_pairs < len(columns):
        # The other texts have no loss.
        columns_lse = torch.cat([columns_lse, columns.new_full((len(columns) - num_pairs,), torch.inf)])
    positive_grad = positive_gradient(rows, pair_columns, positive)
    rows_lse = torch.logaddexp(rows, positive)
    upstream = SoftmaxGradient(rows_lse, columns_lse, weight, positive_grad, call.hardness)
    if num_pairs == len(image):
        kept = {"products": products} if call.keep_products else {}
        grads = backward(ContrastiveCall(image, text, scale, 0, chunk_size), upstream, result, **kept)
        return *grads[:2], grads[2].to(scale.dtype)
    # Images without a text are negatives of the texts that have an image.
    wide = accumulation_dtype(call.image)
    paired, unpaired = image.tensor_split([num_pairs])
    image_grad, text_grad, scale_grad = backward(ContrastiveCall(paired, text, scale, 0, chunk_size), upstream, wide)
    no_loss = rows.new_full((len(unpaired),), torch.inf)
    upstream = SoftmaxGradient(no_loss, columns_lse[:num_pairs], weight, positive, call.hardness)
    rest = backward(ContrastiveCall(unpaired, text[:num_pairs], scale, None, chunk_size), upstream, wide)
    text_grad[:num_pairs] += rest[1]
    image_grad = torch.cat([image_grad, rest[0]]).to(result)
    return image_grad, text_grad.to(result), (scale_grad + rest[2]).to(scale.dtype)


def _backward_fake(grad: Tensor, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    image, text, scale = inputs[_NUM_SAVED : _NUM_SAVED + 3]
    # Contiguous for any layout of the inputs, because the kernels allocate them.
    return image.new_empty(image.shape), text.new_empty(text.shape), torch.empty_like(scale)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.options = inputs[5:]
    ctx.mark_non_differentiable(*output[1:])
    # Otherwise torch fills a tensor of zeros for each of these outputs.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:], *inputs[:5])


def _arguments_of(ctx: Any) -> tuple[Any, ...]:
    return *ctx.saved_tensors[_NUM_SAVED:], *ctx.options


def _gradient(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 11
    return *clip_loss_backward(grad, *ctx.saved_tensors, *ctx.options), *[None] * 8


# The number of results of the forward that the backward reads: all of them without the loss.
_NUM_SAVED = 6
_ARGUMENTS = f"{custom_op.arguments(ClipCall)}, str backend"
clip_loss = custom_op.define(
    "clip_loss",
    f"({_ARGUMENTS}) -> ({', '.join(['Tensor'] * (1 + _NUM_SAVED))})",
    _forward,
    _forward_fake,
    setup=_setup,
    gradient=_gradient,
    definition=definition.clip_loss,
    arguments_of=_arguments_of,
)
clip_loss_backward = custom_op.define(
    "clip_loss_backward",
    "(Tensor grad, Tensor lse, Tensor positive, Tensor products, Tensor ids, Tensor shares, Tensor group_weight, "
    f"{_ARGUMENTS})"
    " -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
