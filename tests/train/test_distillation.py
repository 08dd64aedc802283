"""Training with a teacher: what it embeds, when, and which teachers are refused."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from synthetic import tiny_model, tiny_run, write_shards

from bclip_fast import pretrained
from bclip_fast.data.transform import Preprocess, PreprocessConfig
from bclip_fast.errors import UserError
from bclip_fast.io.runs import read_metrics
from bclip_fast.model.biomedclip import BiomedClip
from bclip_fast.model.tokenizer import Tokenizer
from bclip_fast.train.checkpoint import load_latest
from bclip_fast.train.config import DataConfig
from bclip_fast.train.losses import LossConfig
from bclip_fast.train.teacher import Teacher
from bclip_fast.train.trainer import train


def save_teacher(folder: Path, size: int = 64, mean: float = 0.5, seed: int = 3) -> Path:
    """Write a teacher with images, pixels and a vocabulary other than the student's."""
    torch.manual_seed(seed)
    sizes = tiny_model()
    sizes = dataclasses.replace(sizes, vision=dataclasses.replace(sizes.vision, image_size=size))
    tokenizer = Tokenizer.train(["a square of another vocabulary at the left", "red green"] * 4, 96, 12)
    pixels = PreprocessConfig(size=size, mean=(mean,) * 3, std=(0.25,) * 3)
    pretrained.save(folder, BiomedClip(sizes).eval(), Preprocess(pixels), tokenizer)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher") / "teacher")


def distill(teacher: Path, **options: Any) -> LossConfig:
    return LossConfig(kind="distill", teacher=str(teacher), **options)


def test_each_sample_of_a_step_is_embedded_once(tmp_path, data, teacher, monkeypatch):
    """The replay pass of GradCache reads the images again, but not the teacher."""
    sizes = []
    embed = Teacher.embed

    def count(self: Teacher, images: torch.Tensor, captions: list[str]) -> torch.Tensor:
        sizes.append(len(captions))
        assert all(caption.startswith("a ") for caption in captions) or len(sizes) == 1
        features = embed(self, images, captions)
        assert not features.requires_grad
        return features

    monkeypatch.setattr(Teacher, "embed", count)
    config = tiny_run(tmp_path / "run", data, loss=distill(teacher), micro_batch_size=4, max_steps=3)
    train(config)
    # The first call tries the teacher with one pair.
    assert sizes == [1] + [4] * 12
    for record in read_metrics(tmp_path / "run" / "metrics.jsonl"):
        assert record["loss"] == pytest.approx(record["contrastive_loss"] + record["distill_loss"], rel=1e-6)


def test_teacher_reads_pixels_and_captions_as_its_own_model_does(teacher):
    clip, preprocess, tokenizer = pretrained.load(teacher)
    ours = Teacher("", clip, tokenizer, preprocess.config)
    images = torch.randint(0, 256, (3, 64, 64, 3), dtype=torch.uint8)
    captions = ["a red square", "green at the left", "x"]
    features = ours.embed(images, captions)
    expected = torch.stack([clip.encode_image(images), clip.encode_text(tokenizer(captions))], 1).detach()
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-6)
    assert features.dtype == torch.float32


@pytest.mark.parametrize("size", [32, 64, 100])
def test_other_image_sizes_are_resized_as_pillow_does(teacher, size):
    """Compare the teacher's pixels with those of its preprocessing, up to Pillow's rounding of weights."""
    clip, preprocess, tokenizer = pretrained.load(teacher)
    yy, xx = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    image = torch.stack([yy * 255 // size, xx * 255 // size, (yy + xx) * 127 // size], 2).to(torch.uint8)
    seen = []
    clip.visual.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    Teacher("", clip, tokenizer, preprocess.config).embed(image[None], ["a"])
    expected = preprocess(Image.fromarray(image.numpy()))
    assert float((seen[-1][0] - expected).abs().max()) <= 1.01 / 255 / 0.25


def test_engine_and_checkpoint_have_no_weight_of_the_teacher(tmp_path, data, teacher):
    config = tiny_run(tmp_path / "run", data, loss=distill(teacher), max_steps=2)
    train(config)
    saved = load_latest(tmp_path / "run" / "checkpoints")
    assert set(saved.model) == set(BiomedClip(tiny_model()).state_dict())
    assert saved.rest["teacher"] == Teacher("", *pretrained_parts(teacher)).digest


def pretrained_parts(folder: Path) -> tuple[Any, Any, Any]:
    clip, preprocess, tokenizer = pretrained.load(folder)
    return clip, tokenizer, preprocess.config


def test_resumed_run_equals_uninterrupted_one_and_refuses_another_teacher(tmp_path, data, teacher):
    loss = distill(teacher)
    train(tiny_run(tmp_path / "whole", data, loss=loss))
    stopped = tmp_path / "stopped"

    def stop(record: dict[str, Any]) -> None:
        if record["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit):
        train(tiny_run(stopped, data, loss=loss), on_step=stop)
    other = save_teacher(tmp_path / "other", seed=4)
    before = sorted(path.read_bytes() for path in stopped.rglob("*.json*"))
    with pytest.raises(UserError, match=r"loss.teacher=.*other is another model than the one that taught this run"):
        train(tiny_run(stopped, data, loss=distill(other), resume=True))
    assert sorted(path.read_bytes() for path in stopped.rglob("*.json*")) == before
    train(tiny_run(stopped, data, loss=loss, resume=True))
    losses = [
        [record["distill_loss"] for record in read_metrics(folder / "metrics.jsonl")]
        for folder in (tmp_path / "whole", stopped)
    ]
    assert len(losses[0]) == 6
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "distill"}, "loss.kind=distill needs loss.teacher"),
        ({"teacher": "x"}, "loss.kind=clip takes no loss.teacher=x"),
        ({"kind": "distill", "teacher": "x", "distill_weight": -1.0}, "loss.distill_weight=-1.0"),
        ({"kind": "distill", "teacher": "x", "init_bias": 1.0}, "loss.init_bias=1.0 needs loss.kind=siglip"),
    ],
)
def test_options_of_distillation_are_refused_by_name(options, message):
    with pytest.raises(UserError, match=message):
        LossConfig(**options)


def test_teacher_that_cannot_teach_is_one_line_and_nothing_is_written(tmp_path, data, teacher):
    damaged = save_teacher(tmp_path / "damaged")
    (damaged / "open_clip_model.safetensors").write_bytes(b"no weights")
    endless = save_teacher(tmp_path / "endless", mean=float(3))
    clip, preprocess, tokenizer = pretrained.load(endless)
    for parameter in clip.visual.parameters():
        parameter.data.fill_(float("nan"))
    pretrained.save(endless, clip, preprocess, tokenizer)
    for name, words in (
        (tmp_path / "nothing", "cannot be loaded: .*nothing is not a folder"),
        (damaged, "cannot be loaded: .*open_clip_model.safetensors"),
        (endless, "not finite"),
    ):
        with pytest.raises(UserError, match=f"loss.teacher={name}.*{words}") as caught:
            train(tiny_run(tmp_path / "run", data, loss=distill(name)))
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "run").exists()


def test_known_positives_are_refused(tmp_path, data, teacher):
    with pytest.raises(UserError, match="data.positives=captions cannot be combined with loss.kind=distill"):
        tiny_run(tmp_path, data, data=DataConfig(shards=str(data), positives="captions"), loss=distill(teacher))
