"""Load and save checkpoints: model, preprocessing and tokenizer together.

Loading takes open_clip's layout, transformers' CLIPModel and SiglipModel, and PMC-CLIP's files (`layouts`). Saving
writes open_clip's layout.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bclip_fast.data.transform import Preprocess, PreprocessConfig
from bclip_fast.errors import UserError
from bclip_fast.io.atomic import replacing_files, write_text
from bclip_fast.io.hashing import sha256
from bclip_fast.model import open_clip_config, tokenizer_files, tower_config, transformers_clip, weights
from bclip_fast.model.biomedclip import BiomedClip, BiomedClipConfig
from bclip_fast.model.open_clip_sections import CONFIG_FILE
from bclip_fast.model.safe_load import State
from bclip_fast.model.special_tokens import DEFAULTS
from bclip_fast.model.text import stretch_positions
from bclip_fast.model.tokenizer import Tokenizer
from bclip_fast.model.vision import resize_positions

from . import layouts, model_card, processor_config
from .layouts import OPEN_CLIP_WEIGHTS as WEIGHT_FILES
from .sources import source_of

log = logging.getLogger(__name__)

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# SHA-256 of PubMedBERT's vocab.txt: one token per line, in the order of the ids.
_PUBMEDBERT_VOCABULARY = "7b36651908a88bc38bda41b728b2a598191e0d3b553cbacf7b1e5f026d5b5b9f"


def load(
    name_or_path: str | Path,
    *,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
    image_size: int | None = None,
    context_length: int | None = None,
) -> tuple[BiomedClip, Preprocess, Tokenizer]:
    """Load a trained model with its preprocessing and tokenizer, in evaluation mode.

    Args:
        name_or_path: `hf-hub:ORG/NAME[@REVISION]`, a short name such as `biomedclip` (`named_models`), a folder in
            open_clip's or transformers' layout or with PMC-CLIP's files, or the folder of a training run, whose
            `model/` is read.
        device: device of the model.
        precision: fp32, bf16 or fp16, the dtype of the weights. The logit scale stays in float32.
        image_size: another input size in pixels, a multiple of the patch size. The position embeddings are resized.
        context_length: another number of tokens. A GPT text tower is stretched (`model.text.stretch_positions`) or
            cut. A BERT takes any number up to its positions. A SigLIP and a CoCa can't change.

    Raises:
        UserError: a file is missing, damaged or unsafe, or a key of the configuration or the weights is missing,
            unknown or of a wrong shape. The message names it.
    """
    if precision not in PRECISIONS:
        raise UserError(f"precision {precision!r} is unknown; use one of {', '.join(PRECISIONS)}")
    checkpoint = layouts.describe(source_of(name_or_path))
    config, preprocess_config = checkpoint.config, checkpoint.preprocess
    # Check the shapes on the meta device first: a configuration may ask for any amount of memory.
    with torch.device("meta"):
        model = BiomedClip(config)
    state = checkpoint.read_weights(model)
    if image_size is not None and image_size != config.vision.image_size:
        config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, image_size=image_size))
        preprocess_config = dataclasses.replace(preprocess_config, size=image_size)
        positions = "visual.pool.pos_embed" if config.vision.kind == "resnet" else "visual.pos_embed"
        has_cls = config.vision.kind != "siglip"
        state[positions] = resize_positions(state[positions], config.vision.num_patches, has_cls)
        with torch.device("meta"):
            model = BiomedClip(config)
    tokenizer = checkpoint.tokenizer
    if context_length is not None and context_length != config.text.context_length:
        config, state = _with_context_length(config, state, context_length, str(name_or_path))
        tokenizer = tokenizer.with_context_length(context_length)
        with torch.device("meta"):
            model = BiomedClip(config)
    model.load_state_dict(state, assign=True)
    scalars = {name: parameter.data for name, parameter in model.named_parameters() if parameter.dim() == 0}
    model.to(device=device, dtype=PRECISIONS[precision])
    for name, value in scalars.items():
        getattr(model, name).data = value.to(device)
    model.visual.set_normalization(preprocess_config.mean, preprocess_config.std)
    log.info("loaded %s", name_or_path)
    return model.eval(), Preprocess(preprocess_config), tokenizer


def _with_context_length(
    config: BiomedClipConfig, state: State, context_length: int, name: str
) -> tuple[BiomedClipConfig, State]:
    """The configuration and the weights of a model whose text tower takes another number of tokens."""
    text = config.text
    if text.computes_padding:
        raise UserError(
            f"{name} was trained on captions padded to {text.context_length} tokens, and its text tower attends to the "
            f"padding, so context_length={context_length} isn't possible"
        )
    if config.decoder.layers:
        raise UserError(f"{name} has a caption decoder, so context_length={context_length} isn't possible")
    if text.kind == "bert":
        return dataclasses.replace(config, text=dataclasses.replace(text, context_length=context_length)), state
    config = dataclasses.replace(
        config, text=dataclasses.replace(text, context_length=context_length, max_positions=context_length)
    )
    positions = state["text.pos_embed"]
    if context_length < len(positions):
        log.info("%s: text positions cut from %d to %d tokens", name, len(positions), context_length)
        return config, {**state, "text.pos_embed": positions[:context_length].clone()}
    log.info(
        "%s: text positions stretched from %d to %d tokens, the first 20 kept, the others interpolated (Long-CLIP, "
        "arXiv 2403.15378)",
        name,
        len(positions),
        context_length,
    )
    return config, {**state, "text.pos_embed": stretch_positions(positions, context_length)}


def load_tokenizer(name_or_path: str | Path) -> Tokenizer:
    """Load only the tokenizer of a checkpoint. Takes the same names as `load`."""
    return layouts.describe(source_of(name_or_path)).tokenizer


def save(
    folder: str | Path,
    model: BiomedClip,
    preprocess: Preprocess,
    tokenizer: Tokenizer,
    *,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Write open_clip's layout: open_clip_config.json, open_clip_model.safetensors and the tokenizer's files.

    Published sizes get their public names, so that open_clip can load them anywhere. `vision/config.json` and
    `text/config.json` describe other sizes. open_clip finds these files if `folder` is the working directory.

    Args:
        folder: created if it is missing. Files of the same name are replaced, all together.
        state_dict: state of the complete model, if the parameters of `model` are sharded over ranks.

    Raises:
        UserError: model, preprocess and tokenizer do not fit each other.
    """
    config = model.config
    if preprocess.config.size != config.vision.image_size:
        raise UserError(
            f"preprocess gives images of {preprocess.config.size} px, but the model takes {config.vision.image_size} px"
        )
    layouts.check_vocabulary(tokenizer, config)
    published = _is_pubmedberts(tokenizer)
    files = open_clip_config.write(config, published_tokenizer=published, cleaning=tokenizer.cleaning)
    files[CONFIG_FILE]["preprocess_cfg"] = _preprocess_json(preprocess.config)
    state = weights.to_open_clip(model.state_dict() if state_dict is None else state_dict, config)
    from safetensors.torch import save_file

    with replacing_files(Path(folder)) as partial:
        for name, content in files.items():
            write_text(partial / name, json.dumps(content, indent=2) + "\n")
        tokenizer.save(partial)
        save_file(state, partial / WEIGHT_FILES[0], metadata={"format": "pt"})


def save_transformers(folder: str | Path, model: BiomedClip, preprocess: Preprocess, tokenizer: Tokenizer) -> None:
    """Write the model for transformers.

    transformers' CLIPModel and SiglipModel hold both towers of OpenAI's CLIP and of SigLIP: config.json,
    model.safetensors, preprocessor_config.json and the tokenizer in one folder. It has no class for both towers of
    BiomedCLIP together, so each gets a folder:

        vision/   ViTModel, whose pooler_output is the image embedding; preprocessor_config.json
        text/     BertModel and the tokenizer; a gpt tower becomes CLIPTextModelWithProjection with text_embeds
        projections.safetensors   logit_scale (its logarithm), and text_projection of a BERT, which maps the last
                                  hidden state of the first token: `0.weight`, GELU, `2.weight`, or `weight` only
        README.md               card with code for both embeddings. transformers' tokenizer doesn't repair captions
                                  as ours does (`tokenizer.clean`), and the card says how to

    The embeddings are not normalised. Files of the same name are replaced, all together. Raises OSError if a file
    cannot be written.
    """
    from safetensors.torch import save_file

    config = model.config
    if transformers_clip.is_joint(config):
        _save_joint_transformers(Path(folder), model, preprocess, tokenizer)
        return
    states = weights.to_transformers(model.state_dict(), config)
    processor = processor_config.write(preprocess.config, "CLIP")
    with replacing_files(Path(folder)) as partial:
        for name, content, state in zip(
            ("vision", "text"), tower_config.transformers_configs(config), states, strict=False
        ):
            write_text(partial / name / "config.json", json.dumps(content, indent=2) + "\n")
            save_file(state, partial / name / "model.safetensors", metadata={"format": "pt"})
        save_file(states[2], partial / "projections.safetensors", metadata={"format": "pt"})
        tokenizer.save(partial / "text")
        write_text(partial / "vision" / processor_config.FILE, json.dumps(processor, indent=2) + "\n")
        if model_card.is_replaceable(Path(folder)):
            model_card.write(partial, config, tokenizer.pad_id)


def _save_joint_transformers(folder: Path, model: BiomedClip, preprocess: Preprocess, tokenizer: Tokenizer) -> None:
    from safetensors.torch import save_file

    config = model.config
    # SigLIP's image processor never crops.
    kind = "Siglip" if config.vision.kind == "siglip" and preprocess.config.resize_mode == "squash" else "CLIP"
    # SigLIP was trained without an attention mask, and SiglipModel applies any that it gets.
    inputs = {"model_input_names": ["input_ids"]} if config.text.computes_padding else {}
    with replacing_files(folder) as partial:
        for name, content in (
            ("config.json", transformers_clip.write(config)),
            (processor_config.FILE, processor_config.write(preprocess.config, kind)),
        ):
            write_text(partial / name, json.dumps(content, indent=2) + "\n")
        state = weights.to_transformers_joint(model.state_dict(), config)
        save_file(state, partial / layouts.TRANSFORMERS_WEIGHTS[0], metadata={"format": "pt"})
        tokenizer.save(partial, **inputs)


def _preprocess_json(config: PreprocessConfig) -> dict[str, Any]:
    content: dict[str, Any] = {"mean": list(config.mean), "std": list(config.std)}
    defaults = PreprocessConfig()
    for name in ("interpolation", "resize_mode"):
        if getattr(config, name) != getattr(defaults, name):
            content[name] = getattr(config, name)
    return content


def _is_pubmedberts(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer is the published one: its vocabulary and its settings, such as lower case."""
    vocabulary = tokenizer.fast.get_vocab()
    lines = "".join(f"{token}\n" for token in sorted(vocabulary, key=vocabulary.__getitem__))
    if sha256(lines) != _PUBMEDBERT_VOCABULARY:
        return False
    published = tokenizer_files.wordpiece(vocabulary, DEFAULTS)
    ours, theirs = (json.loads(fast.to_str()) for fast in (tokenizer.fast, published))
    return all(ours[part] == theirs[part] for part in ("normalizer", "pre_tokenizer"))
