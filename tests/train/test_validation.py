"""Validation during training: when it is due, and its metrics."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from runs import records
from synthetic import tiny_model, tiny_run

from bclip_fast.data.sampler import ShardSampler
from bclip_fast.errors import UserError
from bclip_fast.train.config import LogConfig, TrainConfig, ValidationConfig
from bclip_fast.train.trainer import train
from bclip_fast.train.validation import ValidationSchedule


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        (ValidationConfig(every_steps=5), [5, 10, 14]),
        # 96 samples are 6 batches of 16.
        (ValidationConfig(every_epochs=1), [6, 12, 14]),
        (ValidationConfig(every_epochs=2, every_steps=7), [7, 12, 14]),
        (ValidationConfig(), []),
    ],
)
def test_validation_is_due_at_intervals_and_last_step(tmp_path: Path, settings: ValidationConfig, steps: list[int]):
    stream = ShardSampler([50, 46], "", batch_size=16)
    schedule = ValidationSchedule(settings, tmp_path, 14)
    validated = []
    for step in range(1, 15):
        if schedule.is_due(step, stream.locate(step)[0], stream.locate(step - 1)[0]):
            schedule.last_step = step
            validated.append(step)
    assert validated == steps
    assert not schedule.is_due(14, 2, 2)


def test_resumed_finished_run_does_not_validate_again(shards: Path, tmp_path: Path):
    config = tiny_run(tmp_path / "run", shards, max_steps=3, validation=ValidationConfig(every_steps=2))
    run = train(config, validate=lambda *_: {"recall": 0.5})
    train(dataclasses.replace(config, resume=True), validate=lambda *_: {"recall": 0.5})
    lines = [line for line in records(run) if "validation_seconds" in line]
    assert [line["step"] for line in lines] == [2, 3]
    assert lines[0]["validation/recall"] == 0.5


def test_zero_shot_metrics_are_logged_with_retrieval(shards: Path, tmp_path: Path):
    from PIL import Image

    for name, colour in (("red", (220, 30, 30)), ("blue", (30, 30, 220))):
        for split in ("train", "test"):
            folder = tmp_path / "pictures" / split / name
            folder.mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (40, 40 + i), colour).save(folder / f"{i}.png")
    task = tmp_path / "colours.toml"
    task.write_text(
        'title = "Colours"\nprotocol = "zero_shot"\nlabel = "class"\nsplit = "test"\n'
        '[prompts]\nsource = "mine"\ntemplates = ["a {} square"]\n[prompts.classes]\nred = "red"\nblue = "blue"\n'
    )
    settings = ValidationConfig(every_steps=3, zero_shot=(str(task),), zero_shot_data=str(tmp_path / "pictures"))
    run = train(tiny_run(tmp_path / "run", shards, max_steps=3, validation=settings))
    (line,) = [line for line in records(run) if "validation_seconds" in line]
    assert {"validation/image to text R@5", "validation/colours accuracy"} <= set(line)
    assert 0 <= line["validation/colours accuracy"] <= 1
    for changes, words in [
        ({"zero_shot": ("nothing",)}, "unknown task 'nothing'"),
        ({"zero_shot": ("pcam_probe",), "zero_shot_data": str(tmp_path)}, "pcam_probe|camelyonpatch"),
        ({"zero_shot_data": str(tmp_path / "gone")}, "gone"),
    ]:
        config = tiny_run(tmp_path / "bad", shards, validation=dataclasses.replace(settings, **changes))
        with pytest.raises(UserError, match=words):
            train(config)
    assert not (tmp_path / "bad").exists()


def test_invalid_validation_settings_are_errors():
    for changes in ({"every_epochs": -1}, {"zero_shot": ("pcam",)}):
        with pytest.raises(UserError, match="validation"):
            ValidationConfig(**changes)
    assert TrainConfig(model=tiny_model(), preset="").log == LogConfig()
