"""Small CoCa models, ours and open_clip's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from peers import import_open_clip
from towers import GPT, SMALL

from bclip_fast.model import open_clip_config
from bclip_fast.model.biomedclip import BiomedClipConfig
from bclip_fast.model.coca import DecoderConfig

COCA = replace(
    SMALL,
    embed_dim=32,
    vision=replace(SMALL.vision, kind="clip"),
    text=GPT,
    decoder=DecoderConfig(layers=2, heads=4, pool_queries=5, pool_heads=2),
)


def open_clip_config_of(config: BiomedClipConfig) -> dict[str, Any]:
    """The `model_cfg` that we write for a model, without the key that open_clip's class doesn't take."""
    content = open_clip_config.write(config, published_tokenizer=False)["open_clip_config.json"]["model_cfg"]
    assert content.pop("custom_text") is True
    return dict(content)


def open_clip_coca(config: BiomedClipConfig) -> Any:
    """open_clip's CoCa with random weights. open_clip leaves the projection to the vocabulary uninitialised."""
    model = import_open_clip().coca_model.CoCa(**open_clip_config_of(config))
    model.text_decoder.text_projection.data.normal_(std=0.05)
    return model
