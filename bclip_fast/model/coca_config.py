"""The caption decoder in `open_clip_config.json`: open_clip's `multimodal_cfg`, and its part of the towers' tables."""

from __future__ import annotations

from bclip_fast.errors import UserError

from .biomedclip import BiomedClipConfig
from .coca import DecoderConfig
from .open_clip_sections import CONFIG_FILE, Section
from .tower_config import Json
from .transformer import MAX_LAYERS, check_range


def add_decoder(config: BiomedClipConfig, vision: Json, text: Json) -> Json:
    """open_clip's `multimodal_cfg`. Add the settings of pool and class token to the towers' tables."""
    decoder = config.decoder
    vision |= {"attentional_pool": True, "attn_pooler_queries": decoder.pool_queries, "output_tokens": True}
    vision["attn_pooler_heads"] = decoder.pool_heads
    text |= {"embed_cls": True, "output_tokens": True}
    sizes = {name: text[name] for name in ("context_length", "vocab_size", "width")}
    return sizes | {"heads": decoder.heads, "layers": decoder.layers}


def read_decoder(section: Section, vision: Section, text: Section) -> DecoderConfig:
    """The decoder of a CoCa. Take the settings of its pool and class token from the towers' tables."""
    for table, name, value in ((vision, "attentional_pool", True), (text, "embed_cls", True)):
        if table.take(name, None) is not value:
            raise UserError(f"{CONFIG_FILE}: {table.name}.{name} must be {value} in a model with multimodal_cfg")
    for table in (vision, text):
        table.expect("output_tokens", True)
    width = section.take("width", 512)
    if width != (text_width := text.remaining.get("width", 512)):
        raise UserError(f"{CONFIG_FILE}: multimodal_cfg.width={width!r} must be that of text_cfg, {text_width!r}")
    # open_clip reads none of these.
    for name in ("context_length", "vocab_size", "mlp_ratio", "dim_head", "n_queries", "attn_pooler_heads"):
        section.take(name, None)
    heads, layers = section.take("heads", 8), section.take("layers", 12)
    section.expect("ls_init_value", None)
    section.finish()
    check_range(f"{CONFIG_FILE}: multimodal_cfg.layers", layers, 1, MAX_LAYERS)
    queries, pool_heads = vision.take("attn_pooler_queries", 256), vision.take("attn_pooler_heads", 8)
    return DecoderConfig(layers, heads, queries, pool_heads)
