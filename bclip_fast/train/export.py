"""`bclip train export RUN --out DIR`: write a model in the layout of open_clip or of transformers."""

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
    """Write a trained model for other software."""

    model: tyro.conf.Positional[str]
    """Model: a run folder, RUN/model_ema, a folder in open_clip's layout, or hf-hub:ID."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder to write. It is created if necessary."""
    format: Literal["open_clip", "hf"] = "open_clip"
    """open_clip writes one folder, as on the hub. hf writes vision/ and text/ for transformers,
    projections.safetensors, and a card: transformers' tokenizer doesn't repair captions as ours does."""
    step: int = 0
    """Step of the checkpoint to export. 0 exports the newest. Needs a run folder."""


def run(config: ExportConfig) -> None:
    """Run `bclip train export`.

    Raises:
        UserError: the model or checkpoint does not exist, or the folder cannot be written.
    """
    model, preprocess, tokenizer = pretrained.load(config.model)
    if config.step:
        path = Path(config.model) / "checkpoints" / f"step-{config.step:08d}"
        if problem := checkpoints.verify(path):
            steps = [checkpoints.step_of(other) for other in reversed(checkpoints.list_checkpoints(path.parent))]
            raise UserError(f"{path} cannot be exported: {problem}; the run has checkpoints of steps {steps}")
        model.load_state_dict(checkpoints.read(path).model)
    with checkpoints.explain_write_errors(config.out):
        save = pretrained.save if config.format == "open_clip" else pretrained.save_transformers
        save(config.out, model, preprocess, tokenizer)
    log.info("wrote %s", config.out)
