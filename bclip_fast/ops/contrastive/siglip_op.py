"""The sigmoid loss's registration with torch: its schema, fake and gradient."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bclip_fast.ops import custom_op
from bclip_fast.ops.dispatch import load_backend

from . import definition
from .call import ContrastiveCall, SiglipCall
from .groups import Groups
from .loss_terms import siglip_gradient_dtype


@custom_op.without_autocast
def _forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, and its gradients in image, text, scale and bias)."""
    call = SiglipCall(*inputs[:-1])
    image, text = call.image.to(call.dtype), call.text.to(call.dtype)
    groups = None
    if call.image_ids is not None and call.text_ids is not None:
        groups = Groups.of(call.image_ids, call.image_ids, call.text_ids).tile
    tile = ContrastiveCall(
        image, text, call.scale, 0 if groups is None else None, call.chunk_size, bias=call.bias, groups=groups
    )
    siglip = load_backend("contrastive", inputs[-1]).siglip
    results = siglip(tile, 1 / image.shape[0], siglip_gradient_dtype(call.image), call.with_gradients)
    loss, scale_grad, bias_grad = (results[place].to(call.scale.dtype) for place in (0, 3, 4))
    grads = results[1:3] if call.with_gradients else (call.image.new_empty(0), call.image.new_empty(0))
    return loss, *grads, scale_grad, bias_grad


def _forward_fake(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    call = SiglipCall(*inputs[:-1])
    image, text, scale, with_gradients = call.image, call.text, call.scale, call.with_gradients
    result = siglip_gradient_dtype(image) if with_gradients else image.dtype
    image_grad = image.new_empty(image.shape if with_gradients else (0,), dtype=result)
    text_grad = text.new_empty(text.shape if with_gradients else (0,), dtype=result)
    return scale.new_empty(()), image_grad, text_grad, scale.new_empty(()), scale.new_empty(())


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.has_bias, ctx.dtype = inputs[3] is not None, inputs[0].dtype
    ctx.mark_non_differentiable(*output[1:])
    # Otherwise torch fills tensors of zeros as large as the gradients.
    ctx.set_materialize_grads(False)
    ctx.options = inputs[6:]
    ctx.save_for_backward(*output[1:], *inputs[:6])


def _arguments_of(ctx: Any) -> tuple[Any, ...]:
    return *ctx.saved_tensors[4:], *ctx.options


def _gradient(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 10
    image_grad, text_grad, scale_grad, bias_grad = ctx.saved_tensors[:4]
    bias = grad * bias_grad if ctx.has_bias else None
    features = [(grad * tensor).to(ctx.dtype) for tensor in (image_grad, text_grad)]
    return *features, grad * scale_grad, bias, *[None] * 6


siglip_loss = custom_op.define(
    "siglip_loss",
    f"({custom_op.arguments(SiglipCall)}, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    setup=_setup,
    gradient=_gradient,
    definition=definition.siglip_loss,
    arguments_of=_arguments_of,
)
