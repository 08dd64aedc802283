"""A model that sees colours, with its images, for tests of evaluation and search."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from bclip_fast.data.shards.format import Sample
from bclip_fast.data.shards.writer import ShardWriter
from bclip_fast.errors import UserError
from bclip_fast.eval import EvalConfig, evaluate

COLOURS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200), "grey": (120, 120, 120)}


class ColourModel(nn.Module):
    """Embeds an image by its mean colour and a text by the colour word in it.

    nan_tower: "image" makes the last embedding of each batch NaN.
    """

    def __init__(self, nan_tower: str = "") -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.nan_tower = nan_tower

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        assert not self.training
        assert not torch.is_grad_enabled()
        features = image.mean((2, 3)) - 0.2
        if self.nan_tower == "image":
            features = features.clone()
            features[-1, 0] = torch.nan
        return F.normalize(features, dim=1) if normalize else features

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        features = text[:, :3].float() + 0.01 * text[:, 3:].float()
        return F.normalize(features, dim=1) if normalize else features


def preprocess(image: Image.Image) -> Tensor:
    pixels = np.asarray(image.convert("RGB").resize((8, 8)), dtype=np.float32) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1)


def tokenizer(texts: list[str]) -> Tensor:
    """Return a row per text: red, green and blue of its colour word, and its length."""
    rows = [[*COLOURS.get(next((c for c in COLOURS if c in text), ""), (1, 1, 1)), len(text)] for text in texts]
    return torch.tensor(rows)


def colour_model() -> tuple[nn.Module, Callable[[Image.Image], Tensor], Callable[[list[str]], Tensor]]:
    return ColourModel(), preprocess, tokenizer


def evaluate_with(config: EvalConfig, model: object = None, transform=preprocess, tokens=tokenizer) -> dict[str, Any]:
    """Evaluate a model, by default the colour model, with all fields of `config`."""
    settings = {field.name: getattr(config, field.name) for field in dataclasses.fields(EvalConfig)}
    return evaluate((model or ColourModel(), transform, tokens), settings.pop("task"), **settings)


def assert_refused(data: object, message: str, **options: object) -> None:
    """Assert that the evaluation of `data` raises a UserError of one line that matches `message`."""
    with pytest.raises(UserError, match=message) as caught:
        evaluate_with(EvalConfig(data=str(data), progress=False, **options))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def jpeg(colour: tuple[int, int, int], size: int = 16) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def jitter(colour: tuple[int, int, int], i: int) -> tuple[int, int, int]:
    """Change the colour a little, by an amount that depends on i."""
    return tuple(channel + (i * 7 + j * 3) % 11 for j, channel in enumerate(colour))  # type: ignore[return-value]


def write_class_folders(root: Path, num_images: dict[str, int]) -> Path:
    """Write root/SPLIT/{red,blue}/NUMBER.jpg. num_images: number of images per class of each split."""
    for split, num in num_images.items():
        for name in ("red", "blue"):
            (root / split / name).mkdir(parents=True)
            for i in range(num):
                (root / split / name / f"{i}.jpg").write_bytes(jpeg(jitter(COLOURS[name], i)))
    return root


def write_shards(
    root: Path, num: int, caption: Callable[[int, str], str], meta: Callable[[int, str], dict[str, Any]]
) -> Path:
    """Write pairs s000, s001, ... of the four colours in turn, in split `val`.

    caption, meta: caption and metadata of pair i, whose colour has a name.
    """
    with ShardWriter(root) as writer:
        for i in range(num):
            name = list(COLOURS)[i % 4]
            writer.write(Sample(f"s{i:03d}", jpeg(jitter(COLOURS[name], i)), caption(i, name), meta(i, name)), "val")
    return root


def unit_rows(num: int, dim: int, seed: int) -> Tensor:
    """Return random rows (num, dim) of unit norm."""
    return F.normalize(torch.randn(num, dim, generator=torch.Generator().manual_seed(seed)), dim=1)
