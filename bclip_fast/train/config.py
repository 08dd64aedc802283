"""The configuration of a pretraining run; the defaults are BiomedCLIP's."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from bclip_fast.data.files import ReadConfig
from bclip_fast.errors import UserError
from bclip_fast.model.biomedclip import BiomedClipConfig, preset

from .cluster import ClusterConfig
from .engine import EngineConfig
from .schedule import OptimConfig


@dataclass(frozen=True)
class DataConfig:
    """What is trained on, and how it is read."""

    shards: str = ""
    """Folder written by `bclip ingest build`, or the URL of a copy of it (s3://, https://, whatever fsspec reads)."""
    split: str = "train"
    tokenizer: str = "train"
    """tokenizer.json or vocab.txt, or `train`: a WordPiece vocabulary learned from the captions of the split."""
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
    max_bad_samples: int = 100
    """Different samples, over all ranks, that may turn out damaged and are replaced (bad_samples.jsonl of the run lists
    them); one more stops the run. 0: the first stops it. A shard that can't be read always does."""
    timeout_s: float = 300.0
    """A rank whose batch isn't ready this long after it was asked for stops the run, naming what is being read."""
    read: ReadConfig = field(default_factory=ReadConfig)

    def __post_init__(self) -> None:
        if self.max_bad_samples < 0:
            raise UserError(f"data.max_bad_samples={self.max_bad_samples}: must not be negative")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise UserError(f"data.crop_scale={self.crop_scale}: need 0 < smallest <= largest <= 1")


@dataclass(frozen=True)
class ValidationConfig:
    """Retrieval on held-out pairs while training."""

    every_steps: int = 0
    """0: never."""
    split: str = "val"
    batch_size: int = 64

    def __post_init__(self) -> None:
        if self.every_steps < 0:
            raise UserError(f"validation.every_steps={self.every_steps}: must not be negative")


@dataclass(frozen=True)
class CheckpointConfig:
    every_steps: int = 1000
    """Besides the one at the end; 0: only that."""
    keep: int = 2
    """How many of the newest are kept; 0: all."""

    def __post_init__(self) -> None:
        if self.every_steps < 0 or self.keep < 0:
            raise UserError(
                f"checkpoint.every_steps={self.every_steps}, checkpoint.keep={self.keep}: must not be negative"
            )


@dataclass(frozen=True)
class TrainConfig:
    """A pretraining run; the defaults are BiomedCLIP's."""

    run: str = "runs/train"
    """Folder of the run."""
    resume: bool = False
    """Continue from the newest whole checkpoint of the run folder."""
    dry_run: bool = False
    """Print what the run would take on the ranks of the cluster section, and refuse what can't fit; train nothing."""
    seed: int = 0
    epochs: int = 32
    max_steps: int = 0
    """Length in steps; 0: what `epochs` gives."""
    batch_size: int = 4096
    """Pairs in the contrastive batch, over all ranks."""
    patch_dropout_until: float = 1.0
    """Share of the steps with `model.vision.patch_dropout`; the rest sees whole images, as FLIP's last steps do."""
    preset: str = "biomedclip_b16"
    """Name of a model; empty: the model section says it all."""
    model: BiomedClipConfig = field(default_factory=BiomedClipConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.max_steps < 0:
            raise UserError(f"epochs={self.epochs}, max_steps={self.max_steps}: need at least 1 and 0")
        if self.batch_size < 1:
            raise UserError(f"batch_size={self.batch_size}: must be at least 1")
        if not 0 <= self.patch_dropout_until <= 1:
            raise UserError(f"patch_dropout_until={self.patch_dropout_until}: must lie in [0, 1]")

    def resolved(self) -> TrainConfig:
        """The same with the preset spelled out in the model section."""
        if not self.preset:
            return self
        if self.model != BiomedClipConfig():
            raise UserError(f'preset={self.preset} and a model section are both given; preset = "" takes the section')
        return dataclasses.replace(self, preset="", model=preset(self.preset))
