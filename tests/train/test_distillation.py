"""Training with a teacher: its embeddings, their cache, and refused teachers."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import on_ranks
from synthetic import tiny_model, tiny_run, write_shards

from bclip_fast import pretrained
from bclip_fast.data.texts import CaptionWeights
from bclip_fast.data.transform import Preprocess, PreprocessConfig
from bclip_fast.errors import UserError
from bclip_fast.io.runs import read_metrics
from bclip_fast.model.biomedclip import BiomedClip
from bclip_fast.model.tokenizer import Tokenizer
from bclip_fast.train import teacher_cache
from bclip_fast.train.checkpoint import load_latest
from bclip_fast.train.config import DataConfig
from bclip_fast.train.losses import LossConfig
from bclip_fast.train.teacher import Teacher
from bclip_fast.train.teacher_cache import TeacherCache
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
        ({"teacher_cache": "fp32"}, "loss.teacher_cache=fp32 must be off"),
        ({"kind": "distill", "teacher": "x", "teacher_cache": "fp8"}, "loss.teacher_cache=fp8 must be off"),
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


def test_data_that_a_teacher_cannot_follow_are_refused(tmp_path, data, teacher):
    drawn = DataConfig(shards=str(data), captions=CaptionWeights(mention=1.0))
    with pytest.raises(UserError, match=r"teacher_cache=fp32 keeps one text.*draws caption, mention"):
        tiny_run(tmp_path, data, data=drawn, loss=distill(teacher, teacher_cache="fp32"))
    with pytest.raises(UserError, match="data.positives=captions cannot be combined with loss.kind=distill"):
        tiny_run(tmp_path, data, data=DataConfig(shards=str(data), positives="captions"), loss=distill(teacher))


def cached(rank: int, folder: str) -> list[float]:
    """Train with cached features on several ranks, and return the distillation terms."""
    root = Path(folder)
    teacher_cache.BLOCK = 20
    loss = distill(root / "teacher", teacher_cache="fp32")
    terms: list[float] = []
    train(
        tiny_run(root / "ranks", root / "shards", loss=loss, max_steps=2, data=centred(root / "shards")),
        on_step=lambda record: terms.append(record["distill_loss"]),
    )
    return terms


def centred(shards: Path) -> DataConfig:
    return DataConfig(shards=str(shards), shuffle_block=32, augment=False)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(teacher_cache, "BLOCK", 20)


def test_cached_features_are_those_of_each_step(tmp_path, data, monkeypatch, small_blocks):
    """The images have the teacher's size, so that both see the same centre crop. 96 samples have five blocks."""
    teacher = save_teacher(tmp_path / "teacher", size=32)
    terms = {}
    for mode in ("off", "fp32", "fp16"):
        run = tmp_path / mode
        config = tiny_run(run, data, loss=distill(teacher, teacher_cache=mode), micro_batch_size=8, data=centred(data))
        train(config)
        terms[mode] = [record["distill_loss"] for record in read_metrics(run / "metrics.jsonl")]
    assert terms["fp32"] == pytest.approx(terms["off"], rel=1e-6)
    assert terms["fp16"] == pytest.approx(terms["off"], rel=1e-3)
    assert terms["fp16"] != terms["fp32"]
    files = sorted((tmp_path / "fp32" / "teacher").rglob("*.npy"))
    assert [path.stem for path in files] == [f"{start:010d}" for start in range(0, 96, 20)]
    # A resumed run finds them, and computes only a block that was lost.
    embedded = []
    embed = Teacher.embed
    monkeypatch.setattr(Teacher, "embed", lambda self, *pair: (embedded.append(len(pair[1])), embed(self, *pair))[1])
    files[1].unlink()
    loss = distill(teacher, teacher_cache="fp32")
    train(
        tiny_run(tmp_path / "fp32", data, loss=loss, micro_batch_size=8, data=centred(data), max_steps=8, resume=True)
    )
    assert embedded == [1, 20]


def test_ranks_share_the_work_and_stopped_run_keeps_blocks(tmp_path, data, monkeypatch, small_blocks):
    teacher = save_teacher(tmp_path / "teacher", size=32)
    (tmp_path / "shards").symlink_to(data)
    loss = distill(teacher, teacher_cache="fp32")
    config = tiny_run(tmp_path / "one", data, loss=loss, max_steps=2, data=centred(data))
    embed = Teacher.embed

    def stop(self: Teacher, images: torch.Tensor, captions: list[str]) -> torch.Tensor:
        if len(captions) > 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return embed(self, images, captions)

    monkeypatch.setattr(Teacher, "embed", stop)
    with pytest.raises(SystemExit) as stopped:
        train(config)
    assert stopped.value.code == 75
    assert len(list((tmp_path / "one").rglob("*.npy"))) == 1
    monkeypatch.setattr(Teacher, "embed", embed)
    train(dataclasses.replace(config, resume=True))
    one = [record["distill_loss"] for record in read_metrics(tmp_path / "one" / "metrics.jsonl")]
    two = on_ranks(2, cached, str(tmp_path))
    assert two[0] == pytest.approx(one, rel=1e-6)
    files = [
        {path.name: path.read_bytes() for path in (tmp_path / name / "teacher").rglob("*.npy")}
        for name in ("one", "ranks")
    ]
    assert files[0].keys() == files[1].keys()
    for name in files[0]:
        ours, theirs = (np.frombuffer(each[name][128:], np.float32) for each in files)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


def test_sample_that_the_teacher_could_not_read_is_replaced(tmp_path, data):
    """A damaged block of a cache stands for an image that only the centre crop finds damaged."""
    teacher = save_teacher(tmp_path / "teacher", size=32)
    run = tmp_path / "run"
    loss = distill(teacher, teacher_cache="fp32")
    train(tiny_run(run, data, loss=loss, max_steps=1, data=centred(data)))
    (file,) = run.rglob("*.npy")
    features = np.load(file)
    features[40:44] = np.nan
    np.save(file, features)
    train(tiny_run(run, data, loss=loss, max_steps=6, data=centred(data), resume=True))
    bad = [json.loads(line) for line in (run / "bad_samples.jsonl").read_text().splitlines()]
    assert {record["index"] for record in bad} == {40, 41, 42, 43}
    assert all("the teacher could not decode it" in record["reason"] for record in bad)
    assert all(np.isfinite(record["loss"]) for record in read_metrics(run / "metrics.jsonl"))
    file.write_bytes(file.read_bytes()[:-4])
    embedded = TeacherCache(run, "another teacher", 96, 24, "fp32")
    assert embedded.folder != file.parent
    assert embedded.missing() == [0]
