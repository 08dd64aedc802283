"""A small learnable dataset and a tiny model for tests of training."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bclip_fast.data.shards.format import Sample
from bclip_fast.data.shards.writer import ShardWriter
from bclip_fast.model.biomedclip import BiomedClipConfig
from bclip_fast.model.text import TextConfig
from bclip_fast.model.vision import VisionConfig
from bclip_fast.train.checkpoint import load_latest
from bclip_fast.train.config import CheckpointConfig, DataConfig, TrainConfig
from bclip_fast.train.engine import EngineConfig
from bclip_fast.train.schedule import OptimConfig

COLOURS = {
    "red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "white": (240, 240, 240),
    "yellow": (220, 220, 30), "purple": (180, 30, 180), "cyan": (30, 200, 200), "orange": (240, 140, 20),
}  # fmt: skip
PLACES = {"left": (20, 12), "right": (20, 36), "top": (10, 24), "bottom": (30, 24)}


def write_shards(
    folder: Path, num_samples: int = 96, num_val: int = 32, seed: int = 0, noise: int = 40, texts: bool = False
) -> Path:
    """Write images of coloured squares on noise, 40 x 48 pixels. 32 captions, in turn, name colour and place.

    texts: every second sample has two mentions, and every fourth a title.
    """
    generator = np.random.default_rng(seed)
    yy, xx = np.mgrid[:40, :48]
    with ShardWriter(folder, max_shard_bytes=30_000, texts=texts) as writer:
        for i in range(num_samples + num_val):
            colour, place = list(COLOURS)[i % 8], list(PLACES)[i // 8 % 4]
            pixels = generator.integers(0, noise, (40, 48, 3), dtype=np.uint8)
            y, x = PLACES[place]
            pixels[(abs(yy - y) < 9) & (abs(xx - x) < 9)] = COLOURS[colour]
            data = io.BytesIO()
            Image.fromarray(pixels).save(data, "JPEG", quality=95)
            more = {"mention": [f"see {colour} {i}", f"this is at the {place}, {i}"]} if texts and i % 2 == 0 else {}
            more |= {"title": [f"title {i}"]} if texts and i % 4 == 0 else {}
            sample = Sample(f"sample{i:04d}", data.getvalue(), f"a {colour} square at the {place}", {}, more)
            writer.write(sample, "train" if i < num_samples else "val")
    return folder


def tiny_model(dropout: float = 0.0, width: int = 32) -> BiomedClipConfig:
    return BiomedClipConfig(
        embed_dim=24,
        # Near the top of the range, because at CLIP's 1 / 0.07 the logits of an untrained tower are almost equal.
        init_logit_scale=math.log(50),
        vision=VisionConfig(image_size=32, patch_size=8, width=width, layers=2, heads=2),
        text=TextConfig(
            context_length=12, vocab_size=96, width=32, layers=2, heads=2, max_positions=16,
            dropout=dropout, attention_dropout=dropout,
        ),
    )  # fmt: skip


def tiny_run(run: Path, shards: Path, **changes: Any) -> TrainConfig:
    """Return the configuration of six fp32 steps of 16 pairs, with a checkpoint after every third step."""
    settings: dict[str, Any] = dict(
        run=str(run),
        preset="",
        batch_size=16,
        max_steps=6,
        model=tiny_model(),
        data=DataConfig(shards=str(shards), shuffle_block=32),
        optim=OptimConfig(lr=5e-4, warmup_steps=2, grad_clip_norm=2.0),
        engine=EngineConfig(name="ddp", precision="fp32"),
        checkpoint=CheckpointConfig(every_steps=3, keep=0),
    )
    return TrainConfig(**{**settings, **changes})


def weights(run: Path) -> dict[str, Any]:
    return load_latest(run / "checkpoints").model
