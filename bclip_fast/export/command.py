"""`bclip export MODEL --to FORMAT -o DIR`: write a model for other software, with a model card."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from bclip_fast import pretrained
from bclip_fast.data.transform import Preprocess
from bclip_fast.errors import UserError
from bclip_fast.io.atomic import replacing_files
from bclip_fast.model import weights
from bclip_fast.model.biomedclip import BiomedClip
from bclip_fast.model.image_classifier import ClassHead
from bclip_fast.model.tokenizer import Tokenizer
from bclip_fast.pretrained import class_head, model_card
from bclip_fast.train import checkpoint as checkpoints

from . import card, classifier, onnx_files, parity, sentence_transformers, usage

log = logging.getLogger(__name__)

Format = Literal["open_clip", "transformers", "sentence_transformers", "onnx", "safetensors"]


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a model for other software, with a model card."""

    model: tyro.conf.Positional[str]
    """Model: a run folder, RUN/model_ema, a folder in open_clip's or transformers' layout, or hf-hub:ID."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder to write. It is created if necessary."""
    to: Format = "open_clip"
    """open_clip: one folder, as on the hub. transformers: CLIPModel or SiglipModel, or a folder for each tower.
    sentence_transformers: one folder, from 5.4 on. onnx: both towers, or the classifier of a run on classes, checked by
    onnxruntime. safetensors: the weights alone, with open_clip's names."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Number format of the weights. onnx takes fp32."""
    int8: bool = False
    """With --to onnx: also write graphs with weights of 8 bits, and print their loss of accuracy."""
    data: str = ""
    """With --to onnx: images with captions on which the graphs are checked, as of `bclip eval`. If empty, made-up
    pictures and captions."""
    split: str = "test"
    """Split of the data."""
    step: int = 0
    """Step of the checkpoint to export. 0 exports the newest. Needs a run folder."""
    evaluations: tuple[Path, ...] = ()
    """Folders of `bclip eval`, whose figures the card shows."""
    license: str = ""
    """Licence of the weights for the card, as the hub names it, such as mit or cc-by-nc-4.0."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.+-]*", self.license):
            raise UserError(f"license={self.license!r} is not a licence's name; take the hub's, such as cc-by-nc-4.0")
        if self.to != "onnx" and (self.int8 or self.data):
            raise UserError(f"int8 and data need --to onnx, not --to {self.to}")
        if self.to == "onnx" and self.precision != "fp32":
            raise UserError(f"precision={self.precision} isn't possible with --to onnx; use --int8 for small graphs")


def run(config: ExportConfig) -> None:
    """Run `bclip export`.

    Raises:
        UserError: the model or checkpoint does not exist, another library has no place for a part of the model, an
            exported graph differs from the model, or the folder cannot be written.
    """
    if config.to == "onnx":
        onnx_files.check_packages()
    model, preprocess, tokenizer = pretrained.load(config.model, precision=config.precision)
    head = None
    if class_head.is_run(Path(config.model)):
        head = class_head.load(Path(config.model), model.config.embed_dim)
        if config.step or config.int8 or config.data:
            raise UserError(
                f"{config.model} is a classifier, whose best epoch is exported in full precision and checked on "
                "made-up pictures; leave out --step, --int8 and --data"
            )
    if config.step:
        _load_step(model, config)
    save: dict[Format, Callable[..., None]] = {
        "open_clip": pretrained.save,
        "transformers": pretrained.save_transformers,
        "sentence_transformers": sentence_transformers.save,
        "onnx": lambda *arguments: _save_onnx(config, *arguments),
        "safetensors": _save_weights,
    }
    shown = usage.text(config.to, model.config, tokenizer)
    if head is not None and config.to == "onnx":
        save["onnx"], shown = functools.partial(_save_classifier, head), classifier.USAGE
    with checkpoints.explain_write_errors(config.out), replacing_files(config.out) as partial:
        # All files together, so that no card describes the files of another export.
        save[config.to](partial, model, preprocess, tokenizer)
        card.write(
            partial,
            Path(config.model).name or config.model,
            shown,
            usage.LIBRARIES[config.to],
            model.config,
            run=card.read_run(Path(config.model)),
            licence=config.license,
            evaluated=config.evaluations,
        )
        if not model_card.is_replaceable(config.out):
            (partial / model_card.FILE).unlink()
    log.info("wrote %s", config.out)


def _load_step(model: BiomedClip, config: ExportConfig) -> None:
    path = Path(config.model) / "checkpoints" / f"step-{config.step:08d}"
    if problem := checkpoints.verify(path):
        steps = [checkpoints.step_of(other) for other in reversed(checkpoints.list_checkpoints(path.parent))]
        raise UserError(f"{path} cannot be exported: {problem}; the run has checkpoints of steps {steps}")
    model.load_state_dict(checkpoints.read(path).model)


def _save_onnx(
    config: ExportConfig, folder: Path, model: BiomedClip, preprocess: Preprocess, tokenizer: Tokenizer
) -> None:
    """Write ONNX graphs that give the model's embeddings."""
    if config.data:
        samples = parity.read_samples(config.data, config.split, preprocess)
    else:
        samples = parity.made_up_samples(model.config.vision.image_size)

    def check(written: Path) -> None:
        loss = parity.check(written, model, tokenizer, samples, int8=config.int8)
        if loss is not None:
            print(loss)

    onnx_files.save(folder, model, preprocess, tokenizer, int8=config.int8, check=check)


def _save_classifier(
    head: ClassHead, folder: Path, model: BiomedClip, preprocess: Preprocess, tokenizer: Tokenizer
) -> None:
    classifier.save(folder, model, head, preprocess)


def _save_weights(folder: Path, model: BiomedClip, preprocess: Preprocess, tokenizer: Tokenizer) -> None:
    """Write only the weights. The other arguments are those of every format."""
    from safetensors.torch import save_file

    state = weights.to_open_clip(model.state_dict(), model.config)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
