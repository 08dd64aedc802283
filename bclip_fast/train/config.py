"""The configuration of a pretraining run. Its defaults are BiomedCLIP's."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from bclip_fast.data import filters
from bclip_fast.data.sources import Sources, as_sources
from bclip_fast.data.storage import ReadConfig
from bclip_fast.data.texts import CaptionWeights
from bclip_fast.errors import UserError
from bclip_fast.hardware import ClusterConfig, Precision
from bclip_fast.model.biomedclip import BiomedClipConfig
from bclip_fast.model.presets import preset
from bclip_fast.model.vision import num_kept_patches

from .engine import EngineConfig
from .loss_spikes import SpikeConfig
from .losses import LossConfig
from .schedule import OptimConfig


@dataclass(frozen=True)
class DataConfig:
    """The training data, and the way to read them."""

    shards: Sources = ""
    """Folder that `bclip ingest build` wrote, or the URL of a copy of it (s3://, https:// or any other scheme of
    fsspec). Or a list of such datasets, each with a weight or a number of epochs: see docs/data.md."""
    split: str = "train"
    """Split of the dataset to train on."""
    filter: str = ""
    """Train on the samples that this expression selects by the columns of the manifest, such as
    "kind in ['ct', 'mr'] and p > 0.5" (docs/data.md). If empty, the filter that the dataset records. all: no filter."""
    positives: Literal["pair", "captions", "images", "duplicates", "figure", "article"] = "pair"
    """Samples that are positives of one another: none but the pair itself, samples with equal captions, samples whose
    images ingest found to be duplicates or near duplicates, either (duplicates), the panels of a figure, or the figures
    of an article."""
    captions: CaptionWeights = field(default_factory=CaptionWeights)
    """Weights of the texts about an image. Each epoch draws one of them for each sample. Evaluation takes the
    caption."""
    long_texts: Literal["cut", "sentences"] = "cut"
    """A text with more tokens than model.text.context_length: cut keeps its beginning. sentences divides it into parts
    of whole sentences that fit, and each epoch draws one part. Evaluation cuts."""
    tokenizer: str = ""
    """tokenizer.json or vocab.txt, or `train` to learn a WordPiece vocabulary from the texts of the split. If empty,
    the tokenizer of init.model or init.text, or `train` without them."""
    shuffle_block: int = 8192
    """Number of samples that are shuffled together. A larger block mixes better, but reads less sequentially."""
    augment: bool = True
    """Take random resized crops. False takes the centre crop of evaluation."""
    crop_scale: tuple[float, float] = (0.9, 1.0)
    """Smallest and largest share of the image's area in a crop."""
    loader: Literal["native", "dali"] = "native"
    """Decoder of the images: native is our code on the CPU. dali is NVIDIA DALI, on the GPU if there is one. Both give
    the same batches."""
    num_threads: int = 2
    """Threads per rank that decode images."""
    prefetch_batches: int = 2
    """Number of batches to prepare ahead. For a URL, also the number of batches to read ahead."""
    spool_above_mib: int = 0
    """Memory (MiB per rank) for the batch while its micro-batches wait for GradCache's second forward pass. The rest
    goes to a temporary file. A 224-pixel pair takes 150 kB."""
    spool_dir: str = ""
    """Folder of that temporary file. Other processes cannot see the file. If empty, the system's folder for temporary
    files."""
    max_bad_samples: int = 100
    """Largest number of different damaged samples, over all ranks. The run replaces them and lists them in
    bad_samples.jsonl. A run with more of them stops, so 0 stops it at the first one. An unreadable shard always stops
    it."""
    timeout_s: float = 300.0
    """Seconds that a rank waits for a batch. After that, the run stops with an error that names the file it reads."""
    read: ReadConfig = field(default_factory=ReadConfig)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shards", as_sources(self.shards, "data.shards"))
        if self.filter not in ("", filters.ALL):
            filters.parse(self.filter)
        if self.max_bad_samples < 0:
            raise UserError(f"data.max_bad_samples={self.max_bad_samples} must not be negative")
        if self.spool_above_mib < 0:
            raise UserError(f"data.spool_above_mib={self.spool_above_mib} must not be negative")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise UserError(f"data.crop_scale={self.crop_scale} must satisfy 0 < smallest <= largest <= 1")


@dataclass(frozen=True)
class InitConfig:
    """Initial weights of a run. All other weights are drawn at random."""

    model: str = ""
    """Model with both towers: a run folder, a folder in the layout of open_clip or transformers, or hf-hub:ORG/NAME."""
    vision: str = ""
    """ImageNet ViT in timm's or transformers' layout: hf-hub:ORG/NAME, a folder, or a file with weights."""
    text: str = ""
    """BERT in transformers' layout: hf-hub:ORG/NAME, a folder, or a file with weights. The vocabulary is beside the
    weights."""

    def __post_init__(self) -> None:
        if self.model and (self.vision or self.text):
            raise UserError(
                "init.model sets both towers and cannot be combined with init.vision or init.text; remove init.model, "
                "or the others"
            )


@dataclass(frozen=True)
class ValidationConfig:
    """Validation during training and after the last step: retrieval on held-out pairs, and zero-shot tasks."""

    every_steps: int = 0
    """Interval in steps. 0 turns it off."""
    every_epochs: int = 0
    """Interval in epochs, in addition to `every_steps`. 0 turns it off."""
    split: str = "val"
    """Split of the dataset to validate on."""
    batch_size: int = 64
    """Pairs that are embedded at one time."""
    zero_shot: tuple[str, ...] = ()
    """Zero-shot tasks, as for `bclip eval --task`: names of the package's tasks (pcam, lc25000_lung, ...), or TOML
    files."""
    zero_shot_data: str = ""
    """Folder with the data of the zero-shot tasks, as for `bclip eval --data`. If empty, the shards of the run."""

    def __post_init__(self) -> None:
        if self.every_steps < 0 or self.every_epochs < 0:
            raise UserError(
                f"validation.every_steps={self.every_steps} and validation.every_epochs={self.every_epochs} "
                "must not be negative"
            )
        if self.zero_shot and not self.every_steps and not self.every_epochs:
            raise UserError(
                "validation.zero_shot needs an interval; set validation.every_steps or validation.every_epochs"
            )


@dataclass(frozen=True)
class LogConfig:
    """Additional logs of the metrics. The terminal, metrics.jsonl and (if installed) TensorBoard always get them."""

    wandb: bool = False
    """Log to Weights & Biases, too (pip install wandb). WANDB_MODE=offline keeps its files in the run folder."""
    wandb_project: str = "bclip_fast"
    """Project of the run on Weights & Biases."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When to write checkpoints, and which ones to keep."""

    every_steps: int = 1000
    """Interval in steps. The last step always has a checkpoint. 0 writes only that one."""
    keep: int = 2
    """Number of newest checkpoints to keep. 0 keeps all."""
    keep_every_steps: int = 0
    """Interval, in steps, of the checkpoints that are never deleted. 0 turns this off."""
    best: str = ""
    """Validation metric, such as `image to text R@5`. The run writes a checkpoint whenever the metric reaches a new
    highest value, and keeps the best one. A leading minus selects the lowest value. Empty turns this off."""
    background: bool = True
    """Write checkpoints while training goes on. Until a checkpoint is written, rank 0 holds a copy of weights and
    optimiser states in host memory."""

    def __post_init__(self) -> None:
        for name in ("every_steps", "keep", "keep_every_steps"):
            if getattr(self, name) < 0:
                raise UserError(f"checkpoint.{name}={getattr(self, name)} must not be negative")


@dataclass(frozen=True)
class TrainConfig:
    """A pretraining run. The defaults are BiomedCLIP's."""

    run: str = "runs/train"
    """Run folder."""
    resume: bool = False
    """Continue from the newest intact checkpoint in the run folder. Without any checkpoint, start the run. So a
    launcher can restart a run with the command that started it. Without --resume, a folder that isn't empty is an
    error."""
    allow_changes: bool = False
    """With --resume: allow settings that change the arithmetic of the run, such as the learning rate. The run's records
    list every change with its step. Some settings, such as the model's sizes, can't change."""
    dry_run: bool = False
    """Same as `bclip plan`: print the memory and time that the run needs on the cluster section's ranks, and fail if
    it does not fit."""

    seed: int = 0
    """Seed of all random numbers of the run."""
    epochs: int = 32
    """Number of passes over the data."""
    max_steps: int = 0
    """Length in steps. 0 trains for `epochs`."""
    batch_size: int = 4096
    """Pairs in the global batch, over all ranks."""
    batch_schedule: tuple[tuple[int, int], ...] = ()
    """(epoch, pairs): size of the global batch from this epoch on, such as [[0, 4096], [8, 65536]]."""
    micro_batch_size: int = 0
    """Pairs that a rank embeds at one time (GradCache). 0 embeds the rank's share of the batch at once. The gradient is
    exact for any size, in the memory of one micro-batch. With several micro-batches, the towers run forward twice.
    Batch norms (RN50) normalise by a micro-batch."""
    micro_batch_tokens: int = 0
    """Tokens that a rank embeds at one time, in place of micro_batch_size. A pair costs the patches and the class token
    of its image, and the tokens of its caption. A micro-batch has as many pairs as fit, and all ranks have equally many
    micro-batches. The run counts the captions' tokens at its start, from the dataset's manifest. With several texts
    (data.captions), the longest one counts. 0 sets no limit."""
    ema_decay: float = 0.0
    """Decay of the exponential moving average (EMA) of the weights, such as 0.9999. 0 keeps no EMA. The EMA is
    validated like the weights and saved in the run's model_ema/. It takes 4 bytes a weight on rank 0, or over all ranks
    under ZeRO 3."""
    patch_dropout_until: float = 1.0
    """Share of the steps that use `model.vision.patch_dropout`. The later steps see complete images, like FLIP's last
    steps."""
    timeout_s: float = 1800.0
    """Seconds after which a collective fails, because a rank is lost. Set it above data.timeout_s and above the
    duration of a validation on rank 0, while the other ranks wait."""
    lock_image: bool = False
    """Lock the image tower (LiT, arXiv 2111.07991): only its projection and its unlocked groups are trained."""
    lock_image_unlocked_groups: int = 0
    """Number of layer groups, counted from the output, that stay trainable when the tower is locked. The last group
    includes the final norm."""
    lock_text: bool = False
    """Lock the text tower: only its projection and its unlocked layers are trained."""
    lock_text_unlocked_layers: int = 0
    """Number of layers, counted from the output, that stay trainable when the text tower is locked."""
    preset: str = "biomedclip_b16"
    """Name of a model. If empty, the model section describes the model."""
    model: BiomedClipConfig = field(default_factory=BiomedClipConfig)
    init: InitConfig = field(default_factory=InitConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    spikes: SpikeConfig = field(default_factory=SpikeConfig)
    log: LogConfig = field(default_factory=LogConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.max_steps < 0:
            raise UserError(f"epochs={self.epochs} must be at least 1, and max_steps={self.max_steps} at least 0")
        if self.batch_size < 1:
            raise UserError(f"batch_size={self.batch_size} must be at least 1")
        if self.timeout_s <= 0:
            raise UserError(f"timeout_s={self.timeout_s} must be above 0")
        if self.micro_batch_size < 0:
            raise UserError(f"micro_batch_size={self.micro_batch_size} must not be negative")
        self.engine.check_optimizer(self.optim)
        if self.micro_batch_tokens < 0:
            raise UserError(f"micro_batch_tokens={self.micro_batch_tokens} must not be negative")
        if self.micro_batch_tokens and self.micro_batch_size:
            raise UserError(
                f"micro_batch_tokens={self.micro_batch_tokens} and micro_batch_size={self.micro_batch_size} divide the "
                "batch in two ways; set one of them to 0"
            )
        if any(epoch < 0 for epoch, _ in self.batch_schedule):
            raise UserError(f"batch_schedule={self.batch_schedule} must not have negative epochs")
        if not 0 <= self.patch_dropout_until <= 1:
            raise UserError(f"patch_dropout_until={self.patch_dropout_until} must lie in [0, 1]")
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"ema_decay={self.ema_decay} must lie in [0, 1)")
        for lock, name in (("lock_image", "lock_image_unlocked_groups"), ("lock_text", "lock_text_unlocked_layers")):
            unlocked = getattr(self, name)
            if unlocked < 0 or (unlocked and not getattr(self, lock)):
                raise UserError(f"{name}={unlocked} must not be negative, and needs {lock}=true")
        self.loss.check_positives("data.positives", self.data.positives)
        if self.loss.teacher_cache != "off":
            setting = f"loss.teacher_cache={self.loss.teacher_cache} keeps one text of a sample"
            if self.data.captions.kinds != ("caption",):
                kinds = ", ".join(self.data.captions.kinds)
                raise UserError(f"{setting}, but data.captions draws {kinds}; set one of them to its default")
            if self.data.long_texts != "cut":
                raise UserError(f"{setting}, but data.long_texts=sentences draws parts; set one of them to its default")

    @property
    def first_batch_size(self) -> int:
        """The global batch size in epoch 0."""
        return dict(self.batch_schedule).get(0, self.batch_size)

    @property
    def image_tokens(self) -> int:
        """Largest number of tokens of an image in the run of a resolved configuration."""
        vision = self.model.vision
        # The last steps may see complete images.
        rate = vision.patch_dropout if self.patch_dropout_until == 1 else 0.0
        return vision.num_tokens - vision.num_patches + num_kept_patches(vision.num_patches, rate)

    def resolved(self) -> TrainConfig:
        """This configuration with the preset and the loss's initial logits written out in the model section."""
        model = self.model
        if self.preset:
            if model != BiomedClipConfig():
                raise UserError(
                    f'preset={self.preset} conflicts with the model section; set preset = "" to use the section'
                )
            model = preset(self.preset)
        self.loss.check_model(model)
        scale, bias = self.loss.initial_logits(model.init_logit_scale, model.init_logit_bias)
        model = dataclasses.replace(model, init_logit_scale=scale, init_logit_bias=bias)
        config = dataclasses.replace(self, preset="", model=model)
        longest = config.image_tokens + model.text.context_length
        if 0 < self.micro_batch_tokens < longest:
            raise UserError(
                f"micro_batch_tokens={self.micro_batch_tokens} is less than the {longest} tokens of the longest pair, "
                f"{config.image_tokens} of an image and model.text.context_length={model.text.context_length}; raise it"
            )
        return config

    def with_precision(self, precision: Precision) -> TrainConfig:
        """This configuration with precision "auto" resolved."""
        return dataclasses.replace(self, engine=dataclasses.replace(self.engine, precision=precision))
