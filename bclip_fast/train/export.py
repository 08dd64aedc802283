"""`bclip train export RUN --out DIR`: a model in the layout of open_clip or of transformers."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from bclip_fast import pretrained
from bclip_fast.errors import UserError

from . import checkpoint as checkpoints

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Writes a trained model for other software."""

    model: tyro.conf.Positional[str]
    """A run folder, RUN/model_ema, a folder in open_clip's layout, or hf-hub:ID."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder to write; made if it isn't there."""
    format: Literal["open_clip", "hf"] = "open_clip"
    """open_clip: one folder as the hub has it. hf: vision/ and text/ for transformers, and projections.safetensors."""
    step: int = 0
    """Of the run, the checkpoint of this step instead of the newest."""


def run(config: ExportConfig) -> None:
    """The command.

    Raises:
        UserError: no such model or checkpoint, or nothing can be written.
    """
    model, preprocess, tokenizer = pretrained.load(config.model)
    if config.step:
        path = Path(config.model) / "checkpoints" / f"step-{config.step:08d}"
        if problem := checkpoints.verify(path):
            kept = [int(found.name[5:]) for found in reversed(checkpoints.steps(path.parent))]
            raise UserError(f"{path} cannot be exported: {problem}; the run holds steps {kept}")
        model.load_state_dict(checkpoints.read(path).model)
    with checkpoints.written(config.out):
        save = pretrained.save if config.format == "open_clip" else pretrained.save_transformers
        save(config.out, model, preprocess, tokenizer)
    log.info("wrote %s", config.out)
