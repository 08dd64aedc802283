"""config.json of transformers' CLIPModel and SiglipModel, which hold both towers: reading and writing."""

from __future__ import annotations

import math
from typing import Any, Literal

from bclip_fast.errors import UserError

from .biomedclip import BiomedClipConfig
from .siglip_text import NORM_EPS as SIGLIP_NORM_EPS
from .text import GPT_NORM_EPS, TextConfig
from .tower_config import Json, check_settings, refuse_code
from .transformer import check_range, mlp_width
from .vision import VisionConfig

MODEL_TYPES = ("clip", "siglip")
Activation = Literal["gelu", "gelu_tanh"]

# transformers' key -> (our field, its default in transformers' CLIP and SigLIP)
_SIZES: dict[str, tuple[str, int]] = {
    "hidden_size": ("width", 768),
    "num_hidden_layers": ("layers", 12),
    "num_attention_heads": ("heads", 12),
}
_CLIP_TEXT_DEFAULTS = {"hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 2048}
_ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
_EPS = {"clip": GPT_NORM_EPS, "siglip": SIGLIP_NORM_EPS}


def is_joint(config: BiomedClipConfig) -> bool:
    """Whether one class of transformers holds both towers."""
    return (config.vision.kind, config.text.kind) in (("clip", "gpt"), ("siglip", "siglip"))


def read(content: Json, source: str) -> BiomedClipConfig:
    """The model that transformers' config.json describes.

    Raises:
        UserError: the file describes another model, or our towers can't express it. The message names `source`.
    """
    kind = content.get("model_type")
    if kind not in MODEL_TYPES:
        raise UserError(f"{source}: model_type={kind!r} must be {' or '.join(map(repr, MODEL_TYPES))}")
    refuse_code(content, source)
    vision, text = (_section(content, name, source) for name in ("vision_config", "text_config"))
    fixed: dict[str, tuple[Any, ...]] = {"layer_norm_eps": (_EPS[kind],), "attention_dropout": (0.0, None)}
    check_settings(text, fixed, f"{source}: text_config")
    check_settings(vision, {**fixed, "num_channels": (3,), "vision_use_head": (True,)}, f"{source}: vision_config")
    return (_read_clip if kind == "clip" else _read_siglip)(content, vision, text, source)


def _section(content: Json, name: str, source: str) -> Json:
    """A tower's table. Old files hold a second one, whose settings count."""
    tables = [content.get(key) or {} for key in (name, f"{name}_dict")]
    if not all(isinstance(table, dict) for table in tables):
        raise UserError(f"{source}: {name} isn't a table")
    return {**tables[0], **tables[1]}


def _read_clip(content: Json, vision: Json, text: Json, source: str) -> BiomedClipConfig:
    activations = {section.get("hidden_act", "quick_gelu") for section in (vision, text)}
    if len(activations) != 1 or not activations <= {"quick_gelu", "gelu"}:
        raise UserError(
            f"{source}: hidden_act of the towers is {' and '.join(sorted(map(repr, activations)))}; both must be "
            "'quick_gelu', or both 'gelu'"
        )
    text = {**_CLIP_TEXT_DEFAULTS, **text}
    context_length, vocab_size = text.get("max_position_embeddings", 77), text.get("vocab_size", 49408)
    end_id = text.get("eos_token_id", 49407)
    # With 2, transformers reads the highest id, as CLIP does. CLIP's end token has the highest id.
    highest = end_id in (None, 2) or (isinstance(vocab_size, int) and end_id == vocab_size - 1)
    return BiomedClipConfig(
        embed_dim=content.get("projection_dim", 512),
        vision=VisionConfig(kind="clip", **_image_sizes(vision, 32), **_sizes(vision, f"{source}: vision_config")),
        text=TextConfig(
            kind="gpt",
            context_length=context_length,
            max_positions=context_length,
            vocab_size=vocab_size,
            end_id=None if highest else end_id,
            dropout=0.0,
            attention_dropout=0.0,
            projection="linear",
            **_sizes(text, f"{source}: text_config"),
        ),
        quick_gelu="quick_gelu" in activations,
    )


def _read_siglip(content: Json, vision: Json, text: Json, source: str) -> BiomedClipConfig:
    context_length, width = text.get("max_position_embeddings", 64), text.get("hidden_size", 768)
    return BiomedClipConfig(
        embed_dim=text.get("projection_size") or width,
        vision=VisionConfig(
            kind="siglip",
            activation=_activation(vision, f"{source}: vision_config"),
            **_image_sizes(vision, 16),
            **_sizes(vision, f"{source}: vision_config"),
        ),
        text=TextConfig(
            kind="siglip",
            context_length=context_length,
            max_positions=context_length,
            vocab_size=text.get("vocab_size", 32000),
            activation=_activation(text, f"{source}: text_config"),
            dropout=0.0,
            attention_dropout=0.0,
            projection="linear",
            **_sizes(text, f"{source}: text_config"),
        ),
        init_logit_scale=math.log(10),
        init_logit_bias=-10.0,
    )


def _activation(section: Json, source: str) -> Activation:
    name = section.get("hidden_act", "gelu_pytorch_tanh")
    if name not in _ACTIVATIONS:
        raise UserError(f"{source}: hidden_act={name!r} must be {' or '.join(map(repr, _ACTIVATIONS))}")
    return _ACTIVATIONS[name]  # type: ignore[return-value]


def _image_sizes(vision: Json, patch_size: int) -> dict[str, Any]:
    return {"image_size": vision.get("image_size", 224), "patch_size": vision.get("patch_size", patch_size)}


def _sizes(section: Json, source: str) -> dict[str, Any]:
    sizes = {ours: section.get(theirs, default) for theirs, (ours, default) in _SIZES.items()}
    hidden = section.get("intermediate_size", 3072)
    check_range(f"{source}.hidden_size", sizes["width"], 1, 16384)
    check_range(f"{source}.intermediate_size", hidden, 1, 1 << 20)
    return {**sizes, "mlp_ratio": hidden / sizes["width"]}


def write(config: BiomedClipConfig) -> Json:
    """config.json of a CLIPModel or a SiglipModel. `is_joint` must be true."""
    vision, text = config.vision, config.text
    clip = vision.kind == "clip"
    kind = "clip" if clip else "siglip"
    activation = "quick_gelu" if config.quick_gelu else "gelu"
    sections: list[Json] = []
    for tower in (vision, text):
        section: Json = {theirs: getattr(tower, ours) for theirs, (ours, _) in _SIZES.items()}
        section["intermediate_size"] = mlp_width(tower.width, tower.mlp_ratio)
        section["hidden_act"] = "gelu_pytorch_tanh" if tower.activation == "gelu_tanh" else activation
        sections.append(section | {"layer_norm_eps": _EPS[kind], "attention_dropout": 0.0})
    sections[0] |= {
        "model_type": f"{kind}_vision_model",
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "num_channels": 3,
    }
    sections[1] |= {
        "model_type": f"{kind}_text_model",
        "vocab_size": text.vocab_size,
        "max_position_embeddings": text.context_length,
        "pad_token_id": text.pad_id,
        "bos_token_id": None,
    }
    if clip:
        sections[1] |= {"eos_token_id": 2 if text.end_id is None else text.end_id}
        for section in sections:
            section["projection_dim"] = config.embed_dim
    else:
        sections[1]["projection_size"] = config.embed_dim
    result: Json = {
        "architectures": ["CLIPModel" if clip else "SiglipModel"],
        "model_type": kind,
        "vision_config": sections[0],
        "text_config": sections[1],
    }
    return result | ({"projection_dim": config.embed_dim} if clip else {})
