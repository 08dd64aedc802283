"""The configuration of `bclip finetune`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import tyro

from bclip_fast.data import filters
from bclip_fast.data.sources import Sources, as_sources, refuse_weights
from bclip_fast.errors import UserError

from .engine import EngineConfig
from .loss_spikes import SpikeConfig
from .losses import LossConfig
from .schedule import OptimConfig


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Fine-tuning of a trained model."""

    model: tyro.conf.Positional[str]
    """Model to start from: a run folder, a folder in the layout of open_clip or transformers, or hf-hub:ID."""
    data: Sources
    """For pairs: shards, a .csv with columns path,caption, or a folder of images with .txt files beside them. For
    questions: the data of --task. For classes: a .csv with columns path,label, a folder of classes, or shards."""
    split: str = "train"
    """Split of the data to train on."""
    filter: str = ""
    """Only for shards: train on the samples that this expression selects (docs/data.md). For classes, it selects in val
    and test too. If empty, the selection that the shards record. all: no filter."""
    task: str = ""
    """classification: a classifier on images. Or a task of the protocol vqa: vqa_rad, slake, a TOML file, or `vqa` for
    a CSV. If empty, train on pairs with the contrastive loss."""
    label: str = ""
    """For classes: the column of the classes. Default: `label`, or the only column besides path, split and group."""
    multi_label: bool = False
    """For classes: an image may have several, joined by | in its cell."""
    group: str = ""
    """For classes: a column such as patient_id. No group may be in two splits. Without a column split, the run makes
    train, val and test of whole groups, and writes them to splits.csv."""
    class_weights: str = "none"
    """For classes: none, balanced (rare classes count more), or weights such as melanoma=4,nevus=1."""
    prompts: str = ""
    """For classes: where the head starts. Empty: at zero. labels: at the text embeddings of the class names. Or a
    prompt set of `bclip eval`: the name of a task, or a TOML file."""
    metric: Literal["auroc", "accuracy", "balanced_accuracy", "loss"] = "auroc"
    """For classes: the metric on val that chooses the best epoch."""
    patience: int = 5
    """For classes: stop after so many epochs without a better metric. 0 never stops early."""
    run: str = "runs/finetune"
    """Run folder."""
    resume: bool = False
    """Continue from the newest intact checkpoint in the run folder. Without any checkpoint, start the run. Without
    --resume, a folder that isn't empty is an error."""
    allow_changes: bool = False
    """With --resume: allow settings that change the arithmetic of the run, such as the learning rate. The run's records
    list every change with its step. Some settings, such as lora_rank, can't change."""
    positives: Literal["pair", "captions", "images", "duplicates", "figure", "article"] = "pair"
    """As data.positives of `bclip train`. Data other than shards of `bclip ingest` take pair or captions."""
    epochs: int = 10
    """Number of passes over the data."""
    batch_size: int = 32
    """Samples in the global batch, over all ranks."""
    seed: int = 0
    """Seed of order, crops, dropout and new weights."""
    lora_rank: int = 0
    """Rank of LoRA (arXiv 2106.09685) in the linear layers of the towers, through peft. 0 trains every weight."""
    lora_alpha: int = 16
    """Scale of the LoRA adapters: their output is multiplied by lora_alpha / lora_rank."""
    freeze_towers: bool = False
    """For questions and classes: train only the head. For classes, the images are then embedded only once."""
    head_layers: int = 6
    """Number of co-attention layers per stream in METER's head."""
    crop_scale: tuple[float, float] = (0.9, 1.0)
    """Smallest and largest share of an image's area in a training crop. 1 1 takes the centre crop."""
    num_workers: int = 2
    """Threads per rank that read and decode images."""
    on_bad_image: Literal["skip", "stop"] = "skip"
    """Damaged images. skip: a sample drawn by the seed takes their place, and bad_samples.jsonl lists them. stop: an
    error after a checkpoint."""
    checkpoint_every: int = 500
    """Interval of checkpoints in steps. The last step always has a checkpoint. 0 writes only that one, and those of
    signals and unreadable data."""
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(lr=1e-5, warmup_steps=100, weight_decay=0.01, eps=1e-8, decay="linear")
    )
    engine: EngineConfig = field(default_factory=lambda: EngineConfig(name="ddp"))
    spikes: SpikeConfig = field(default_factory=SpikeConfig)

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", as_sources(self.data, "data"))
        refuse_weights(self.data, "bclip finetune")
        self.engine.check_optimizer(self.optim)
        if self.checkpoint_every < 0:
            raise UserError(f"checkpoint_every={self.checkpoint_every} must not be negative")
        if self.epochs < 1 or self.batch_size < 2 or self.lora_rank < 0 or self.num_workers < 1:
            raise UserError(
                f"epochs={self.epochs}, batch_size={self.batch_size}, lora_rank={self.lora_rank} and "
                f"num_workers={self.num_workers} must be at least 1, 2, 0 and 1"
            )
        self.loss.check_positives("positives", self.positives)
        if self.loss.kind == "coca":
            raise UserError("loss.kind=coca needs bclip train: fine-tuning doesn't train a decoder; set loss.kind=clip")
        self._check_classes()
        if self.filter not in ("", filters.ALL):
            filters.parse(self.filter)
            if self.task not in ("", "classification"):
                raise UserError(f"filter={self.filter!r} selects pairs, but task={self.task} has none; leave it out")
        if self.task and (self.loss != LossConfig() or self.positives != "pair"):
            raise UserError(f"task={self.task} has its own loss; the section loss and positives need pairs")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise UserError(f"crop_scale={self.crop_scale} must satisfy 0 < smallest <= largest <= 1")

    def _check_classes(self) -> None:
        """Check what only the task classification takes. Raises UserError."""
        if self.patience < 0:
            raise UserError(f"patience={self.patience} must not be negative")
        if self.task != "classification":
            defaults = {"label": "", "multi_label": False, "group": "", "class_weights": "none", "prompts": ""}
            for name, default in defaults.items():
                if getattr(self, name) != default:
                    raise UserError(f"{name}={getattr(self, name)} needs --task classification")
            return
        if self.multi_label and self.metric == "balanced_accuracy":
            raise UserError("metric=balanced_accuracy is for one class per image; use auroc with --multi_label")
        limits = self.spikes.loss, self.spikes.grad_norm
        if limits not in ((SpikeConfig.loss, SpikeConfig.grad_norm), (0, 0)):
            raise UserError(
                f"spikes.loss={limits[0]:g} and spikes.grad_norm={limits[1]:g} would skip the hard images that a "
                "classifier must learn; leave them out"
            )
        if self.freeze_towers and self.lora_rank:
            raise UserError(
                f"lora_rank={self.lora_rank} trains the image tower, which freeze_towers excludes; leave one"
            )
        if self.engine.name != "ddp" or self.engine.compile:
            raise UserError(
                f"engine.name={self.engine.name} with engine.compile={self.engine.compile} can't train a classifier; "
                "use ddp without compile"
            )
