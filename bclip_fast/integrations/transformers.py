"""transformers' CLIPModel (release 5) with a loss that never builds the similarity matrix.

    from bclip_fast.integrations import transformers

    transformers.install()
    loss = clip_model(input_ids=..., pixel_values=..., return_loss=True).loss

`CLIPModel.forward` builds the logits of the whole batch before its loss, so replacing only the loss isn't enough. With
return_loss=True our `forward` passes the embeddings to `ClipLoss`, and the output has no logits. Otherwise nothing
changes.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

from torch import Tensor

from bclip_fast.loss import ClipLoss

_original: Callable[..., Any] | None = None


def clip_output(
    model: Any,
    input_ids: Tensor | None = None,
    pixel_values: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    interpolate_pos_encoding: bool = False,
    *,
    loss: ClipLoss | None = None,
    **kwargs: Any,
) -> Any:
    """Return a CLIPModel's `CLIPOutput` with loss, embeddings (b, D) and the towers' outputs. Its logits are None.

    Args:
        model: a `transformers.CLIPModel`. The other arguments are those of its `forward`.
        loss: the loss of the normalised embeddings. Default: `ClipLoss` on this process's batch.
    """
    modeling = importlib.import_module("transformers.models.clip.modeling_clip")
    vision = model.get_image_features(
        pixel_values=pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, return_dict=True, **kwargs
    )
    text = model.get_text_features(
        input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, return_dict=True, **kwargs
    )
    images, texts = (output.pooler_output for output in (vision, text))
    images, texts = (embeds / embeds.norm(dim=-1, keepdim=True) for embeds in (images, texts))
    value = (loss or ClipLoss())(images, texts.to(images.device), model.logit_scale.exp())
    return modeling.CLIPOutput(
        loss=value, image_embeds=images, text_embeds=texts, vision_model_output=vision, text_model_output=text
    )


def install(loss: ClipLoss | None = None) -> None:
    """Make every CLIPModel compute its loss by `loss`. A further call replaces the loss.

    Args:
        loss: `ClipLoss(rank=..., world_size=...)` for the global batch. Default: `ClipLoss` on this process's batch, as
            in transformers.

    Raises:
        ImportError: transformers is not installed.
    """
    global _original
    model_class = importlib.import_module("transformers.models.clip.modeling_clip").CLIPModel
    can_return_tuple = importlib.import_module("transformers.utils.generic").can_return_tuple
    original = _original = _original or model_class.forward
    with_loss = can_return_tuple(functools.partial(clip_output, loss=loss))

    # The Trainer reads the model's columns and labels from the signature, so it must stay the original's.
    @functools.wraps(original)
    def forward(
        self: Any,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_loss: bool | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Any,
    ) -> Any:
        inputs = (input_ids, pixel_values, attention_mask, position_ids)
        if not return_loss:
            return original(self, *inputs, return_loss, interpolate_pos_encoding, **kwargs)
        return with_loss(self, *inputs, interpolate_pos_encoding, **kwargs)

    model_class.forward = forward


def uninstall() -> None:
    """Restore CLIPModel's own `forward`."""
    global _original
    if _original is not None:
        importlib.import_module("transformers.models.clip.modeling_clip").CLIPModel.forward = _original
        _original = None
