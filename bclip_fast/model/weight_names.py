"""Names of weights: our parameters beside those of open_clip, timm and transformers."""

from __future__ import annotations

from collections.abc import Mapping

from .biomedclip import BiomedClipConfig
from .resnet import blocks
from .text import TextConfig
from .vision import VisionConfig

Keys = dict[str, tuple[str, ...]]
"""Our parameter -> the other library's parameters that equal it when concatenated along their first axis."""
# Our modules of a layer after the projection to query, key and value. Each transformer names its own in this order.
_MODULES = ("norm1", "proj", "norm2", "fc1", "fc2")


def key_map(config: BiomedClipConfig) -> Keys:
    """Our parameter -> the open_clip parameters that equal it when concatenated along their first axis."""
    keys: Keys = {"logit_scale": ("logit_scale",)}
    if config.init_logit_bias is not None:
        keys["logit_bias"] = ("logit_bias",)
    if config.vision.kind == "resnet":
        keys |= _resnet_keys(config.vision)
    else:
        towers = {"vit": timm_vit_keys, "clip": _clip_vision_keys, "siglip": _timm_siglip_keys}
        keys |= towers[config.vision.kind](config.vision.layers)
    if config.text.kind == "bert":
        return keys | bert_keys(config.text)
    keys |= (_gpt_keys if config.text.kind == "gpt" else _siglip_text_keys)(config.text.layers)
    return keys | _coca_keys(config) if config.decoder.layers else keys


def timm_vit_keys(layers: int) -> Keys:
    """A ViT of timm, with open_clip's prefix."""
    trunk = "visual.trunk."
    keys: Keys = {f"visual.{name}": (trunk + name,) for name in ("cls_token", "pos_embed")}
    keys |= _weight_and_bias("visual.patch_embed", trunk + "patch_embed.proj")
    keys |= _weight_and_bias("visual.norm", trunk + "norm")
    keys["visual.head.weight"] = ("visual.head.proj.weight",)
    modules = {
        "norm1": "norm1",
        "qkv": "attn.qkv",
        "proj": "attn.proj",
        "norm2": "norm2",
        "fc1": "mlp.fc1",
        "fc2": "mlp.fc2",
    }
    return keys | _layer_keys("visual.layers.", f"{trunk}blocks.", layers, modules)


def _timm_siglip_keys(layers: int) -> Keys:
    keys = timm_vit_keys(layers)
    del keys["visual.cls_token"], keys["visual.head.weight"]
    ours, theirs = "visual.pool", "visual.trunk.attn_pool"
    keys[f"{ours}.probe"] = (f"{theirs}.latent",)
    names = {"query": "q", "key_value": "kv", "proj": "proj", "norm": "norm", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
    for our_name, their_name in names.items():
        keys |= _weight_and_bias(f"{ours}.{our_name}", f"{theirs}.{their_name}")
    return keys


def _clip_vision_keys(layers: int) -> Keys:
    keys: Keys = {
        "visual.cls_token": ("visual.class_embedding",),
        "visual.pos_embed": ("visual.positional_embedding",),
        "visual.patch_embed.weight": ("visual.conv1.weight",),
        "visual.head.weight": ("visual.proj",),
    }
    keys |= _weight_and_bias("visual.pre_norm", "visual.ln_pre") | _weight_and_bias("visual.norm", "visual.ln_post")
    return keys | _resblocks("visual.layers.", "visual.transformer.resblocks.", layers)


def _coca_keys(config: BiomedClipConfig) -> Keys:
    """The parts of a CoCa that a CLIP model doesn't have: pool, class token and decoder."""
    ours, theirs = "visual.pool.", "visual.attn_pool."
    keys: Keys = {
        "text.class_token": ("text.cls_emb",),
        "decoder.head.projection": ("text_decoder.text_projection",),
        f"{ours}query": (f"{theirs}query",),
    }
    keys |= _weight_and_bias("decoder.head.norm", "text_decoder.ln_final")
    keys |= _weight_and_bias(f"{ours}query_norm", f"{theirs}ln_q")
    keys |= _weight_and_bias(f"{ours}token_norm", f"{theirs}ln_k")
    keys |= _weight_and_bias(f"{ours}proj", f"{theirs}attn.out_proj")
    # torch's MultiheadAttention has one weight if both sequences have the same width, and otherwise three.
    keys[f"{ours}projection.bias"] = (f"{theirs}attn.in_proj_bias",)
    if config.vision.width == config.embed_dim:
        keys[f"{ours}projection.weight"] = (f"{theirs}attn.in_proj_weight",)
    else:
        keys[f"{ours}projection.query_weight"] = (f"{theirs}attn.q_proj_weight",)
        keys[f"{ours}projection.key_value_weight"] = tuple(f"{theirs}attn.{name}_proj_weight" for name in "kv")
    layers = config.decoder.layers
    keys |= _resblocks("decoder.layers.", "text_decoder.resblocks.", layers, "causal.")
    keys |= _resblocks("decoder.layers.", "text_decoder.cross_attn.", layers, "cross.", "projection")
    for i in range(layers):
        keys |= _weight_and_bias(f"decoder.layers.{i}.cross.context_norm", f"text_decoder.cross_attn.{i}.ln_1_kv")
    return keys


def _resnet_keys(config: VisionConfig) -> Keys:
    keys: Keys = {"visual.pool.pos_embed": ("visual.attnpool.positional_embedding",)}
    keys |= _weight_and_bias("visual.pool.qkv", *(f"visual.attnpool.{name}_proj" for name in "qkv"))
    keys |= _weight_and_bias("visual.head", "visual.attnpool.c_proj")
    conv_parents = [("visual.stem.", "visual.")]
    for number, block in enumerate(blocks(config)):
        ours, theirs = f"visual.layers.{number}.", f"visual.layer{block.stage + 1}.{block.position}."
        conv_parents.append((ours, theirs))
        if block.position == 0:
            keys |= _conv_norm(f"{ours}short.", f"{theirs}downsample.0.", f"{theirs}downsample.1.")
    for ours, theirs in conv_parents:
        for i in (1, 2, 3):
            keys |= _conv_norm(f"{ours}conv{i}.", f"{theirs}conv{i}.", f"{theirs}bn{i}.")
    return keys


def _conv_norm(ours: str, conv: str, norm: str) -> Keys:
    kinds = ("weight", "bias", "running_mean", "running_var")
    keys: Keys = {f"{ours}conv.weight": (f"{conv}weight",)}
    return keys | {f"{ours}norm.{kind}": (f"{norm}{kind}",) for kind in kinds}


def _resblocks(ours: str, theirs: str, layers: int, part: str = "", qkv: str = "qkv") -> Keys:
    """The layers of open_clip's own transformer. Ours are the module `part` of each layer."""
    keys: Keys = {}
    modules = dict(zip(_MODULES, ("ln_1", "attn.out_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"), strict=True))
    for i in range(layers):
        for kind in ("weight", "bias"):
            keys[f"{ours}{i}.{part}{qkv}.{kind}"] = (f"{theirs}{i}.attn.in_proj_{kind}",)
        for our_name, their_name in modules.items():
            keys |= _weight_and_bias(f"{ours}{i}.{part}{our_name}", f"{theirs}{i}.{their_name}")
    return keys


def _layer_keys(
    ours: str, theirs: str, layers: int, modules: Mapping[str, str], qkv: tuple[str, ...] | None = None
) -> Keys:
    """Weights and biases of numbered layers.

    Args:
        ours, theirs: prefixes before a layer's number.
        modules: our name -> theirs, below a layer.
        qkv: their names of the query, key and value projections, which ours concatenates.
    """
    keys: Keys = {}
    for i in range(layers):
        if qkv is not None:
            keys |= _weight_and_bias(f"{ours}{i}.qkv", *(f"{theirs}{i}.{name}" for name in qkv))
        for our_name, their_name in modules.items():
            keys |= _weight_and_bias(f"{ours}{i}.{our_name}", f"{theirs}{i}.{their_name}")
    return keys


def bert_keys(config: TextConfig) -> Keys:
    """A BERT of transformers, with open_clip's prefix, and its projection."""
    bert = "text.transformer."
    keys: Keys = {
        f"text.{name}.weight": (f"{bert}embeddings.{name}.weight",)
        for name in ("word_embeddings", "position_embeddings", "token_type_embeddings")
    }
    keys |= _weight_and_bias("text.embedding_norm", bert + "embeddings.LayerNorm")
    modules = {
        "proj": "attention.output.dense",
        "norm1": "attention.output.LayerNorm",
        "fc1": "intermediate.dense",
        "fc2": "output.dense",
        "norm2": "output.LayerNorm",
    }
    qkv = "attention.self.query", "attention.self.key", "attention.self.value"
    keys |= _layer_keys("text.layers.", f"{bert}encoder.layer.", config.layers, modules, qkv)
    projection = ["proj.0", "proj.2"] if config.projection == "mlp" else ["proj"]
    return keys | {f"text.{name}.weight": (f"text.{name}.weight",) for name in projection}


def transformers_bert_keys(config: TextConfig) -> Keys:
    """transformers' BertModel: the keys of `bert_keys` without the projection and open_clip's prefix."""
    prefix = "text.transformer."
    return {
        ours: tuple(name.removeprefix(prefix) for name in theirs)
        for ours, theirs in bert_keys(config).items()
        if theirs[0].startswith(prefix)
    }


def _gpt_keys(layers: int) -> Keys:
    keys: Keys = {
        "text.token_embedding.weight": ("text.token_embedding.weight",),
        "text.pos_embed": ("text.positional_embedding",),
        "text.projection": ("text.text_projection",),
    }
    keys |= _weight_and_bias("text.norm", "text.ln_final")
    return keys | _resblocks("text.layers.", "text.transformer.resblocks.", layers)


def _siglip_text_keys(layers: int) -> Keys:
    keys = _gpt_keys(layers)
    del keys["text.projection"]
    return keys | _weight_and_bias("text.head", "text.text_projection")


def transformers_vit_keys(layers: int) -> Keys:
    """transformers' ViTModel without its pooler."""
    keys: Keys = {"cls_token": ("embeddings.cls_token",), "pos_embed": ("embeddings.position_embeddings",)}
    keys |= _weight_and_bias("patch_embed", "embeddings.patch_embeddings.projection")
    keys |= _weight_and_bias("norm", "layernorm")
    names = "layernorm_before", "attention.output.dense", "layernorm_after", "intermediate.dense", "output.dense"
    modules = dict(zip(_MODULES, names, strict=True))
    qkv = "attention.attention.query", "attention.attention.key", "attention.attention.value"
    return keys | _layer_keys("layers.", "encoder.layer.", layers, modules, qkv)


def transformers_clip_text_keys(layers: int) -> Keys:
    """transformers' CLIPTextModelWithProjection."""
    return {"text.projection": ("text_projection.weight",)} | _transformers_text_keys(layers)


def transformers_joint_keys(config: BiomedClipConfig) -> Keys:
    """transformers' CLIPModel or SiglipModel."""
    layers, model = config.vision.layers, "vision_model."
    keys: Keys = {"logit_scale": ("logit_scale",)}
    if config.init_logit_bias is not None:
        keys["logit_bias"] = ("logit_bias",)
    keys["visual.pos_embed"] = (f"{model}embeddings.position_embedding.weight",)
    keys["visual.patch_embed.weight"] = (f"{model}embeddings.patch_embedding.weight",)
    keys |= _weight_and_bias("visual.norm", model + "post_layernorm")
    keys |= _transformers_layers("visual.layers.", f"{model}encoder.layers.", layers)
    if config.vision.kind == "clip":
        keys["visual.cls_token"] = (f"{model}embeddings.class_embedding",)
        keys["visual.head.weight"] = ("visual_projection.weight",)
        keys |= _weight_and_bias("visual.pre_norm", model + "pre_layrnorm")
        return keys | transformers_clip_text_keys(config.text.layers)
    keys["visual.patch_embed.bias"] = (f"{model}embeddings.patch_embedding.bias",)
    ours, theirs = "visual.pool", model + "head"
    keys[f"{ours}.probe"] = (f"{theirs}.probe",)
    # The file holds query and key_value in one matrix, in_proj.
    names = {"query": "query", "key_value": "key_value", "proj": "attention.out_proj", "norm": "layernorm"}
    for our_name, their_name in {**names, "fc1": "mlp.fc1", "fc2": "mlp.fc2"}.items():
        keys |= _weight_and_bias(f"{ours}.{our_name}", f"{theirs}.{their_name}")
    return keys | _transformers_text_keys(config.text.layers) | _weight_and_bias("text.head", "text_model.head")


def _transformers_text_keys(layers: int) -> Keys:
    model = "text_model."
    keys: Keys = {
        "text.token_embedding.weight": (f"{model}embeddings.token_embedding.weight",),
        "text.pos_embed": (f"{model}embeddings.position_embedding.weight",),
    }
    keys |= _weight_and_bias("text.norm", model + "final_layer_norm")
    return keys | _transformers_layers("text.layers.", f"{model}encoder.layers.", layers)


def _transformers_layers(ours: str, theirs: str, layers: int) -> Keys:
    names = "layer_norm1", "self_attn.out_proj", "layer_norm2", "mlp.fc1", "mlp.fc2"
    modules = dict(zip(_MODULES, names, strict=True))
    return _layer_keys(ours, theirs, layers, modules, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))


def _weight_and_bias(ours: str, *theirs: str) -> Keys:
    return {f"{ours}.{kind}": tuple(f"{name}.{kind}" for name in theirs) for kind in ("weight", "bias")}
