"""The folder of a training run.

config.toml                 resolved configuration, which `bclip train` accepts again
backends.json               the operators' backends, which --resume keeps
tokenizer/
metrics.jsonl, events.jsonl, tb/
checkpoints/step-XXXXXXXX/
model/                      in open_clip's layout, written with each checkpoint
model_ema/                  the same with the EMA, if `ema_decay` is set
bad_samples.jsonl           damaged samples that were replaced
dumps/step-XXXXXXXX/        the step at which the run gave up (replay.py)
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from bclip_fast import config as config_files
from bclip_fast import pretrained
from bclip_fast.data.sampler import ShardSampler
from bclip_fast.data.shards.reader import ShardDataset
from bclip_fast.data.transform import Preprocess
from bclip_fast.distributed import run_on_rank0
from bclip_fast.errors import UserError
from bclip_fast.io.atomic import write_text
from bclip_fast.model.biomedclip import BiomedClip, BiomedClipConfig
from bclip_fast.model.tokenizer import Tokenizer

from . import checkpoint as checkpoints
from .config import CheckpointConfig, TrainConfig
from .engine import EngineConfig
from .init_weights import initial_tokenizer
from .precision import resolve_precision


def has_checkpoints(run: Path) -> bool:
    """Whether the folder holds a run with a checkpoint. A run without checkpoints may be overwritten."""
    return bool(checkpoints.list_checkpoints(run / "checkpoints"))


def check_unused(run: Path, resume: bool) -> bool:
    """Return whether the folder holds a run that is to be resumed.

    Raises:
        UserError: the folder holds a run, and `resume` is False.
    """
    used = has_checkpoints(run)
    if used and not resume:
        raise UserError(f"{run} holds a run already; add --resume to continue it, or choose another run folder")
    return used


def resolve_engine(engine: EngineConfig, run: Path, resume: bool) -> EngineConfig:
    """`engine` with precision "auto" resolved. A resumed run keeps its precision. Collective."""
    resumed = run if resume and has_checkpoints(run) else None
    return dataclasses.replace(engine, precision=resolve_precision(engine.precision, resumed))


def prepare(run: Path, config: TrainConfig, dataset: ShardDataset) -> None:
    """Create the run folder with config.toml and the tokenizer, unless the run is resumed.

    Raises:
        UserError: the folder holds another run, or the tokenizer cannot be read.
    """
    used = check_unused(run, config.resume)
    run.mkdir(parents=True, exist_ok=True)
    if used:
        # A resumed run can still refuse the configuration, and must then leave the folder as it is. It writes
        # config.toml later.
        return
    write_config(run, config)
    source, text = config.data.tokenizer, config.model.text
    if not source and (initial := initial_tokenizer(config)) is not None:
        tokenizer = initial
    elif source in ("", "train"):
        tokenizer = Tokenizer.train(dataset.captions(), text.vocab_size, text.context_length)
    else:
        tokenizer = Tokenizer.from_file(source, text.context_length)
    tokenizer.save(run / "tokenizer")


def write_config(run: Path, config: Any) -> None:
    """Write config.toml."""
    write_text(run / "config.toml", config_files.to_toml(config))


def read_tokenizer(run: Path, model: BiomedClipConfig) -> Tokenizer:
    """The tokenizer of the run.

    Raises:
        UserError: the tokenizer does not fit the model.
    """
    text = model.text
    tokenizer = Tokenizer.from_file(run / "tokenizer" / "tokenizer.json", text.context_length)
    if tokenizer.vocab_size > text.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, but model.text.vocab_size={text.vocab_size}; raise it"
        )
    if text.kind == "bert" and tokenizer.pad_id != text.pad_id:
        raise UserError(
            f"the tokenizer's padding token is {tokenizer.pad_id}; set model.text.pad_id={tokenizer.pad_id}"
        )
    end = int(tokenizer("", 2)[0, -1])
    if text.kind == "gpt" and end != (tokenizer.vocab_size - 1 if text.end_id is None else text.end_id):
        raise UserError(f"the tokenizer ends captions with token {end}; set model.text.end_id={end}")
    return tokenizer


def load(run: Path, model: BiomedClipConfig, sampler: ShardSampler) -> checkpoints.Checkpoint | None:
    """Read the newest intact checkpoint, and move the sampler to its position. None if the run has no checkpoint.

    Raises:
        UserError: the checkpoint belongs to another model or to other data.
    """
    folder = run / "checkpoints"
    # Rank 0 hashes the checkpoints and chooses, so that all ranks read the same one.
    step = run_on_rank0(lambda: checkpoints.load_latest(folder).step if has_checkpoints(run) else None)
    if step is None:
        return None
    saved = checkpoints.read(folder / f"step-{step:08d}")
    if difference := checkpoints.first_difference(saved.model_config, as_json(model)):
        raise UserError(f"cannot resume from {folder}: its {difference}")
    try:
        sampler.load_state_dict(saved.data)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    return saved


def save(
    run: Path,
    config: CheckpointConfig,
    checkpoint: checkpoints.Checkpoint,
    model: BiomedClip,
    preprocess: Preprocess,
    tokenizer: Tokenizer,
) -> Path:
    """Write a checkpoint, RUN/model, and RUN/model_ema if the checkpoint has an EMA. Return the checkpoint's folder.

    Args:
        model: model without storage that has the run's configuration.
    """
    options = {"keep": config.keep, "keep_every_steps": config.keep_every_steps}
    path = checkpoints.save(run / "checkpoints", checkpoint, best=checkpoint.rest["best"].get("step"), **options)
    for name, ema in {"model": {}, "model_ema": checkpoint.ema}.items():
        if ema or name == "model":
            state = {**checkpoint.model, **ema}
            with checkpoints.explain_write_errors(run / name):
                pretrained.save(run / name, model, preprocess, tokenizer, state_dict=state)
    return path


def has_model(run: Path, checkpoint: checkpoints.Checkpoint) -> bool:
    """Whether RUN/model, and RUN/model_ema of a run with an EMA, hold the weights of the checkpoint.

    A full disk or a kill after the checkpoint leaves older ones.
    """
    for name, ema in {"model": {}, "model_ema": checkpoint.ema}.items():
        if name == "model" or ema:
            try:
                state = pretrained.load(run / name)[0].state_dict()
            except UserError:
                return False
            expected = {**checkpoint.model, **ema}
            if state.keys() != expected.keys() or not all(torch.equal(state[key], expected[key]) for key in state):
                return False
    return True


def as_json(config: Any) -> dict[str, Any]:
    """A dataclass as json would read it back, for comparison with the content of a file."""
    return json.loads(json.dumps(dataclasses.asdict(config)))
