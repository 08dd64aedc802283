"""What one sees of a run: its lines, the live line, wandb, validation when it is due, events."""

from __future__ import annotations

import dataclasses
import logging
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic import tiny_model, tiny_run, write_shards

from bclip_fast.data.stream import SampleStream
from bclip_fast.errors import UserError
from bclip_fast.eval.report import read_metrics
from bclip_fast.train import flops, metrics, trainer
from bclip_fast.train.clock import StepClock
from bclip_fast.train.config import LogConfig, TrainConfig, ValidationConfig
from bclip_fast.train.trainer import train
from bclip_fast.train.validation import Validation

PARTS = ("data_wait", "forward", "loss", "backward", "optimizer")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data") / "shards")


def lines(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return read_metrics(run / name)


def test_a_line_splits_its_step(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The parts add up to the step, and tokens and MFU follow from what was in the batch."""
    monkeypatch.setattr(flops, "device_peak", lambda device, precision: 1e12)
    lengths: list[list[int]] = []
    forward = trainer._Run._forward
    monkeypatch.setattr(
        trainer._Run, "_forward", lambda self, batch: lengths.append(batch.lengths) or forward(self, batch)
    )
    config = tiny_run(tmp_path / "run", shards, max_steps=3)
    run = train(config)
    for line, own in zip(lines(run), lengths, strict=True):
        parts = [line[f"{part}_seconds"] for part in PARTS]
        assert all(part >= 0 for part in parts) and line["forward_seconds"] > 0 and line["backward_seconds"] > 0
        assert 0.7 * line["step_seconds"] < sum(parts) <= line["step_seconds"]
        assert line["tokens_per_second"] * line["step_seconds"] == pytest.approx(sum(own))
        assert line["samples_per_second"] * line["step_seconds"] == pytest.approx(16)
        assert line["mfu"] * line["step_seconds"] * 1e12 == pytest.approx(flops.step_flops(config.model, own))


def test_on_a_gpu_a_line_has_the_split_of_the_step_before(monkeypatch: pytest.MonkeyPatch):
    now = iter(range(0, 100_000, 500))

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.time = next(now)

        def elapsed_time(self, end: Event) -> float:
            return float(end.time - self.time)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = StepClock(torch.device("cuda"))
    found = []
    for parts in (["forward", "backward"], ["forward", "backward", "forward"], []):
        clock.start()
        for part in parts:
            clock.mark(part)
        found.append(clock.seconds())
    assert found == [
        {},
        {"forward_seconds": 0.5, "backward_seconds": 0.5},
        {"forward_seconds": 1.0, "backward_seconds": 0.5},
    ]


RECORD = {
    "step": 3, "loss": 1.25, "logit_scale": 14.3, "grad_norm": 0.5, "samples_per_second": 1234.4,
    "tokens_per_second": 98765.4, "step_seconds": 2.0, "data_wait_seconds": 0.1,
}  # fmt: skip


def test_the_live_line(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch):
    words = "loss 1.2500  scale 14.3  gradient 0.5  1,234 samples/s  98,765 tokens/s  MFU 42%  waited 5%"
    assert metrics.describe(RECORD | {"mfu": 0.42}) == words
    assert "MFU" not in metrics.describe(RECORD)
    now = [100.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    progress = metrics.Progress(2, 10)
    with caplog.at_level(logging.INFO, "bclip_fast"):
        for step in range(3, 11):
            now[0] += 10
            progress.update(RECORD | {"step": step})
    progress.close()
    said = [record.getMessage() for record in caplog.records]
    # Every 15 s and at the end; a step takes 10 s here.
    assert [text.split("  ")[0] for text in said] == [f"step {step} of 10" for step in (3, 5, 7, 9, 10)]
    assert said[0].endswith("0:01:10 left") and said[-1].endswith("0:00:00 left")


def test_the_bar_of_a_terminal(monkeypatch: pytest.MonkeyPatch):
    import io

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "xterm")
    progress = metrics.Progress(0, 10)
    progress.update(RECORD)
    progress.close()
    assert "3/10" in screen.getvalue() and "98,765 tokens/s" in screen.getvalue()


class FakeWandb(types.ModuleType):
    """Keeps what it is told, by run id."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.runs: dict[str, list[dict[str, Any]]] = {}
        self.inits: list[dict[str, Any]] = []
        self.finished = 0

    def init(self, **options: Any) -> Any:
        self.inits.append(options)
        name = options["id"] or f"run{len(self.runs)}"
        rows = self.runs.setdefault(name, [])
        return types.SimpleNamespace(
            id=name, log=lambda values, step: rows.append({"step": step, **values}), finish=self._finish
        )

    def _finish(self) -> None:
        self.finished += 1


def test_wandb_gets_the_same_and_goes_on_after_a_resume(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = tiny_run(tmp_path / "run", shards, max_steps=3, log=LogConfig(wandb=True, wandb_project="mine"))
    run = train(config)
    train(dataclasses.replace(config, max_steps=5, resume=True))
    assert list(fake.runs) == ["run0"] and fake.finished == 2
    assert fake.runs["run0"] == lines(run)
    assert [options["id"] for options in fake.inits] == [None, "run0"]
    assert fake.inits[0]["project"] == "mine" and fake.inits[0]["config"]["batch_size"] == 16


def test_wandb_that_is_not_there(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"log\.wandb: .*pip install wandb"):
        train(tiny_run(tmp_path / "run", shards, log=LogConfig(wandb=True)))


@pytest.mark.parametrize(
    "settings, steps",
    [
        (ValidationConfig(every_steps=5), [5, 10, 14]),
        # 96 samples are 6 batches of 16.
        (ValidationConfig(every_epochs=1), [6, 12, 14]),
        (ValidationConfig(every_epochs=2, every_steps=7), [7, 12, 14]),
        (ValidationConfig(), []),
    ],
)
def test_when_validation_is_due(tmp_path: Path, settings: ValidationConfig, steps: list[int]):
    stream = SampleStream([50, 46], "", batch_size=16)
    validation = Validation(settings, tmp_path, 14)
    found = []
    for step in range(1, 15):
        if validation.is_due(step, stream.epoch(step), stream.epoch(step - 1)):
            validation.last_step = step
            found.append(step)
    assert found == steps
    assert not validation.is_due(14, 2, 2)


def test_a_finished_run_has_nothing_left_to_validate(shards: Path, tmp_path: Path):
    config = tiny_run(tmp_path / "run", shards, max_steps=3, validation=ValidationConfig(every_steps=2))
    run = train(config, validate=lambda *_: {"recall": 0.5})
    train(dataclasses.replace(config, resume=True), validate=lambda *_: {"recall": 0.5})
    found = [line for line in lines(run) if "validation_seconds" in line]
    assert [line["step"] for line in found] == [2, 3] and found[0]["validation/recall"] == 0.5


def test_zero_shot_stands_beside_retrieval(shards: Path, tmp_path: Path):
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
    (line,) = [line for line in lines(run) if "validation_seconds" in line]
    assert {"validation/image to text R@5", "validation/colours accuracy"} <= set(line)
    assert 0 <= line["validation/colours accuracy"] <= 1
    for changes, words in [
        ({"zero_shot": ("nothing",)}, "unknown task 'nothing'"),
        ({"zero_shot": ("pcam_probe",), "zero_shot_data": str(tmp_path)}, "pcam_probe|camelyonpatch"),
        ({"zero_shot_data": str(tmp_path / "gone")}, "gone"),
    ]:
        with pytest.raises(UserError, match=words):
            config = tiny_run(tmp_path / "bad", shards, validation=dataclasses.replace(settings, **changes))
            train(config)
    assert not (tmp_path / "bad").exists()


def test_events_tell_of_starts_and_checkpoints(shards: Path, tmp_path: Path):
    config = tiny_run(tmp_path / "run", shards, max_steps=4)
    run = train(config)
    train(dataclasses.replace(config, max_steps=6, resume=True))
    found = [(line["step"], line["event"]) for line in lines(run, "events.jsonl")]
    assert found == [(0, "start"), (3, "checkpoint"), (4, "checkpoint"), (4, "resume"), (6, "checkpoint")]
    assert lines(run, "events.jsonl")[0]["ranks"] == 1


def test_settings_that_make_no_sense():
    for changes in ({"every_epochs": -1}, {"zero_shot": ("pcam",)}):
        with pytest.raises(UserError, match="validation"):
            ValidationConfig(**changes)
    assert TrainConfig(model=tiny_model(), preset="").log == LogConfig()
