"""The layouts of checkpoints on disk and on the hub: open_clip's, transformers' and PMC-CLIP's."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bclip_fast.data.transform import PreprocessConfig
from bclip_fast.errors import UserError
from bclip_fast.io.json_files import read_object
from bclip_fast.model import open_clip_config, transformers_clip, weights
from bclip_fast.model.biomedclip import BiomedClip, BiomedClipConfig
from bclip_fast.model.open_clip_sections import CONFIG_FILE
from bclip_fast.model.safe_load import State, read_checkpoint
from bclip_fast.model.tokenizer import Tokenizer
from bclip_fast.model.tokenizer_cleaning import Cleaning

from . import pmc_clip, processor_config
from .sources import TRANSFORMERS_CONFIG, Hub, Source, hub_json, tokenizer_file

log = logging.getLogger(__name__)

OPEN_CLIP_WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
)
TRANSFORMERS_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# The repository with the tokenizer that open_clip's package includes: CLIP's byte pairs.
_CLIP_TOKENIZER = "openai/clip-vit-base-patch32"
_CLIP_VOCABULARY = 49408


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint's small files. `read_weights` reads the weights for a model on the meta device."""

    config: BiomedClipConfig
    preprocess: PreprocessConfig
    tokenizer: Tokenizer
    read_weights: Callable[[BiomedClip], State]


def describe(source: Source) -> Checkpoint:
    """Read everything of a checkpoint except its weights, in the first layout whose files the source has.

    Raises:
        UserError: a file is missing or damaged, or a setting isn't supported. The message names it.
    """
    if source.find(CONFIG_FILE) is not None:
        return _open_clip(source)
    if (path := source.find(TRANSFORMERS_CONFIG)) is not None:
        return _transformers(source, path)
    if pmc_clip.has_files(source):
        tokenizer = _tokenizer(source, pmc_clip.CONFIG, pmc_clip.TOKENIZER)
        preprocess = PreprocessConfig(size=pmc_clip.CONFIG.vision.image_size)
        return Checkpoint(pmc_clip.CONFIG, preprocess, tokenizer, lambda model: pmc_clip.read_weights(source, model))
    raise UserError(f"{source.get([CONFIG_FILE])} is missing")  # get raises the error of its source


def _open_clip(source: Source) -> Checkpoint:
    content = read_object(source.get([CONFIG_FILE]))
    config = open_clip_config.read(content, lambda path: read_object(source.get([path])), hub_json)
    name = open_clip_config.tokenizer_name(content)
    if name is None and config.text.kind == "gpt" and config.text.vocab_size == _CLIP_VOCABULARY:
        name = _CLIP_TOKENIZER
    cleaning = open_clip_config.tokenizer_cleaning(content)
    tokenizer = _tokenizer(source, config, name, cleaning)
    preprocess = _open_clip_preprocess(content.get("preprocess_cfg", {}), config)
    config = _with_padding_of(tokenizer, config)

    def read_weights(model: BiomedClip) -> State:
        path = source.get(OPEN_CLIP_WEIGHTS)
        return weights.from_open_clip(read_checkpoint(path), model, source=str(path))

    return Checkpoint(config, preprocess, tokenizer, read_weights)


def _transformers(source: Source, path: Path) -> Checkpoint:
    config = transformers_clip.read(read_object(path), str(path))
    tokenizer = _tokenizer(source, config, None)
    preprocess = processor_config.read(source, config.vision)
    config = _with_padding_of(tokenizer, config)

    def read_weights(model: BiomedClip) -> State:
        path = source.get(TRANSFORMERS_WEIGHTS)
        return weights.from_transformers(read_checkpoint(path), model, source=str(path))

    return Checkpoint(config, preprocess, tokenizer, read_weights)


def _with_padding_of(tokenizer: Tokenizer, config: BiomedClipConfig) -> BiomedClipConfig:
    """Take the padding token of a SigLIP from its tokenizer. Published configurations name another one or none."""
    if config.text.kind != "siglip":
        return config
    return dataclasses.replace(config, text=dataclasses.replace(config.text, pad_id=tokenizer.pad_id))


def _open_clip_preprocess(content: Any, config: BiomedClipConfig) -> PreprocessConfig:
    """Read preprocess_cfg. Missing keys have open_clip's defaults, which are BiomedCLIP's too."""
    if not isinstance(content, dict):
        raise UserError(f"{CONFIG_FILE}: preprocess_cfg must be a table, not {content!r}")
    content, image_size = dict(content), config.vision.image_size
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


def _tokenizer(
    source: Source, config: BiomedClipConfig, name: str | None, cleaning: Cleaning | None = None
) -> Tokenizer:
    """The tokenizer in the checkpoint or, if it has none, of the hub's repository `name`.

    cleaning: the cleaning that the checkpoint names. None: the tokenizer's own files say it.
    """
    try:
        path = tokenizer_file(source)
    except UserError as error:
        if name is None:
            raise UserError(f"{error}; save the tokenizer next to the weights") from error
        log.info("the checkpoint has no tokenizer file; downloading the tokenizer of %s", name)
        path = tokenizer_file(Hub(name))
    # As in open_clip, the context length of the model counts, not that of the tokenizer's settings.
    tokenizer = Tokenizer.from_file(path).with_context_length(config.text.context_length)
    if cleaning is not None:
        tokenizer = tokenizer.with_cleaning(cleaning)
    check_vocabulary(tokenizer, config)
    return tokenizer


def check_vocabulary(tokenizer: Tokenizer, config: BiomedClipConfig) -> None:
    """Raise UserError unless the tokenizer fits the text tower."""
    if tokenizer.vocab_size > config.text.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, but the text tower embeds only {config.text.vocab_size}"
        )
    if config.text.kind == "bert" and tokenizer.pad_id != config.text.pad_id:
        raise UserError(
            f"the tokenizer pads with token {tokenizer.pad_id}, but the text tower ignores token {config.text.pad_id} "
            "(pad_token_id of its config.json); correct one of them"
        )
    if config.text.kind != "siglip" and not tokenizer.has_start:
        raise UserError(
            f"the tokenizer adds no start token, which a text tower of kind {config.text.kind} needs; its file needs "
            "another post_processor"
        )
