"""`open_clip_config.json` and the small files that it points to: writing them from our configuration and reading them.

open_clip names its towers: a timm model and a Hugging Face model. The published sizes have public names. For any other
size timm reads `config.json` of a `local-dir:` folder, and transformers that of any folder. So `write` describes such
towers in `vision/` and `text/` beside `open_clip_config.json`, by relative path.

To open such a checkpoint in open_clip (timm >= 1.0.16), make its folder the working directory and call
`open_clip.create_model("local-dir:.")`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

from bclip_fast.errors import UserError

from .biomedclip import BiomedClipConfig
from .coca import DecoderConfig
from .coca_config import add_decoder, read_decoder
from .open_clip_sections import CONFIG_FILE, Section, table
from .text import TextConfig
from .tokenizer_cleaning import CLEANERS, Cleaning
from .tower_config import (
    PUBMEDBERT,
    TIMM_MODELS,
    TIMM_SIGLIP_MODELS,
    Json,
    bert_config,
    exact_mlp_ratio,
    is_pubmedbert,
    read_bert_config,
    read_timm_config,
    timm_config,
    truncating_mlp_ratio,
)
from .transformer import MAX_LAYERS, check_range
from .vision import VisionConfig

_PUBMEDBERT_NAMES = {
    f"microsoft/BiomedNLP-{name}-base-uncased-{corpus}"
    for name in ("BiomedBERT", "PubMedBERT")
    for corpus in ("abstract", "abstract-fulltext")
}
_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[\w-][\w.-]*")
_TIMM_NAMES = {**TIMM_MODELS, **TIMM_SIGLIP_MODELS}
_SIGLIP_KEYS = ("no_causal_mask", "proj_bias", "norm_kwargs")
# The properties of SigLIP's text tower, in open_clip's words.
_SIGLIP_TEXT: Json = {"no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}}
_TANH = {"approximate": "tanh"}
_CLIP_SIZES = ("image_size", "patch_size", "width", "layers", "mlp_ratio")


def write(config: BiomedClipConfig, *, published_tokenizer: bool, cleaning: Cleaning = "whitespace") -> dict[str, Json]:
    """Describe the model: relative path -> JSON of each file.

    Args:
        published_tokenizer: the vocabulary is PubMedBERT's, so the file may name it by its public name.
        cleaning: how texts are cleaned before they are tokenized.
    """
    files: dict[str, Json] = {}
    vision = _vision_json(config.vision, files)
    tokenizer_name = PUBMEDBERT if published_tokenizer else "."
    if config.text.kind == "bert":
        text: Json = {
            "hf_model_name": _bert_name(config.text, files),
            "hf_tokenizer_name": tokenizer_name,
            "hf_proj_type": config.text.projection,
            "hf_pooler_type": "cls_last_hidden_state_pooler",
            "context_length": config.text.context_length,
        }
        if config.text.attend_padding:
            text["attend_padding"] = True  # open_clip has no such tower, and refuses this key
    else:
        text = _own_text_json(config.text, tokenizer_name)
    if cleaning != "whitespace":
        text["tokenizer_kwargs"] = {"clean": cleaning}  # open_clip refuses that of SiglipTokenizer
    model: Json = {"embed_dim": config.embed_dim, "vision_cfg": vision, "text_cfg": text}
    if config.decoder.layers:
        model["multimodal_cfg"] = add_decoder(config, vision, text)
    if config.text.kind != "bert":
        model["custom_text"] = True
    if config.quick_gelu:
        model["quick_gelu"] = True
    defaults = BiomedClipConfig()
    for name in ("init_logit_scale", "init_logit_bias"):
        if getattr(config, name) != getattr(defaults, name):
            model[name] = getattr(config, name)
    return {CONFIG_FILE: {"model_cfg": model}, **files}


def read(config: Json, read_json: Callable[[str], Json], hub_json: Callable[[str], Json]) -> BiomedClipConfig:
    """Return our configuration from the content of an open_clip_config.json, in either spelling of its keys.

    Args:
        config: the parsed file.
        read_json: returns a JSON file of the checkpoint by its relative path.
        hub_json: returns `config.json` of a repository on the hub.

    Raises:
        UserError: a key or value that our towers can't express. The message names it.
    """
    model = Section("model_cfg", table(config, "model_cfg"))
    vision_section = Section("vision_cfg", model.take_table("vision_cfg"))
    text_section = Section("text_cfg", model.take_table("text_cfg"))
    decoder = DecoderConfig()
    if "multimodal_cfg" in model.remaining:
        section = Section("multimodal_cfg", model.take_table("multimodal_cfg"))
        decoder = read_decoder(section, vision_section, text_section)
    timm = "timm_model_name" in vision_section.remaining
    vision = _read_timm_vision(vision_section, read_json) if timm else _read_clip_vision(vision_section)
    if "hf_model_name" in text_section.remaining:
        text = _read_bert(text_section, read_json, hub_json)
    else:
        text = _read_own_text(text_section)
    quick_gelu = model.take("quick_gelu", False)
    if not isinstance(quick_gelu, bool):
        raise UserError(f"{CONFIG_FILE}: model_cfg.quick_gelu={quick_gelu!r} must be True or False")
    model.take("custom_text", None)
    defaults = BiomedClipConfig()
    result = BiomedClipConfig(
        embed_dim=model.take("embed_dim"),
        vision=vision,
        text=text,
        decoder=decoder,
        quick_gelu=quick_gelu,
        init_logit_scale=model.take("init_logit_scale", defaults.init_logit_scale),
        init_logit_bias=model.take("init_logit_bias", None),
    )
    model.finish()
    for name in ("init_logit_scale", "init_logit_bias"):
        if getattr(result, name) is not None:
            check_range(name, getattr(result, name), -1000.0, 1000.0)
    return result


def tokenizer_cleaning(config: Json) -> Cleaning:
    """How the checkpoint's texts are cleaned before they are tokenized, by open_clip's name.

    Raises:
        UserError: the file names an unknown cleaning, or has other settings of a tokenizer.
    """
    settings = table(table(config, "model_cfg"), "text_cfg").get("tokenizer_kwargs") or {}
    section = Section("tokenizer_kwargs", table({"tokenizer_kwargs": settings}, "tokenizer_kwargs"))
    cleaning = section.take("clean", "whitespace")
    section.finish()
    if cleaning not in CLEANERS:
        raise UserError(f"{CONFIG_FILE}: tokenizer_kwargs.clean={cleaning!r} must be {' or '.join(CLEANERS)}")
    return cleaning


def tokenizer_name(config: Json) -> str | None:
    """The hub repository of the tokenizer, if the configuration names one."""
    name = table(table(config, "model_cfg"), "text_cfg").get("hf_tokenizer_name")
    return name if isinstance(name, str) and _HUB_ID.fullmatch(name) else None


def _vision_json(config: VisionConfig, files: dict[str, Json]) -> Json:
    if config.kind == "resnet":
        vision: Json = {"image_size": config.image_size, "layers": list(config.blocks or ())}
        vision |= {"width": config.width, "patch_size": None, "head_width": 32 * config.width // config.heads}
    elif config.kind == "clip":
        vision = {name: getattr(config, name) for name in _CLIP_SIZES}
        vision["head_width"] = config.width // config.heads
    else:
        siglip = config.kind == "siglip"
        vision = {
            "timm_model_name": _timm_name(config, files),
            "timm_model_pretrained": False,
            "timm_pool": "map" if siglip else "",
            "timm_proj": "none" if siglip else "linear",
            "image_size": config.image_size,
        }
    if config.patch_dropout:
        vision["patch_dropout"] = config.patch_dropout
    return vision


def _timm_name(vision: VisionConfig, files: dict[str, Json]) -> str:
    """timm's name of the tower. If timm has none, add a file that describes it and return the name of its folder."""
    sizes = dataclasses.replace(vision, patch_dropout=0.0)
    for name, published in _TIMM_NAMES.items():
        if published == sizes:
            return name
    files["vision/config.json"] = timm_config(vision)
    return "local-dir:./vision"


def _read_timm_vision(section: Section, read_json: Callable[[str], Json]) -> VisionConfig:
    name = section.take("timm_model_name")
    # A missing key means the mean of all patches. Both other values mean the class token, which our tower reads.
    pool = section.take("timm_pool", "avg")
    # SigLIP's attention pool ends in the embedding. Without a projection there, open_clip asks timm for none.
    pooled = pool == "map"
    if pool not in ("", "token", "map"):
        raise UserError(
            f"{CONFIG_FILE}: vision_cfg.timm_pool={pool!r} must be '' or 'token', for the class token, or 'map'"
        )
    projection = section.take("timm_proj", "linear")
    if projection not in (("none",) if pooled else ("linear",)):
        raise UserError(
            f"{CONFIG_FILE}: vision_cfg.timm_proj={projection!r} must be {'none' if pooled else 'linear'!r}"
        )
    section.expect("timm_proj_bias", False)
    section.take("timm_model_pretrained", None)
    section.expect("timm_drop", 0.0)
    section.expect("timm_drop_path", None, 0.0)
    patch_dropout = section.take("patch_dropout", 0.0)
    image_size = section.take("image_size", None)
    section.finish()
    if not isinstance(name, str):
        raise UserError(f"{CONFIG_FILE}: timm_model_name={name!r} must be a string")
    if name.startswith("local-dir:"):
        path = f"{_inner_folder(name.removeprefix('local-dir:'))}/config.json"
        vision = read_timm_config(read_json(path), path)
    elif (base_name := name.partition(".")[0]) in _TIMM_NAMES:
        vision = _TIMM_NAMES[base_name]
    else:
        raise UserError(f"{CONFIG_FILE}: timm_model_name={name!r} must be one of {', '.join(_TIMM_NAMES)}")
    if pooled != (vision.kind == "siglip"):
        raise UserError(
            f"{CONFIG_FILE}: timm_model_name={name!r} doesn't fit timm_pool={pool!r}; timm's siglip towers have 'map'"
        )
    if image_size not in (None, vision.image_size):
        raise UserError(f"{CONFIG_FILE}: image_size={image_size!r} must be that of {name}, {vision.image_size}")
    return dataclasses.replace(vision, patch_dropout=patch_dropout)


def _read_clip_vision(section: Section) -> VisionConfig:
    """open_clip's own towers with the settings of OpenAI's models. Its ViT's other settings aren't supported."""
    defaults = {"image_size": 224, "patch_size": 16, "width": 768, "layers": 12, "mlp_ratio": 4.0, "patch_dropout": 0.0}
    sizes = {name: section.take(name, default) for name, default in defaults.items()}
    head_width = section.take("head_width", 64)
    section.expect("pool_type", "tok")
    section.finish()
    check_range(f"{CONFIG_FILE}: vision_cfg.width", sizes["width"], 1, 16384)
    # A number of layers means a ViT. A list, with a number for each stage, means a ResNet.
    resnet = isinstance(sizes["layers"], list)
    width = sizes["width"] * 32 if resnet else sizes["width"]
    check_range(f"{CONFIG_FILE}: vision_cfg.head_width", head_width, 1, width)
    if not resnet:
        return VisionConfig(kind="clip", heads=width // head_width, **sizes)
    for count in sizes["layers"]:
        check_range(f"{CONFIG_FILE}: vision_cfg.layers", count, 1, MAX_LAYERS)
    sizes |= {"blocks": tuple(sizes["layers"]), "layers": sum(sizes["layers"]), "patch_size": 32}
    return VisionConfig(kind="resnet", heads=width // head_width, **sizes)


def _bert_name(text: TextConfig, files: dict[str, Json]) -> str:
    """PubMedBERT's name for a tower of its sizes. For others, add a file that describes it and return its folder."""
    if is_pubmedbert(text):
        return PUBMEDBERT
    files["text/config.json"] = bert_config(text)
    return "./text"


def _read_bert(section: Section, read_json: Callable[[str], Json], hub_json: Callable[[str], Json]) -> TextConfig:
    name = section.take("hf_model_name")
    section.take("hf_tokenizer_name", None)
    section.take("hf_model_pretrained", None)
    projection = section.take_either("hf_proj_type", "proj", None)
    pooler = section.take_either("hf_pooler_type", "pooler_type", "cls_pooler")
    context_length = section.take("context_length", 77)
    attend_padding = section.take("attend_padding", False)
    section.take("tokenizer_kwargs", None)  # tokenizer_cleaning reads it
    section.expect("output_tokens", False)
    section.finish()
    if pooler != "cls_last_hidden_state_pooler":
        raise UserError(f"{CONFIG_FILE}: hf_pooler_type={pooler!r} must be 'cls_last_hidden_state_pooler'")
    if not isinstance(name, str):
        raise UserError(f"{CONFIG_FILE}: hf_model_name={name!r} must be a string")
    if name in _PUBMEDBERT_NAMES:
        text = TextConfig()
    elif _HUB_ID.fullmatch(name):
        text = read_bert_config(hub_json(name), name)
    else:
        path = f"{_inner_folder(name)}/config.json"
        text = read_bert_config(read_json(path), path)
    fields = {"context_length": context_length, "projection": projection, "attend_padding": attend_padding}
    return dataclasses.replace(text, **fields)


def _own_text_json(text: TextConfig, tokenizer_name: str) -> Json:
    """open_clip's own text transformer."""
    result: Json = {name: getattr(text, name) for name in ("context_length", "vocab_size", "width", "heads", "layers")}
    if text.mlp_ratio != 4.0:
        result["mlp_ratio"] = truncating_mlp_ratio(text.width, text.mlp_ratio)
    if text.pad_id:
        result["pad_id"] = text.pad_id
    if text.end_id is not None:
        result |= {"pool_type": "eos", "eos_id": text.end_id}
    if text.kind == "siglip":
        result |= _SIGLIP_TEXT
    if text.activation == "gelu_tanh":
        result["act_kwargs"] = _TANH
    return result | {"hf_tokenizer_name": tokenizer_name}


def _read_own_text(section: Section) -> TextConfig:
    """open_clip's own text transformer: CLIP's, or SigLIP's, which has no causal mask."""
    siglip = section.remaining.get("no_causal_mask") is True
    pool_type = section.take("pool_type", "argmax")
    end_id = section.take("eos_id", 2)
    section.take("hf_tokenizer_name", None)
    section.take("tokenizer_kwargs", None)  # tokenizer_cleaning reads it
    context_length, width = section.take("context_length", 77), section.take("width", 512)
    mlp_ratio = section.take("mlp_ratio", 4.0)
    tanh = siglip and section.remaining.get("act_kwargs") is not None
    text = TextConfig(
        kind="siglip" if siglip else "gpt",
        context_length=context_length,
        max_positions=context_length,
        vocab_size=section.take("vocab_size", 49408),
        width=width,
        heads=section.take("heads", 8),
        layers=section.take("layers", 12),
        mlp_ratio=exact_mlp_ratio(width, mlp_ratio) if siglip else mlp_ratio,
        pad_id=section.take("pad_id", 0),
        end_id=end_id if pool_type == "eos" else None,
        dropout=0.0,
        attention_dropout=0.0,
        projection="linear",
        activation="gelu_tanh" if tanh else "gelu",
    )
    if siglip:
        for name, value in (("pool_type", pool_type), *((name, section.take(name, None)) for name in _SIGLIP_KEYS)):
            if value != _SIGLIP_TEXT[name]:
                raise UserError(
                    f"{CONFIG_FILE}: text_cfg.{name}={value!r} must be {_SIGLIP_TEXT[name]!r} with no_causal_mask"
                )
        section.expect("act_kwargs", None, _TANH)
    else:
        if pool_type not in ("argmax", "eos"):
            raise UserError(f"{CONFIG_FILE}: pool_type={pool_type!r} must be 'argmax' or 'eos'")
        section.expect("proj_bias", False)
        section.expect("no_causal_mask", False)
    section.expect("proj_type", "linear")
    section.expect("embed_cls", False)
    section.expect("output_tokens", False)
    section.finish()
    return text


def _inner_folder(path: str) -> str:
    """Return the normalised path of a folder inside the checkpoint's. A configuration must not make us read others."""
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if path.startswith(("/", "~")) or ".." in parts or "\\" in path or not parts:
        raise UserError(f"{CONFIG_FILE}: {path!r} must name a folder inside the checkpoint's folder")
    return "/".join(parts)
