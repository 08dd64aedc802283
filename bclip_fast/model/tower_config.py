"""config.json of a single tower, as timm and transformers read and write it."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..errors import UserError
from .biomedclip import BiomedClipConfig
from .text import BERT_NORM_EPS, GPT_NORM_EPS, TextConfig
from .transformer import check_range, mlp_width
from .vision import NORM_EPS as VIT_NORM_EPS
from .vision import VisionConfig

Json = dict[str, Any]

PUBMEDBERT = "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract"

_TIMM_SIZES = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}

_TIMM_GRIDS = {
    "tiny": [(16, 224), (16, 384)],
    "small": [(32, 224), (32, 384), (16, 224), (16, 384), (8, 224)],
    "base": [(32, 224), (32, 384), (16, 224), (16, 384), (8, 224)],
    "large": [(32, 224), (32, 384), (16, 224), (16, 384)],
}

TIMM_MODELS = {
    f"vit_{name}_patch{patch}_{size}": VisionConfig(size, patch, *_TIMM_SIZES[name])
    for name, grids in _TIMM_GRIDS.items()
    for patch, size in grids
}

# timm's argument -> ours
_TIMM_ARGUMENTS = {
    "img_size": "image_size",
    "patch_size": "patch_size",
    "embed_dim": "width",
    "depth": "layers",
    "num_heads": "heads",
    "mlp_ratio": "mlp_ratio",
}

# BertConfig's key -> ours
_BERT_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "max_position_embeddings": "max_positions",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
    "pad_token_id": "pad_id",
}

# What our BERT is; a config.json that says otherwise describes another model.
_BERT_FIXED: Json = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "type_vocab_size": 2,
    "layer_norm_eps": BERT_NORM_EPS,
}

_BERT_ASSUMED: Json = {"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False}


def transformers_configs(config: BiomedClipConfig) -> tuple[Json, Json]:
    """config.json of the towers as `weights.to_transformers` names their parameters."""
    vision, text = config.vision, config.text
    image: Json = {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "hidden_size": vision.width,
        "num_hidden_layers": vision.layers,
        "num_attention_heads": vision.heads,
        "intermediate_size": mlp_width(vision.width, vision.mlp_ratio),
        "hidden_act": "gelu",
        "layer_norm_eps": VIT_NORM_EPS,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "num_channels": 3,
        "qkv_bias": True,
        "pooler_output_size": config.embed_dim,
        "pooler_act": "linear",
    }
    if text.kind == "bert":
        return image, bert_json(text)
    return image, {
        "architectures": ["CLIPTextModelWithProjection"],
        "model_type": "clip_text_model",
        "vocab_size": text.vocab_size,
        "hidden_size": text.width,
        "intermediate_size": mlp_width(text.width, text.mlp_ratio),
        "projection_dim": config.embed_dim,
        "num_hidden_layers": text.layers,
        "num_attention_heads": text.heads,
        "max_position_embeddings": text.context_length,
        "hidden_act": "quick_gelu" if config.quick_gelu else "gelu",
        "layer_norm_eps": GPT_NORM_EPS,
        "attention_dropout": 0.0,
        "pad_token_id": text.pad_id,
        "bos_token_id": None,
        # By 2, whatever the vocabulary, transformers reads at the highest id.
        "eos_token_id": 2 if text.end_id is None else text.end_id,
    }


def timm_vit(content: Json) -> VisionConfig:
    architecture = content.get("architecture")
    if architecture not in TIMM_MODELS:
        raise UserError(f"vision/config.json: architecture {architecture!r} is not supported")
    arguments = content.get("model_args")
    if not isinstance(arguments, dict):
        raise UserError(f"vision/config.json: model_args is {arguments!r}; it must be a table")
    unknown = arguments.keys() - _TIMM_ARGUMENTS.keys()
    if unknown:
        raise UserError(f"vision/config.json: model_args has unsupported keys: {', '.join(sorted(unknown))}")
    ours = {_TIMM_ARGUMENTS[name]: value for name, value in arguments.items()}
    vision = dataclasses.replace(TIMM_MODELS[architecture], **ours)
    hidden = int(vision.width * vision.mlp_ratio)
    if mlp_width(vision.width, vision.mlp_ratio) != hidden:
        vision = dataclasses.replace(vision, mlp_ratio=hidden / vision.width)
    return vision


def bert_json(text: TextConfig) -> Json:
    return {
        "architectures": ["BertModel"],
        **_BERT_FIXED,
        **{theirs: getattr(text, ours) for theirs, ours in _BERT_SIZES.items()},
        "intermediate_size": mlp_width(text.width, text.mlp_ratio),
    }


def vit_heads(content: Json, where: str) -> int:
    """Attention heads of the ViT that timm's or transformers' config.json describes: weights don't tell them.

    Raises:
        UserError: it describes another architecture.
    """
    if content.get("model_type") == "vit":
        if content.get("hidden_act", "gelu") != "gelu":
            raise UserError(f"{where}: hidden_act is {content['hidden_act']!r}; supported is 'gelu'")
        return content.get("num_attention_heads", 12)
    name = content.get("architecture")
    if name not in TIMM_MODELS:
        raise UserError(f"{where}: it describes {content.get('model_type', name)!r}; supported is a plain ViT")
    return (content.get("model_args") or {}).get("num_heads", TIMM_MODELS[name].heads)


def bert_config(content: Json, where: str) -> TextConfig:
    """The text tower that transformers' config.json describes. Raises UserError where ours is another."""
    for key, value in {**_BERT_FIXED, **_BERT_ASSUMED}.items():
        if content.get(key, value) != value or (key == "model_type" and key not in content):
            raise UserError(f"{where}: {key} is {content.get(key)!r}; supported is {value!r}")
    # An absent key means transformers' default, and those of BertConfig are ours.
    sizes = {ours: content[theirs] for theirs, ours in _BERT_SIZES.items() if theirs in content}
    width, hidden = sizes.get("width", TextConfig.width), content.get("intermediate_size", 3072)
    check_range(f"{where}: hidden_size", width, 1, 16384)
    check_range(f"{where}: intermediate_size", hidden, 1, 1 << 20)
    # The context fits any table until the caller sets it.
    return TextConfig(**sizes, mlp_ratio=hidden / width, context_length=2)


def timm_json(vision: VisionConfig) -> Json:
    """config.json by which timm builds a ViT of these sizes."""
    arguments = {theirs: getattr(vision, ours) for theirs, ours in _TIMM_ARGUMENTS.items()}
    hidden = mlp_width(vision.width, vision.mlp_ratio)
    if int(vision.width * vision.mlp_ratio) != hidden:
        # timm cuts the product to a whole number.
        arguments["mlp_ratio"] = (hidden + 0.25) / vision.width
    return {
        "architecture": "vit_base_patch16_224",
        "model_args": arguments,
        # timm takes a file without this table for one of an older kind, which has no arguments.
        "pretrained_cfg": {"input_size": [3, vision.image_size, vision.image_size]},
    }


def is_pubmedbert(text: TextConfig) -> bool:
    sizes, published = dataclasses.asdict(text), dataclasses.asdict(TextConfig())
    return all(sizes[name] == published[name] for name in (*_BERT_SIZES.values(), "mlp_ratio"))
