"""The metrics of a run: lines, timing of a step, the terminal, wandb, events."""

from __future__ import annotations

import dataclasses
import logging
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import records
from synthetic import tiny_run

from bclip_fast.errors import UserError
from bclip_fast.model import flops
from bclip_fast.train import progress, trainer
from bclip_fast.train.config import LogConfig
from bclip_fast.train.step_timer import StepTimer
from bclip_fast.train.trainer import train

PARTS = ("data_wait", "forward", "loss", "backward", "optimizer")


def test_parts_of_step_add_up(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The times of the parts add up to the step's. Tokens and MFU follow from the lengths of the captions."""
    monkeypatch.setattr(trainer, "device_peak", lambda device, precision: 1e12)
    # Use this thread's CPU time, which other processes do not affect.
    monkeypatch.setattr(time, "perf_counter", time.thread_time)
    lengths: list[list[int]] = []
    take = trainer._Run._next_batch

    def noted(self: Any) -> Any:
        batch = take(self)
        lengths.append(batch.lengths)
        return batch

    monkeypatch.setattr(trainer._Run, "_next_batch", noted)
    config = tiny_run(tmp_path / "run", shards, max_steps=3, micro_batch_size=8)
    run = train(config)
    for line, lengths_of_step in zip(
        records(run), [a + b for a, b in zip(lengths[::2], lengths[1::2], strict=True)], strict=True
    ):
        parts = [line[f"{part}_seconds"] for part in PARTS]
        assert all(part >= 0 for part in parts)
        assert line["forward_seconds"] > 0
        assert line["backward_seconds"] > 0
        assert 0.7 * line["step_seconds"] < sum(parts) <= line["step_seconds"]
        assert line["tokens_per_second"] * line["step_seconds"] == pytest.approx(sum(lengths_of_step))
        assert line["samples_per_second"] * line["step_seconds"] == pytest.approx(16)
        assert line["mfu"] * line["step_seconds"] * 1e12 == pytest.approx(
            flops.step_flops(config.model, lengths_of_step)
        )


def test_step_timer_on_gpu_keeps_the_events_of_each_step(monkeypatch: pytest.MonkeyPatch):
    now = iter(range(0, 100_000, 500))

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.time = next(now)

        def elapsed_time(self, end: Event) -> float:
            return float(end.time - self.time)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    timer = StepTimer(torch.device("cuda"))
    finished = []
    for parts in (["forward", "backward"], ["forward", "", "forward", "backward"], []):
        timer.start()
        for part in parts:
            timer.lap(part) if part else timer.skip()
        finished.append(timer.finish())
    assert [seconds() for seconds in finished] == [
        {"forward_seconds": 0.5, "backward_seconds": 0.5},
        {"forward_seconds": 1.0, "backward_seconds": 0.5},
        {},
    ]


RECORD = {
    "step": 3, "samples": 48, "loss": 1.25, "logit_scale": 14.3, "grad_norm": 0.5, "samples_per_second": 1234.4,
    "tokens_per_second": 98765.4, "step_seconds": 2.0, "data_wait_seconds": 0.1,
}  # fmt: skip


def test_progress_without_terminal_logs_every_15_seconds(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    words = "loss 1.2500  scale 14.3  gradient 0.5  1,234 samples/s  98,765 tokens/s  MFU 42%  waited 5%"
    assert progress.describe(RECORD | {"mfu": 0.42}) == words
    assert "MFU" not in progress.describe(RECORD)
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    bar = progress.Progress(10, 32, 160)
    with caplog.at_level(logging.INFO, "bclip_fast"):
        for step in range(3, 11):
            now[0] += 10
            bar.update(RECORD | {"step": step, "samples": 16 * step})
    bar.close()
    messages = [record.getMessage() for record in caplog.records]
    # A line follows every 15 s and at the end. A step takes 10 s here.
    assert [text.split("  ")[0] for text in messages] == [f"step {step} of 10" for step in (3, 5, 7, 9, 10)]
    assert messages[0].endswith("0:01:10 left")
    assert messages[-1].endswith("0:00:00 left")


def test_progress_on_terminal_draws_bar(monkeypatch: pytest.MonkeyPatch):
    import io

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "xterm")
    bar = progress.Progress(10, 0, 160)
    bar.update(RECORD)
    bar.close()
    assert "3/10" in screen.getvalue()
    assert "98,765 tokens/s" in screen.getvalue()


class FakeWandb(types.ModuleType):
    """Records the logged values by run id."""

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


def test_wandb_gets_same_metrics_and_continues_after_resume(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = tiny_run(tmp_path / "run", shards, max_steps=3, log=LogConfig(wandb=True, wandb_project="mine"))
    run = train(config)
    train(dataclasses.replace(config, max_steps=5, resume=True))
    assert list(fake.runs) == ["run0"]
    assert fake.finished == 2
    assert fake.runs["run0"] == records(run)
    assert [options["id"] for options in fake.inits] == [None, "run0"]
    assert fake.inits[0]["project"] == "mine"
    assert fake.inits[0]["config"]["batch_size"] == 16


def test_missing_wandb_is_an_error(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"log\.wandb=true: .*pip install wandb"):
        train(tiny_run(tmp_path / "run", shards, log=LogConfig(wandb=True)))


def test_events_record_starts_and_checkpoints(shards: Path, tmp_path: Path):
    config = tiny_run(tmp_path / "run", shards, max_steps=4)
    run = train(config)
    train(dataclasses.replace(config, max_steps=6, resume=True))
    events = [(line["step"], line["event"]) for line in records(run, "events.jsonl")]
    assert events == [(0, "start"), (3, "checkpoint"), (4, "checkpoint"), (4, "resume"), (6, "checkpoint")]
    assert records(run, "events.jsonl")[0]["ranks"] == 1
