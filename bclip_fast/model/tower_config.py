"""config.json of a single tower, as timm and transformers read and write it."""

from __future__ import annotations

import dataclasses
from typing import Any

from bclip_fast.errors import UserError

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
# SigLIP's towers: (width, layers, heads, width of the MLP), and (patch, image size, tanh's GELU). timm takes the exact
# GELU for sizes that the first release has, and for all of these sizes in SigLIP 2.
_SIGLIP_SIZES = {
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
    "so400m": (1152, 27, 16, 4304),
    "giantopt": (1536, 40, 16, 6144),
}
_SIGLIP_GRIDS = {
    "base": [(32, 256, True), (16, 224, False), (16, 256, False), (16, 384, False), (16, 512, False)],
    "large": [(16, 256, False), (16, 384, False), (16, 512, True)],
    "so400m": [(14, 224, False), (14, 378, False), (14, 384, False), (16, 256, True), (16, 384, True), (16, 512, True)],
    "giantopt": [(16, 256, True), (16, 384, True)],
}
TIMM_SIGLIP_MODELS = {
    f"vit_{name}_patch{patch}_siglip_{size}": VisionConfig(
        size,
        patch,
        *_SIGLIP_SIZES[name][:3],
        mlp_ratio=_SIGLIP_SIZES[name][3] / _SIGLIP_SIZES[name][0],
        kind="siglip",
        activation="gelu_tanh" if tanh else "gelu",
    )
    for name, grids in _SIGLIP_GRIDS.items()
    for patch, size, tanh in grids
}
# timm's argument -> our field
_TIMM_ARGUMENTS = {
    "img_size": "image_size",
    "patch_size": "patch_size",
    "embed_dim": "width",
    "depth": "layers",
    "num_heads": "heads",
    "mlp_ratio": "mlp_ratio",
}
# BertConfig's key -> our field
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
# Fixed properties of our BERT. A config.json with other values describes another model.
_BERT_FIXED: Json = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "type_vocab_size": 2,
    "layer_norm_eps": BERT_NORM_EPS,
}
# Settings of a ViT -> the values that our ViT has. The first is the library's default.
_VIT_SETTINGS: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("gelu",),
    # google's ViTs were trained with 1e-6, although their files leave it at 1e-12.
    "layer_norm_eps": (1e-12, VIT_NORM_EPS),
    "qkv_bias": (True,),
    "num_channels": (3,),
    "hidden_dropout_prob": (0.0,),
    "attention_probs_dropout_prob": (0.0,),
}
_TIMM_SETTINGS: dict[str, tuple[Any, ...]] = {
    "in_chans": (3,),
    "global_pool": ("token", ""),
    "class_token": (True,),
    "qkv_bias": (True,),
    **dict.fromkeys(
        ("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"), (0.0,)
    ),
}
# Arguments that concern the head or the initial weights, which our tower doesn't take over.
_TIMM_UNREAD = ("num_classes", "weight_init", "fix_init", "strict_img_size", "dynamic_img_size")
_BERT_ASSUMED: Json = {"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False}


def truncating_mlp_ratio(width: int, mlp_ratio: float) -> float:
    """A ratio from which timm and open_clip, which truncate its product with the width, get the MLP's width."""
    hidden = mlp_width(width, mlp_ratio)
    return mlp_ratio if int(width * mlp_ratio) == hidden else (hidden + 0.25) / width


def exact_mlp_ratio(width: Any, mlp_ratio: Any) -> float:
    """The ratio of the MLP's width, which timm and open_clip truncate, to the tower's. Other values stay as they are.

    So one model has one configuration, whether its file has 3.7362 or the quotient.
    """
    if isinstance(width, int) and isinstance(mlp_ratio, int | float) and width > 0 and 0 < mlp_ratio <= 64:
        return int(width * mlp_ratio) / width
    return mlp_ratio


def timm_config(vision: VisionConfig) -> Json:
    """config.json from which timm builds a ViT of these sizes."""
    arguments: Json = {theirs: getattr(vision, ours) for theirs, ours in _TIMM_ARGUMENTS.items()}
    arguments["mlp_ratio"] = truncating_mlp_ratio(vision.width, vision.mlp_ratio)
    siglip = vision.kind == "siglip"
    if siglip:
        arguments["act_layer"] = vision.activation
    return {
        "architecture": "vit_base_patch16_siglip_224" if siglip else "vit_base_patch16_224",
        "model_args": arguments,
        # Without this table timm assumes an older kind of file, which has no arguments.
        "pretrained_cfg": {"input_size": [3, vision.image_size, vision.image_size]},
    }


def read_timm_config(content: Json, source: str) -> VisionConfig:
    """The image tower that timm's config.json describes.

    Raises:
        UserError: our ViT can't express it. The message names `source`.
    """
    architecture, arguments = content.get("architecture"), content.get("model_args")
    models = {**TIMM_MODELS, **TIMM_SIGLIP_MODELS}
    if architecture not in models:
        raise UserError(f"{source}: architecture {architecture!r} isn't supported")
    if not isinstance(arguments, dict):
        raise UserError(f"{source}: model_args is missing or isn't a table")
    names = dict(_TIMM_ARGUMENTS)
    if architecture in TIMM_SIGLIP_MODELS:
        names["act_layer"] = "activation"
    unknown = arguments.keys() - names.keys()
    if unknown:
        raise UserError(f"{source}: model_args has unsupported keys: {', '.join(sorted(unknown))}")
    fields = {names[name]: value for name, value in arguments.items()}
    vision = dataclasses.replace(models[architecture], **fields)
    hidden = int(vision.width * vision.mlp_ratio)
    if mlp_width(vision.width, vision.mlp_ratio) != hidden or vision.kind == "siglip":
        vision = dataclasses.replace(vision, mlp_ratio=hidden / vision.width)
    return vision


def vit_heads(content: Json, source: str) -> int:
    """Number of attention heads of the ViT in timm's or transformers' config.json. The weights don't show it.

    Raises:
        UserError: the file describes another architecture, or has a setting that our ViT lacks.
    """
    if content.get("model_type") == "vit":
        refuse_code(content, source)
        check_settings(content, _VIT_SETTINGS, source)
        return content.get("num_attention_heads", 12)
    name = content.get("architecture")
    if name not in TIMM_MODELS:
        raise UserError(f"{source} describes {content.get('model_type', name)!r}; it must describe a plain ViT")
    arguments = content.get("model_args") or {}
    if not isinstance(arguments, dict):
        raise UserError(f"{source}: model_args={arguments!r} must be a table")
    unknown = arguments.keys() - {*_TIMM_ARGUMENTS, *_TIMM_SETTINGS, *_TIMM_UNREAD}
    if unknown:
        raise UserError(f"{source}: model_args has unsupported keys: {', '.join(sorted(unknown))}")
    check_settings({**content, **arguments}, _TIMM_SETTINGS, source)
    return arguments.get("num_heads", TIMM_MODELS[name].heads)


def check_settings(content: Json, supported: dict[str, tuple[Any, ...]], source: str) -> None:
    """Raise UserError if a setting has an unsupported value. The first value is the meaning of a missing key."""
    for name, values in supported.items():
        if content.get(name, values[0]) not in values:
            raise UserError(f"{source}: {name}={content[name]!r} must be {' or '.join(map(repr, values))}")


def refuse_code(content: Json, source: str) -> None:
    """Raise UserError if the file names its own code for the model: its settings then have another meaning."""
    if content.get("auto_map"):
        raise UserError(f"{source}: auto_map={content['auto_map']!r} names code of the checkpoint, which is never run")


def bert_config(text: TextConfig) -> Json:
    """config.json from which transformers builds a BERT of these sizes."""
    return {
        "architectures": ["BertModel"],
        **_BERT_FIXED,
        **{theirs: getattr(text, ours) for theirs, ours in _BERT_SIZES.items()},
        "intermediate_size": mlp_width(text.width, text.mlp_ratio),
    }


def read_bert_config(content: Json, source: str) -> TextConfig:
    """The text tower that transformers' config.json describes.

    Raises:
        UserError: our BERT can't express it. The message names `source`.
    """
    refuse_code(content, source)
    for key, value in {**_BERT_FIXED, **_BERT_ASSUMED}.items():
        if content.get(key, value) != value or (key == "model_type" and key not in content):
            raise UserError(f"{source}: {key}={content.get(key)!r} must be {value!r}")
    # An absent key means transformers' default, and our defaults are those of BertConfig.
    sizes = {ours: content[theirs] for theirs, ours in _BERT_SIZES.items() if theirs in content}
    width, hidden = sizes.get("width", TextConfig.width), content.get("intermediate_size", 3072)
    check_range(f"{source}: hidden_size", width, 1, 16384)
    check_range(f"{source}: intermediate_size", hidden, 1, 1 << 20)
    # The shortest context fits any position table. The caller sets the real one.
    return TextConfig(**sizes, mlp_ratio=hidden / width, context_length=2)


def is_pubmedbert(text: TextConfig) -> bool:
    """Whether the tower has PubMedBERT's sizes. Its context length and projection don't count."""
    published = TextConfig()
    names = *_BERT_SIZES.values(), "mlp_ratio"
    return all(getattr(text, name) == getattr(published, name) for name in names)


def transformers_configs(config: BiomedClipConfig) -> tuple[Json, Json]:
    """config.json of both towers, matching the parameters' names of `weights.to_transformers`."""
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
        return image, bert_config(text)
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
        # With 2, transformers reads the output at the highest id of each caption.
        "eos_token_id": 2 if text.end_id is None else text.end_id,
    }
