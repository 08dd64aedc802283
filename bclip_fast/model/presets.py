"""Model presets: the paper's model and its ablations, OpenAI's models and the quickstart's."""

from __future__ import annotations

import math
from dataclasses import replace

from bclip_fast.errors import UserError, choices

from .biomedclip import BiomedClipConfig
from .coca import DecoderConfig
from .text import TextConfig
from .vision import VisionConfig

_WIDTHS = {"s": 384, "m": 512, "b": 768, "l": 1024}
_GPT = TextConfig(
    kind="gpt",
    context_length=77,
    vocab_size=49408,
    width=512,
    heads=8,
    max_positions=77,
    dropout=0.0,
    attention_dropout=0.0,
    projection="linear",
)


def _presets() -> dict[str, BiomedClipConfig]:
    """biomedclip_{s,m,b,l}16[_336|_384][_ctx77|_gpt77], biomedclip_l14, clip_*, coca_b32, siglip_* and quickstart."""
    bert = TextConfig()
    texts = {"": bert, "_ctx77": replace(bert, context_length=77), "_gpt77": _GPT}
    presets = {}
    for letter, width in _WIDTHS.items():
        layers = 24 if letter == "l" else 12
        for image_size in (224, 336, 384):
            vision = VisionConfig(image_size=image_size, width=width, layers=layers, heads=width // 64)
            size = "" if image_size == 224 else f"_{image_size}"
            for suffix, text in texts.items():
                presets[f"biomedclip_{letter}16{size}{suffix}"] = BiomedClipConfig(vision=vision, text=text)
    # OpenAI's CLIP ViT-B/16, RN50 and ViT-L/14. Table S8 of the paper continues training from the first two.
    presets["clip_b16"] = BiomedClipConfig(vision=VisionConfig(kind="clip"), text=_GPT, quick_gelu=True)
    l14 = VisionConfig(kind="clip", patch_size=14, width=1024, layers=24, heads=16)
    presets["clip_l14"] = BiomedClipConfig(
        embed_dim=768, vision=l14, text=replace(_GPT, width=768, heads=12), quick_gelu=True
    )
    # OpenAI's image tower with PubMedBERT. Its exact GELU is that of LAION's and DataComp's ViT-L/14.
    presets["biomedclip_l14"] = BiomedClipConfig(embed_dim=768, vision=l14, text=bert)
    rn50 = VisionConfig(kind="resnet", patch_size=32, width=64, layers=16, heads=32, blocks=(3, 4, 6, 3))
    presets["clip_rn50"] = BiomedClipConfig(embed_dim=1024, vision=rn50, text=_GPT, quick_gelu=True)
    # open_clip's coca_ViT-B-32.
    presets["coca_b32"] = BiomedClipConfig(
        vision=VisionConfig(kind="clip", patch_size=32),
        text=replace(_GPT, context_length=76, max_positions=76),
        decoder=DecoderConfig(layers=12),
    )
    # SigLIP (arXiv 2303.15343) as in open_clip, with the exact GELU, and MedSigLIP (arXiv 2507.05201) as published.
    so400m = VisionConfig(384, 14, width=1152, layers=27, heads=16, mlp_ratio=4304 / 1152, kind="siglip")
    presets["siglip_b16"] = _siglip(VisionConfig(kind="siglip"))
    presets["siglip_so400m14_384"] = _siglip(so400m)
    presets["siglip_so400m14_448"] = _siglip(replace(so400m, image_size=448, activation="gelu_tanh"))
    vision = VisionConfig(image_size=80, patch_size=16, width=160, layers=4, heads=5)
    text = TextConfig(context_length=48, vocab_size=2048, width=128, layers=3, heads=4, max_positions=64)
    text = replace(text, dropout=0.0, attention_dropout=0.0)
    presets["quickstart"] = BiomedClipConfig(embed_dim=128, vision=vision, text=text)
    return presets


def _siglip(vision: VisionConfig) -> BiomedClipConfig:
    """A SigLIP whose text tower has the width, depth and activation of the image tower."""
    text = TextConfig(
        kind="siglip",
        context_length=64,
        vocab_size=32000,
        width=vision.width,
        layers=vision.layers,
        heads=vision.heads,
        mlp_ratio=vision.mlp_ratio,
        max_positions=64,
        dropout=0.0,
        attention_dropout=0.0,
        pad_id=1,
        projection="linear",
        activation=vision.activation,
    )
    return BiomedClipConfig(
        embed_dim=vision.width,
        vision=vision,
        text=text,
        init_logit_scale=math.log(10),
        init_logit_bias=-10.0,
    )


PRESETS = _presets()


def preset(name: str) -> BiomedClipConfig:
    """Return the preset of that name. Raises UserError, listing the presets, if it is unknown."""
    if name not in PRESETS:
        raise UserError(f"model preset {name!r} is unknown{choices(name, PRESETS)}")
    return PRESETS[name]
