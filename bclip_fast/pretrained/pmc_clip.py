"""PMC-CLIP's checkpoint (arXiv 2303.07240): OpenAI's RN50 at 768 dimensions, and PubMedBERT.

The authors publish a training checkpoint and, separately, the parts of both encoders. Their code passes no attention
mask to PubMedBERT, so it attends to the padding of 77 tokens. The text embedding is the last hidden state of the first
token times a matrix. The authors' notebook multiplies BERT's pooled output instead, which the loss never trained. The
fusion module and the head for masked tokens serve training only.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from bclip_fast.errors import UserError
from bclip_fast.model import weights
from bclip_fast.model.biomedclip import BiomedClip, BiomedClipConfig
from bclip_fast.model.safe_load import State, read_checkpoint, read_tensor
from bclip_fast.model.text import TextConfig
from bclip_fast.model.vision import VisionConfig

from .sources import PMC_CLIP_FILES, Source

log = logging.getLogger(__name__)

_IMAGE_PART, _CHECKPOINT = PMC_CLIP_FILES
_PARTS = (_IMAGE_PART, "text_encoder.pth", "text_projection_layer.pth")
TOKENIZER = "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract-fulltext"
CONFIG = BiomedClipConfig(
    embed_dim=768,
    vision=VisionConfig(kind="resnet", patch_size=32, width=64, layers=16, heads=32, blocks=(3, 4, 6, 3)),
    text=TextConfig(context_length=77, projection="linear", attend_padding=True),
)
# The parts lack the logit scale. The authors' notebook has this number.
_LOGIT_SCALE = 4.4292
# Parameters that no embedding reads.
_UNREAD = (
    *("mlm_projection", "img_special_token", "positional_embedding", "fusion_module.", "ln_final."),
    *("text_encoder.pooler.", "text_encoder.embeddings.position_ids"),
)


def has_files(source: Source) -> bool:
    """Whether the source has the training checkpoint or the three parts."""
    return any(source.find(name) is not None for name in PMC_CLIP_FILES)


def read_weights(source: Source, model: BiomedClip) -> State:
    """The weights for a model of `CONFIG`, which may lie on the meta device.

    Raises:
        UserError: a file is missing or damaged, or isn't a checkpoint of PMC-CLIP.
    """
    if source.find(_IMAGE_PART) is not None:
        image, text, projection = (source.get([name]) for name in _PARTS)
        name = str(image.parent)
        state = {f"visual.{key}": tensor for key, tensor in read_checkpoint(image, legacy=True).items()}
        state |= {f"text_encoder.{key}": tensor for key, tensor in read_checkpoint(text, legacy=True).items()}
        state["text_projection"] = read_tensor(projection)
        state["logit_scale"] = torch.tensor(_LOGIT_SCALE)
        log.info("%s has no logit scale; it is %g, as in the authors' notebook", name, _LOGIT_SCALE)
    else:
        path = source.get([_CHECKPOINT])
        name, state = str(path), read_checkpoint(path, legacy=True)
        if "text_projection" not in state or not any(key.startswith("text_encoder.") for key in state):
            raise UserError(f"{path} isn't PMC-CLIP's: it lacks text_projection or text_encoder")
    prefixes = tuple(key for key in _UNREAD if key.endswith("."))
    unread = sorted(key for key in state if key in _UNREAD or key.startswith(prefixes))
    if unread:
        log.info("%s: dropped %s, which no embedding reads", name, ", ".join(unread))
    return weights.from_open_clip(open_clip_names(state, set(unread)), model, source=name)


def open_clip_names(state: State, unread: set[str]) -> State:
    """The tensors under open_clip's names of an RN50 and a BERT with one linear projection."""
    result: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if key == "text_projection":
            result["text.proj.weight"] = tensor.T
        elif key not in unread:
            result[key.replace("text_encoder.", "text.transformer.", 1)] = tensor
    return result
