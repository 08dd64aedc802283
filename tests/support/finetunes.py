"""A small model, pairs and questions for tests of fine-tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from colours import COLOURS, jpeg
from towers import SMALL

from bclip_fast import pretrained
from bclip_fast.data.transform import Preprocess, PreprocessConfig
from bclip_fast.model.biomedclip import BiomedClip, BiomedClipConfig
from bclip_fast.model.tokenizer import Tokenizer
from bclip_fast.train.engine import EngineConfig
from bclip_fast.train.finetune import FinetuneConfig
from bclip_fast.train.schedule import OptimConfig

FP32 = EngineConfig(name="ddp", precision="fp32")
FAST = OptimConfig(lr=1e-4, warmup_steps=2, weight_decay=0.01, decay="linear")
TEXTS = ["what colour is the square", "is it red", "is it blue", "is it green", "is it grey", "a dark square"]


def write_start(
    folder: Path, config: BiomedClipConfig = SMALL, texts: list[str] = TEXTS, seed: int = 1, **preprocess: Any
) -> Path:
    """Write a small model, with the words of the questions in its vocabulary."""
    words = Tokenizer.train(texts * 3, 100, context_length=20)
    torch.manual_seed(seed)
    pretrained.save(folder, BiomedClip(config), Preprocess(PreprocessConfig(size=32, **preprocess)), words)
    return folder


def write_questions(folder: Path) -> Path:
    """Write questions.csv with 20 questions about images of one colour."""
    lines = ["image,question,answer,answer_type,split"]
    for name, colour in COLOURS.items():
        (folder / f"{name}.jpg").write_bytes(jpeg(colour, 40))
        lines.append(f"{name}.jpg,what colour is the square,{name},open,train")
        lines += [f"{name}.jpg,is it {other},{'Yes.' if other == name else 'no'},closed,train" for other in COLOURS]
    (folder / "questions.csv").write_text("\n".join(lines) + "\n")
    return folder / "questions.csv"


def write_pairs(folder: Path) -> Path:
    """Write write_pairs.csv with 16 pairs."""
    lines = ["path,caption"]
    for i in range(16):
        name = list(COLOURS)[i % 4]
        (folder / f"p{i}.jpg").write_bytes(jpeg(tuple(min(255, c + i) for c in COLOURS[name]), 40))  # type: ignore[arg-type]
        lines.append(f"p{i}.jpg,{'a dark' if name == 'grey' else 'is it ' + name} square")
    (folder / "write_pairs.csv").write_text("\n".join(lines) + "\n")
    return folder / "write_pairs.csv"


def settings(start: Path, data: Path, run: Path, **changes: object) -> FinetuneConfig:
    """Two epochs of 4 samples a step, with a checkpoint after each fifth step."""
    options = {
        "task": "vqa",
        "epochs": 2,
        "batch_size": 4,
        "head_layers": 1,
        "optim": FAST,
        "engine": FP32,
        "checkpoint_every": 5,
    }
    return FinetuneConfig(model=str(start), data=str(data), run=str(run), **(options | changes))  # type: ignore[arg-type]
