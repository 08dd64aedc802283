"""What the weights are before the first step: a whole checkpoint's, or those of towers that were pretrained apart."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

from bclip_fast import pretrained
from bclip_fast.data.transform import PreprocessConfig
from bclip_fast.errors import UserError
from bclip_fast.model import tower_config, weights
from bclip_fast.model.biomedclip import BiomedClip
from bclip_fast.model.safe_load import State, read_checkpoint
from bclip_fast.model.text import BertTower
from bclip_fast.model.tokenizer import Tokenizer
from bclip_fast.model.vision import VisionTower

from .checkpoint import first_difference
from .config import InitConfig, TrainConfig

log = logging.getLogger(__name__)

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


def new_model(config: TrainConfig) -> BiomedClip:
    """The model of a run with resolved configuration, at random, with its locked weights locked."""
    model = BiomedClip(config.model)
    pixels = PreprocessConfig()
    model.visual.set_normalization(pixels.mean, pixels.std)
    for tower, locked, unlocked in (
        (model.visual, config.lock_image, config.lock_image_unlocked_groups),
        (model.text, config.lock_text, config.lock_text_unlocked_layers),
    ):
        if locked:
            tower.lock(unlocked)
    return model


def initialise(model: BiomedClip, init: InitConfig) -> None:
    """Fills `model`, on the CPU, with what `init` names; the rest stays as it is.

    Raises:
        UserError: a file is missing, broken or unsafe, or does not fit the configuration of the model; nothing has
            been filled then but, at most, the image tower.
    """
    if init.model:
        _continue(model, init.model)
    if init.vision:
        if not isinstance(model.visual, VisionTower) or model.config.vision.kind != "vit":
            raise UserError(f"init.vision={init.vision}: a plain ViT, but model.vision.kind is not vit")
        state, content, where = _read(init.vision)
        if content is not None:
            _check_heads(where, tower_config.vit_heads(content, where), model.config.vision.heads, "vision")
        filled = weights.from_vit(state, model.visual, source=where)
        log.info("image tower from %s; at random: %s", where, _fill(model.visual, filled))
    if init.text:
        if not isinstance(model.text, BertTower):
            raise UserError(f"init.text={init.text}: a BERT, but model.text.kind is {model.config.text.kind}")
        state, content, where = _read(init.text)
        if content is not None:
            _check_heads(where, tower_config.read_bert_config(content, where).heads, model.config.text.heads, "text")
        filled = weights.from_bert(state, model.text, source=where)
        log.info("text tower from %s; at random: %s", where, _fill(model.text, filled))


def initial_tokenizer(config: TrainConfig) -> Tokenizer | None:
    """The tokenizer of what the run starts from, None where that has none. Raises UserError where it can't be read."""
    if config.init.model:
        fast = pretrained.load_tokenizer(config.init.model).fast
        return Tokenizer(fast, config.model.text.context_length)
    if not config.init.text:
        return None
    path = Path(config.init.text)
    source = pretrained.Folder(path.parent) if path.is_file() else _source(config.init.text)
    return Tokenizer.from_file(source.get(pretrained.TOKENIZER_FILES), config.model.text.context_length)


def _continue(model: BiomedClip, name: str) -> None:
    own = model.config
    loaded, preprocess, _ = pretrained.load(name, image_size=own.vision.image_size)
    # What changes no shape and no meaning of a weight may be another: the rest of the run is configured here.
    there = dataclasses.replace(
        loaded.config,
        vision=dataclasses.replace(loaded.config.vision, patch_dropout=own.vision.patch_dropout),
        text=dataclasses.replace(
            loaded.config.text, dropout=own.text.dropout, attention_dropout=own.text.attention_dropout
        ),
        init_logit_scale=own.init_logit_scale,
        init_logit_bias=own.init_logit_bias,
    )
    if own.text.kind == "bert" and own.text.context_length <= there.text.max_positions:
        there = dataclasses.replace(there, text=dataclasses.replace(there.text, context_length=own.text.context_length))
    if difference := first_difference(dataclasses.asdict(there), dataclasses.asdict(own)):
        raise UserError(f"init.model={name}: {difference}; let preset or the model section say what is there")
    defaults = PreprocessConfig()
    if (preprocess.config.mean, preprocess.config.std) != (defaults.mean, defaults.std):
        raise UserError(
            f"init.model={name} takes pixels of mean {preprocess.config.mean} and deviation {preprocess.config.std}; "
            f"training gives {defaults.mean} and {defaults.std}"
        )
    state, wanted = loaded.state_dict(), model.state_dict()
    dropped = [key for key in state if key not in wanted]
    for key in dropped:
        del state[key]
    kept = _fill(model, state)
    log.info("continuing from %s; dropped: %s; as configured: %s", name, ", ".join(dropped) or "nothing", kept)


def _fill(module: Any, state: State) -> str:
    """Loads what is there; the names of what isn't."""
    missing, unexpected = module.load_state_dict(state, strict=False)
    assert not unexpected
    return ", ".join(missing) or "nothing"


def _read(name: str) -> tuple[State, dict[str, Any] | None, str]:
    """The tensors, config.json where a folder or repository was named, and the name of the file for messages."""
    if Path(name).is_file():
        return read_checkpoint(Path(name), legacy=True), None, name
    source = _source(name)
    content = pretrained.read_json(source.get(["config.json"]))
    path = source.get(WEIGHT_FILES)
    return read_checkpoint(path, legacy=True), content, str(path)


def _source(name: str) -> pretrained.Source:
    if name.startswith(pretrained.HUB_PREFIX):
        return pretrained.Hub(name.removeprefix(pretrained.HUB_PREFIX))
    if not Path(name).is_dir():
        raise UserError(f"{name} is neither a file nor a folder; a model of the hub is named hf-hub:ORG/NAME")
    return pretrained.Folder(Path(name))


def _check_heads(where: str, found: int, wanted: int, tower: str) -> None:
    if found != wanted:
        raise UserError(f"{where}: a tower of {found} heads, but model.{tower}.heads is {wanted}")
