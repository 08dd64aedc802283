"""Initial weights: those of a complete model, or of towers that were pretrained separately."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from bclip_fast import pretrained
from bclip_fast.data.transform import PreprocessConfig
from bclip_fast.errors import UserError
from bclip_fast.io.json_files import read_object
from bclip_fast.model import tower_config, weights
from bclip_fast.model.biomedclip import BiomedClip, BiomedClipConfig
from bclip_fast.model.safe_load import State, read_checkpoint
from bclip_fast.model.text import BertTower
from bclip_fast.model.tokenizer import Tokenizer
from bclip_fast.model.vision import VisionTower
from bclip_fast.pretrained import sources

from .checkpoint import first_difference
from .config import InitConfig, TrainConfig
from .losses import LossConfig

log = logging.getLogger(__name__)

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


def new_model(config: TrainConfig) -> BiomedClip:
    """A randomly initialised model for a resolved configuration, with `requires_grad=False` on the locked weights."""
    model = BiomedClip(config.model)
    pixels = training_pixels(config.model)
    model.visual.set_normalization(pixels.mean, pixels.std)
    for tower, locked, unlocked in (
        (model.visual, config.lock_image, config.lock_image_unlocked_groups),
        (model.text, config.lock_text, config.lock_text_unlocked_layers),
    ):
        if locked:
            tower.lock(unlocked)
    return model


def set_initial_logits(clip: BiomedClip, loss: LossConfig) -> None:
    """Set the scale and the bias of a trained model's logits to those with which training by `loss` starts."""
    bias = None if clip.logit_bias is None else float(clip.logit_bias.detach())
    scale, new_bias = loss.initial_logits(float(clip.logit_scale.detach()), bias)
    clip.logit_scale.data.fill_(scale)
    if new_bias is not None:
        clip.logit_bias = nn.Parameter(torch.full_like(clip.logit_scale.data, new_bias))
    clip.config = dataclasses.replace(clip.config, init_logit_scale=scale, init_logit_bias=new_bias)


def training_pixels(model: BiomedClipConfig) -> PreprocessConfig:
    """The conversion of images in training and in the evaluation of the trained model.

    A model of vision.kind siglip gets pixels from -1 to 1, and complete images that are squeezed to a square, as the
    published models do. All others get CLIP's statistics and a centre crop.
    """
    vision = model.vision
    mean, std = vision.pixel_statistics
    mode: Literal["shortest", "squash"] = "squash" if vision.kind == "siglip" else "shortest"
    return PreprocessConfig(size=vision.image_size, mean=mean, std=std, resize_mode=mode)


def init_model(model: BiomedClip, init: InitConfig, loss: LossConfig | None = None) -> None:
    """Load the weights that `init` names into `model`, on the CPU. All other weights keep their values.

    Scale and bias of the logits are those of the loaded model, unless `loss` sets others. None: those of the model.

    Raises:
        UserError: a file is missing, damaged or unsafe, or does not fit the configuration of the model. At most, the
            weights of the image tower have changed then.
    """
    if init.model:
        _load_model(model, init.model, loss or LossConfig())
    if init.vision:
        if not isinstance(model.visual, VisionTower) or model.config.vision.kind != "vit":
            raise UserError(
                f"init.vision={init.vision} must be a plain ViT, but model.vision.kind is {model.config.vision.kind}"
            )
        state, content, source = _read(init.vision)
        if content is not None:
            heads = tower_config.vit_heads(content, source)
            _check_field(source, f"{heads} heads", heads, "vision", "heads", model.config.vision.heads)
            _tell_pixels(source, content)
        state = weights.from_vit(state, model.visual, source=source)
        log.info("image tower from %s; random: %s", source, _load(model.visual, state))
    if init.text:
        if not isinstance(model.text, BertTower):
            raise UserError(f"init.text={init.text} must be a BERT, but model.text.kind is {model.config.text.kind}")
        state, content, source = _read(init.text)
        if content is not None:
            text = tower_config.read_bert_config(content, source)
            ours = model.config.text
            _check_field(source, f"{text.heads} heads", text.heads, "text", "heads", ours.heads)
            _check_field(source, f"padding token {text.pad_id}", text.pad_id, "text", "pad_id", ours.pad_id)
            for name in ("dropout", "attention_dropout"):
                if getattr(text, name) != getattr(ours, name):
                    values = source, name, getattr(text, name), name, getattr(ours, name)
                    log.warning("%s has %s %g, but this run trains with model.text.%s=%g", *values)
        state = weights.from_bert(state, model.text, source=source)
        log.info("text tower from %s; random: %s", source, _load(model.text, state))


def initial_tokenizer(config: TrainConfig) -> Tokenizer | None:
    """The tokenizer of the initial model or text tower. None if the run has neither.

    Raises:
        UserError: the tokenizer cannot be read.
    """
    if config.init.model:
        return pretrained.load_tokenizer(config.init.model).with_context_length(config.model.text.context_length)
    if not config.init.text:
        return None
    path = Path(config.init.text)
    source = sources.Folder(path.parent) if path.is_file() else _source(config.init.text)
    return Tokenizer.from_file(sources.tokenizer_file(source), config.model.text.context_length)


def _load_model(model: BiomedClip, name: str, loss: LossConfig) -> None:
    config = model.config
    loaded, preprocess, _ = pretrained.load(
        name, image_size=config.vision.image_size, context_length=config.text.context_length
    )
    set_initial_logits(loaded, loss)
    # Fields that change neither the shape nor the meaning of a weight may differ.
    expected = dataclasses.replace(
        loaded.config,
        vision=dataclasses.replace(loaded.config.vision, patch_dropout=config.vision.patch_dropout),
        text=dataclasses.replace(
            loaded.config.text, dropout=config.text.dropout, attention_dropout=config.text.attention_dropout
        ),
        init_logit_scale=config.init_logit_scale,
        init_logit_bias=config.init_logit_bias,
    )
    if config.text.kind != "bert":  # the other towers have as many positions as tokens
        text = dataclasses.replace(expected.text, max_positions=config.text.max_positions)
        expected = dataclasses.replace(expected, text=text)
    if difference := first_difference(dataclasses.asdict(expected), dataclasses.asdict(config)):
        raise UserError(f"init.model={name}: its {difference}; change preset or the model section to fit")
    pixels = training_pixels(config)
    if (preprocess.config.mean, preprocess.config.std) != (pixels.mean, pixels.std):
        raise UserError(
            f"init.model={name} expects pixels of mean {preprocess.config.mean} and standard deviation "
            f"{preprocess.config.std}, but training normalises to {pixels.mean} and {pixels.std}"
        )
    state, expected_keys = loaded.state_dict(), model.state_dict().keys()
    dropped = [key for key in state if key not in expected_keys]
    for key in dropped:
        del state[key]
    missing = _load(model, state)
    log.info("model from %s; dropped: %s; initialised by config: %s", name, ", ".join(dropped) or "nothing", missing)


def _load(module: Any, state: State) -> str:
    """Load a state that may lack tensors. Return the names of the missing ones."""
    missing, unexpected = module.load_state_dict(state, strict=False)
    assert not unexpected
    return ", ".join(missing) or "nothing"


def _read(name: str) -> tuple[State, dict[str, Any] | None, str]:
    """The tensors, the content of config.json (None for a single file), and the file's name for messages."""
    if Path(name).is_file():
        return read_checkpoint(Path(name), legacy=True), None, name
    source = _source(name)
    content = read_object(source.get(["config.json"]))
    path = source.get(WEIGHT_FILES)
    return read_checkpoint(path, legacy=True), content, str(path)


def _source(name: str) -> sources.Source:
    if name.startswith(sources.HUB_PREFIX):
        return sources.Hub(name.removeprefix(sources.HUB_PREFIX))
    if not Path(name).is_dir():
        raise UserError(f"{name} is neither a file nor a folder; write hf-hub:ORG/NAME for a model of the hub")
    return sources.Folder(Path(name))


def _tell_pixels(source: str, content: dict[str, Any]) -> None:
    """Warn if timm's config.json names another mean or standard deviation of the pixels than training has."""
    defaults, theirs = PreprocessConfig(), content.get("pretrained_cfg")
    for name in ("mean", "std"):
        values = theirs.get(name) if isinstance(theirs, dict) else None
        if isinstance(values, list) and tuple(values) != getattr(defaults, name):
            log.warning(
                "%s expects pixels of %s %s, but training normalises to %s",
                source,
                name,
                values,
                getattr(defaults, name),
            )


def _check_field(source: str, theirs: str, value: Any, tower: str, name: str, ours: Any) -> None:
    """Raise UserError if the tower has another value of a field that the weights' shapes don't show."""
    if value != ours:
        raise UserError(f"{source} has {theirs}, but model.{tower}.{name}={ours}; set it to {value}")
