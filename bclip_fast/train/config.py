"""The configuration of a pretraining run; the defaults are BiomedCLIP's."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from bclip_fast.data.storage import ReadConfig
from bclip_fast.errors import UserError
from bclip_fast.hardware import ClusterConfig, Precision
from bclip_fast.model.biomedclip import BiomedClipConfig
from bclip_fast.model.presets import preset

from .engine.deepspeed import EngineConfig
from .loss_spikes import SpikeConfig
from .schedule import OptimConfig


@dataclass(frozen=True)
class DataConfig:
    """What is trained on, and how it is read."""

    shards: str = ""
    """Folder written by `bclip ingest build`, or the URL of a copy of it (s3://, https://, whatever fsspec reads)."""
    split: str = "train"
    tokenizer: str = ""
    """tokenizer.json or vocab.txt, or `train`: a WordPiece vocabulary learned from the captions of the split. Empty:
    that of init.model or init.text, and without them `train`."""
    shuffle_block: int = 8192
    """Samples shuffled together; larger mixes better and reads less sequentially."""
    augment: bool = True
    """Random resized crops; False takes the centre crop of evaluation."""
    crop_scale: tuple[float, float] = (0.9, 1.0)
    """Smallest and largest share of the image's area in a crop."""
    loader: Literal["native", "dali"] = "native"
    """What decodes and resizes: our code on the CPU, or NVIDIA DALI, on the GPU where there is one; same batches."""
    num_threads: int = 2
    """Threads a rank that decode images."""
    prefetch_batches: int = 2
    """Batches prepared ahead; from a URL, read ahead."""
    spool_above_mib: int = 0
    """With micro-batches, a rank's pairs wait in so much memory, and what is more in a file, to be embedded a second
    time: 150 kB a pair at 224 pixels, in 0.08 ms."""
    spool_dir: str = ""
    """Folder of that file, which no other process sees; empty: the system's for temporary files."""
    max_bad_samples: int = 100
    """Different samples, over all ranks, that may turn out damaged and are replaced (bad_samples.jsonl of the run lists
    them); one more stops the run. 0: the first stops it. A shard that can't be read always does."""
    timeout_s: float = 300.0
    """A rank whose batch isn't ready this long after it was asked for stops the run, naming what is being read."""
    read: ReadConfig = field(default_factory=ReadConfig)

    def __post_init__(self) -> None:
        if self.max_bad_samples < 0:
            raise UserError(f"data.max_bad_samples={self.max_bad_samples}: must not be negative")
        if self.spool_above_mib < 0:
            raise UserError(f"data.spool_above_mib={self.spool_above_mib}: must not be negative")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise UserError(f"data.crop_scale={self.crop_scale}: need 0 < smallest <= largest <= 1")


@dataclass(frozen=True)
class InitConfig:
    """What the weights are at the start of a run; what isn't named here is drawn at random."""

    model: str = ""
    """A whole model to continue from: a run folder, a folder in open_clip's layout, or hf-hub:ORG/NAME."""
    vision: str = ""
    """An ImageNet ViT in timm's or transformers' layout: hf-hub:ORG/NAME, a folder or a file of weights."""
    text: str = ""
    """A BERT in transformers' layout, likewise, with its vocabulary beside it."""

    def __post_init__(self) -> None:
        if self.model and (self.vision or self.text):
            raise UserError("init.model is a whole model, and init.vision and init.text are parts of one: give either")


@dataclass(frozen=True)
class ValidationConfig:
    """Retrieval on held-out pairs, and zero-shot tasks, while training and after the last step."""

    every_steps: int = 0
    """0: never."""
    every_epochs: int = 0
    """Besides `every_steps`; 0: never."""
    split: str = "val"
    batch_size: int = 64
    zero_shot: tuple[str, ...] = ()
    """Zero-shot tasks as of `bclip eval --task`: of the package (pcam, lc25000_lung, ...), or TOML files."""
    zero_shot_data: str = ""
    """Folder of the tasks' data, as of `bclip eval --data`; empty: the shards of the run."""

    def __post_init__(self) -> None:
        if self.every_steps < 0 or self.every_epochs < 0:
            raise UserError(
                f"validation.every_steps={self.every_steps}, validation.every_epochs={self.every_epochs}: "
                "must not be negative"
            )
        if self.zero_shot and not self.every_steps and not self.every_epochs:
            raise UserError("validation.zero_shot needs validation.every_steps or validation.every_epochs")


@dataclass(frozen=True)
class LogConfig:
    """Where figures go besides the terminal, metrics.jsonl and TensorBoard, which is used where it is installed."""

    wandb: bool = False
    """Weights & Biases (pip install wandb); WANDB_MODE=offline keeps its files in the run folder."""
    wandb_project: str = "bclip_fast"


@dataclass(frozen=True)
class CheckpointConfig:
    every_steps: int = 1000
    """Besides the one at the end; 0: only that."""
    keep: int = 2
    """How many of the newest are kept; 0: all."""
    keep_every_steps: int = 0
    """Those of multiples of this many steps are kept for ever; 0: none."""
    best: str = ""
    """A figure of the validation, such as `image to text R@5`: the checkpoint of its highest value, or with a minus in
    front of its lowest, is kept, and one written whenever it improves. Empty: none."""
    background: bool = True
    """Write while training goes on: rank 0 holds a copy of weights and optimiser states in host memory till then."""

    def __post_init__(self) -> None:
        for name in ("every_steps", "keep", "keep_every_steps"):
            if getattr(self, name) < 0:
                raise UserError(f"checkpoint.{name}={getattr(self, name)}: must not be negative")


@dataclass(frozen=True)
class TrainConfig:
    """A pretraining run; the defaults are BiomedCLIP's."""

    run: str = "runs/train"
    """Folder of the run."""
    resume: bool = False
    """Continue from the newest whole checkpoint of the run folder, and begin where there is none, so that a launcher
    restarts a run by the command that began it. Without it a folder with checkpoints is refused."""
    dry_run: bool = False
    """As `bclip plan`: print what the run would take on the ranks of the cluster section, and refuse what can't fit."""
    seed: int = 0
    epochs: int = 32
    max_steps: int = 0
    """Length in steps; 0: what `epochs` gives."""
    batch_size: int = 4096
    """Pairs in the contrastive batch, over all ranks."""
    batch_schedule: tuple[tuple[int, int], ...] = ()
    """(epoch, pairs): the contrastive batch from that epoch on, such as [[0, 4096], [8, 65536]]."""
    micro_batch_size: int = 0
    """Pairs that a rank embeds at a time; 0: its whole share of the batch. Exact, whatever it is, in the memory of one
    micro-batch; where there is more than one, the towers run forward twice. Batch norms (RN50) are of these pairs."""
    ema_decay: float = 0.0
    """Of the moving average of the weights, such as 0.9999; 0: none. It is validated as they are and saved beside them,
    in the run's model_ema/. 4 bytes a weight, on rank 0, or over all ranks under ZeRO 3."""
    patch_dropout_until: float = 1.0
    """Share of the steps with `model.vision.patch_dropout`; the rest sees whole images, as FLIP's last steps do."""
    timeout_s: float = 1800.0
    """A collective that takes longer ends the run: a rank is lost. Above data.timeout_s and what a validation takes,
    during which the other ranks wait."""
    lock_image: bool = False
    """LiT (arXiv 2111.07991): the image tower keeps its weights, but for its projection and the groups named next."""
    lock_image_unlocked_groups: int = 0
    """How many groups at the end are trained all the same: the layers, the last with the norm behind it."""
    lock_text: bool = False
    """The same of the text tower."""
    lock_text_unlocked_layers: int = 0
    preset: str = "biomedclip_b16"
    """Name of a model; empty: the model section says it all."""
    model: BiomedClipConfig = field(default_factory=BiomedClipConfig)
    init: InitConfig = field(default_factory=InitConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    spikes: SpikeConfig = field(default_factory=SpikeConfig)
    log: LogConfig = field(default_factory=LogConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.max_steps < 0:
            raise UserError(f"epochs={self.epochs}, max_steps={self.max_steps}: need at least 1 and 0")
        if self.batch_size < 1:
            raise UserError(f"batch_size={self.batch_size}: must be at least 1")
        if self.timeout_s <= 0:
            raise UserError(f"timeout_s={self.timeout_s}: must be above 0")
        if self.micro_batch_size < 0:
            raise UserError(f"micro_batch_size={self.micro_batch_size}: must not be negative")
        if any(epoch < 0 for epoch, _ in self.batch_schedule):
            raise UserError(f"batch_schedule={self.batch_schedule}: epochs must not be negative")
        if not 0 <= self.patch_dropout_until <= 1:
            raise UserError(f"patch_dropout_until={self.patch_dropout_until}: must lie in [0, 1]")
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"ema_decay={self.ema_decay}: must lie in [0, 1)")
        for lock, rest in (("lock_image", "lock_image_unlocked_groups"), ("lock_text", "lock_text_unlocked_layers")):
            if getattr(self, rest) < 0 or (getattr(self, rest) and not getattr(self, lock)):
                raise UserError(f"{rest}={getattr(self, rest)}: must not be negative, and needs {lock}")

    @property
    def first_batch_size(self) -> int:
        """The global batch in epoch 0."""
        return dict(self.batch_schedule).get(0, self.batch_size)

    def resolved(self) -> TrainConfig:
        """The same with the preset spelled out in the model section."""
        if not self.preset:
            return self
        if self.model != BiomedClipConfig():
            raise UserError(f'preset={self.preset} and a model section are both given; preset = "" takes the section')
        return dataclasses.replace(self, preset="", model=preset(self.preset))

    def with_precision(self, precision: Precision) -> TrainConfig:
        """The same with "auto" resolved."""
        return dataclasses.replace(self, engine=dataclasses.replace(self.engine, precision=precision))
