"""Load and save checkpoints in open_clip's layout: model, preprocessing and tokenizer together."""

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
from bclip_fast.io.json_files import read_object
from bclip_fast.model import open_clip_config, tokenizer_files, tower_config, weights
from bclip_fast.model.biomedclip import BiomedClip, BiomedClipConfig
from bclip_fast.model.open_clip_section import CONFIG_FILE
from bclip_fast.model.safe_load import read_checkpoint
from bclip_fast.model.special_tokens import DEFAULTS
from bclip_fast.model.tokenizer import Tokenizer
from bclip_fast.model.vision import resize_positions

from . import model_card
from .sources import Hub, Source, hub_json, source_of, tokenizer_file

log = logging.getLogger(__name__)

WEIGHT_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# SHA-256 of PubMedBERT's vocab.txt: one token per line, in the order of the ids.
_PUBMEDBERT_VOCABULARY = "7b36651908a88bc38bda41b728b2a598191e0d3b553cbacf7b1e5f026d5b5b9f"


def load(
    name_or_path: str | Path,
    *,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
    image_size: int | None = None,
) -> tuple[BiomedClip, Preprocess, Tokenizer]:
    """Load a trained model with its preprocessing and tokenizer, in evaluation mode.

    Args:
        name_or_path: `hf-hub:ORG/NAME[@REVISION]`, a folder in open_clip's layout, or the folder of a training run,
            whose `model/` is read.
        device: device of the model.
        precision: fp32, bf16 or fp16, the dtype of the weights. The logit scale stays in float32.
        image_size: another input size in pixels, a multiple of the patch size. The position embeddings are resized.

    Raises:
        UserError: a file is missing, damaged or unsafe, or a key of the configuration or the weights is missing,
            unknown or of a wrong shape. The message names it.
    """
    if precision not in PRECISIONS:
        raise UserError(f"precision {precision!r} is unknown; use one of {', '.join(PRECISIONS)}")
    source = source_of(name_or_path)
    content = read_object(source.get([CONFIG_FILE]))
    config = open_clip_config.read(content, lambda path: read_object(source.get([path])), hub_json)
    preprocess_config = _preprocess_config(content.get("preprocess_cfg", {}), config.vision.image_size)
    tokenizer = _tokenizer(source, content, config)
    # Check the shapes on the meta device first: a configuration may ask for any amount of memory.
    with torch.device("meta"):
        model = BiomedClip(config)
    path = source.get(WEIGHT_FILES)
    state = weights.from_open_clip(read_checkpoint(path), model, source=str(path))
    if image_size is not None and image_size != config.vision.image_size:
        config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, image_size=image_size))
        preprocess_config = dataclasses.replace(preprocess_config, size=image_size)
        positions = "visual.pool.pos_embed" if config.vision.kind == "resnet" else "visual.pos_embed"
        state[positions] = resize_positions(state[positions], config.vision.num_patches)
        with torch.device("meta"):
            model = BiomedClip(config)
    model.load_state_dict(state, assign=True)
    scalars = {name: parameter.data for name, parameter in model.named_parameters() if parameter.dim() == 0}
    model.to(device=device, dtype=PRECISIONS[precision])
    for name, value in scalars.items():
        getattr(model, name).data = value.to(device)
    model.visual.set_normalization(preprocess_config.mean, preprocess_config.std)
    log.info("loaded %s (%s)", name_or_path, path.name)
    return model.eval(), Preprocess(preprocess_config), tokenizer


def load_tokenizer(name_or_path: str | Path) -> Tokenizer:
    """Load only the tokenizer of a checkpoint. Takes the same names as `load`."""
    source = source_of(name_or_path)
    content = read_object(source.get([CONFIG_FILE]))
    return _tokenizer(
        source, content, open_clip_config.read(content, lambda path: read_object(source.get([path])), hub_json)
    )


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
    _check_vocabulary(tokenizer, config)
    files = open_clip_config.write(config, published_tokenizer=_is_pubmedberts(tokenizer))
    files[CONFIG_FILE]["preprocess_cfg"] = _preprocess_json(preprocess.config)
    state = weights.to_open_clip(model.state_dict() if state_dict is None else state_dict, config)
    from safetensors.torch import save_file

    with replacing_files(Path(folder)) as partial:
        for name, content in files.items():
            write_text(partial / name, json.dumps(content, indent=2) + "\n")
        tokenizer.save(partial)
        save_file(state, partial / WEIGHT_FILES[0], metadata={"format": "pt"})


def save_transformers(folder: str | Path, model: BiomedClip, preprocess: Preprocess, tokenizer: Tokenizer) -> None:
    """Write each tower for transformers, which has no class for both towers of BiomedCLIP together.

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

    config, pixels = model.config, preprocess.config
    states = weights.to_transformers(model.state_dict(), config)
    square, is_squashed = {"height": pixels.size, "width": pixels.size}, pixels.resize_mode == "squash"
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "size": square if is_squashed else {"shortest_edge": pixels.size},
        "do_center_crop": not is_squashed,
        "crop_size": square,
        "resample": {"bicubic": 3, "bilinear": 2}[pixels.interpolation],
        "image_mean": list(pixels.mean),
        "image_std": list(pixels.std),
    }
    with replacing_files(Path(folder)) as partial:
        for name, content, state in zip(
            ("vision", "text"), tower_config.transformers_configs(config), states, strict=False
        ):
            write_text(partial / name / "config.json", json.dumps(content, indent=2) + "\n")
            save_file(state, partial / name / "model.safetensors", metadata={"format": "pt"})
        save_file(states[2], partial / "projections.safetensors", metadata={"format": "pt"})
        tokenizer.save(partial / "text")
        write_text(partial / "vision" / "preprocessor_config.json", json.dumps(processor, indent=2) + "\n")
        if model_card.is_replaceable(Path(folder)):
            model_card.write(partial, config, tokenizer.pad_id)


def _preprocess_config(content: Any, image_size: int) -> PreprocessConfig:
    """Read preprocess_cfg. Missing keys have open_clip's defaults, which are BiomedCLIP's too."""
    if not isinstance(content, dict):
        raise UserError(f"{CONFIG_FILE}: preprocess_cfg must be a table, not {content!r}")
    content = dict(content)
    size = content.pop("size", image_size)
    if size not in (image_size, [image_size, image_size]):
        raise UserError(f"{CONFIG_FILE}: preprocess_cfg size {size!r} must be the model's, {image_size}")
    if content.pop("mode", "RGB") != "RGB":
        raise UserError(f"{CONFIG_FILE}: preprocess_cfg mode must be RGB")
    content.pop("fill_color", None)  # only resize_mode longest uses it
    unknown = content.keys() - {"mean", "std", "interpolation", "resize_mode"}
    if unknown:
        raise UserError(f"{CONFIG_FILE}: preprocess_cfg has unsupported keys: {', '.join(sorted(unknown))}")
    for name in ("mean", "std"):
        if isinstance(content.get(name), list):
            content[name] = tuple(content[name])
    return PreprocessConfig(size=image_size, **content)


def _preprocess_json(config: PreprocessConfig) -> dict[str, Any]:
    content: dict[str, Any] = {"mean": list(config.mean), "std": list(config.std)}
    defaults = PreprocessConfig()
    for name in ("interpolation", "resize_mode"):
        if getattr(config, name) != getattr(defaults, name):
            content[name] = getattr(config, name)
    return content


def _tokenizer(source: Source, content: dict[str, Any], config: BiomedClipConfig) -> Tokenizer:
    try:
        path = tokenizer_file(source)
    except UserError as error:
        name = open_clip_config.tokenizer_name(content)
        if name is None:
            raise UserError(f"{error}; save the tokenizer next to the weights") from error
        log.info("the checkpoint has no tokenizer file; downloading the tokenizer of %s", name)
        path = tokenizer_file(Hub(name))
    # As in open_clip, the context length of the model counts, not that of the tokenizer's settings.
    tokenizer = Tokenizer.from_file(path).with_context_length(config.text.context_length)
    _check_vocabulary(tokenizer, config)
    return tokenizer


def _check_vocabulary(tokenizer: Tokenizer, config: BiomedClipConfig) -> None:
    if tokenizer.vocab_size > config.text.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, but the text tower embeds only {config.text.vocab_size}"
        )
    if config.text.kind == "bert" and tokenizer.pad_id != config.text.pad_id:
        raise UserError(
            f"the tokenizer pads with token {tokenizer.pad_id}, but the text tower ignores token {config.text.pad_id} "
            "(pad_token_id of its config.json); correct one of them"
        )


def _is_pubmedberts(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer is the published one: its vocabulary and its settings, such as lower case."""
    vocabulary = tokenizer.fast.get_vocab()
    lines = "".join(f"{token}\n" for token in sorted(vocabulary, key=vocabulary.__getitem__))
    if sha256(lines) != _PUBMEDBERT_VOCABULARY:
        return False
    published = tokenizer_files.wordpiece(vocabulary, DEFAULTS)
    ours, theirs = (json.loads(fast.to_str()) for fast in (tokenizer.fast, published))
    return all(ours[part] == theirs[part] for part in ("normalizer", "pre_tokenizer"))
