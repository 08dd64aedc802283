"""Model presets: the paper's model and its ablations, OpenAI's models and the quickstart's."""

from __future__ import annotations

from dataclasses import replace

from bclip_fast.errors import UserError, choices

from .biomedclip import BiomedClipConfig
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
    """biomedclip_{s,m,b,l}16[_336|_384][_ctx77|_gpt77], clip_b16, clip_rn50 and quickstart."""
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
    # OpenAI's CLIP ViT-B/16 and RN50. Table S8 of the paper continues training from them.
    presets["clip_b16"] = BiomedClipConfig(vision=VisionConfig(kind="clip"), text=_GPT, quick_gelu=True)
    rn50 = VisionConfig(kind="resnet", patch_size=32, width=64, layers=16, heads=32, blocks=(3, 4, 6, 3))
    presets["clip_rn50"] = BiomedClipConfig(embed_dim=1024, vision=rn50, text=_GPT, quick_gelu=True)
    vision = VisionConfig(image_size=80, patch_size=16, width=160, layers=4, heads=5)
    text = TextConfig(context_length=48, vocab_size=2048, width=128, layers=3, heads=4, max_positions=64)
    text = replace(text, dropout=0.0, attention_dropout=0.0)
    presets["quickstart"] = BiomedClipConfig(embed_dim=128, vision=vision, text=text)
    return presets


PRESETS = _presets()


def preset(name: str) -> BiomedClipConfig:
    """Return the preset of that name. Raises UserError, listing the presets, if it is unknown."""
    if name not in PRESETS:
        raise UserError(f"model preset {name!r} is unknown{choices(name, PRESETS)}")
    return PRESETS[name]
