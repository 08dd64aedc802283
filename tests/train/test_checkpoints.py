"""Checkpoints: full disks, writing in the background, and the ones to keep."""

from __future__ import annotations

import dataclasses
import resource
import threading
from pathlib import Path
from typing import Any

import pytest
from runs import assert_equal_runs, column, saved_steps
from synthetic import tiny_run

from bclip_fast.errors import UserError
from bclip_fast.train import checkpoint
from bclip_fast.train.config import CheckpointConfig, ValidationConfig
from bclip_fast.train.trainer import train


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # from TensorBoard's thread
def test_run_survives_full_disk(shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Files are limited to 1 kB from step 3 to step 5. So the checkpoint of step 4 fails, and lines wait in memory."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def on_step(record: dict[str, Any]) -> None:
        limit = 1000 if record["step"] in (3, 4) else soft
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        if record["step"] == 5:
            kept.extend(saved_steps(tmp_path / "run"))

    kept: list[int] = []
    config = tiny_run(tmp_path / "run", shards, checkpoint=CheckpointConfig(every_steps=2, background=False))
    try:
        train(config, on_step=on_step)
        assert kept == [2]
        assert saved_steps(tmp_path / "run") == [2, 6]
        assert column(tmp_path / "run", "step") == [1, 2, 3, 4, 5, 6]
        assert caplog.text.count("metrics.jsonl cannot be written") == 1
        assert "step-00000004 cannot be written: " in caplog.text
        assert "File too large" in caplog.text
        assert "training goes on" in caplog.text
        # A failure of the last checkpoint is an error.
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        longer = dataclasses.replace(config, max_steps=8, resume=True)
        with pytest.raises(UserError, match=r"step-00000008 cannot be written: .*older checkpoints are untouched"):
            train(longer, on_step=lambda _: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "step-00000002", "step-00000006",
    ]  # fmt: skip
    assert all(
        checkpoint.verify(path) is None for path in checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")
    )
    train(longer)
    assert len(column(tmp_path / "run", "loss")) == 8


def test_background_checkpoints_do_not_block_steps(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """On a slow disk, the next step does not wait for a checkpoint. The next checkpoint and the end of the run do."""
    events: list[str] = []
    real = checkpoint.save
    last_step_is_done = threading.Event()

    def slow(folder: Path, saved: checkpoint.Checkpoint, **options: Any) -> Path:
        assert last_step_is_done.wait(120), "training waits for the checkpoint of step 2"
        path = real(folder, saved, **options)
        events.append(f"saved {saved.step}")
        return path

    monkeypatch.setattr(checkpoint, "save", slow)
    orders = {}

    def on_step(record: dict[str, Any]) -> None:
        events.append(f"step {record['step']}")
        if record["step"] == 4:
            last_step_is_done.set()

    # In the second run the steps wait for the disk, so the disk must be fast: the event stays set.
    for background in (True, False):
        events.clear()
        settings = CheckpointConfig(every_steps=2, keep=0, background=background)
        run = tmp_path / str(background)
        train(tiny_run(run, shards, checkpoint=settings, max_steps=4), on_step=on_step)
        orders[background] = list(events)
    assert orders[False] == ["step 1", "step 2", "saved 2", "step 3", "step 4", "saved 4"]
    assert orders[True] == ["step 1", "step 2", "step 3", "step 4", "saved 2", "saved 4"]
    assert_equal_runs(tmp_path / "True", tmp_path / "False")


def test_writer_error_other_than_full_disk_ends_run(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(checkpoint, "save", broken)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        train(tiny_run(tmp_path / "run", shards))


def test_old_checkpoints_are_removed_except_best_and_interval(shards: Path, tmp_path: Path):
    figures = iter([0.1, 0.5, 0.3, 0.2])

    def validate(*_: Any) -> dict[str, float]:
        return {"R@1": next(figures)}

    settings = CheckpointConfig(every_steps=2, keep=1, keep_every_steps=4, best="R@1")
    config = tiny_run(
        tmp_path / "run", shards, max_steps=12, checkpoint=settings, validation=ValidationConfig(every_steps=3)
    )
    run = train(config, validate=validate)
    # Step 3 was the best before step 6. Steps 4, 8 and 12 are never removed.
    assert saved_steps(run) == [4, 6, 8, 12]
    assert checkpoint.load_latest(run / "checkpoints").rest["best"] == {"step": 6, "figure": "R@1", "value": 0.5}
    lowest = dataclasses.replace(settings, best="-R@1", keep_every_steps=0)
    figures = iter([0.1, 0.5, 0.3, 0.05])
    assert saved_steps(
        train(dataclasses.replace(config, run=str(tmp_path / "low"), checkpoint=lowest), validate=validate)
    ) == [12]
    figures = iter([0.1])
    wrong = dataclasses.replace(config, run=str(tmp_path / "w"), checkpoint=CheckpointConfig(best="R@2"))
    with pytest.raises(UserError, match=r"checkpoint\.best=R@2 is not a validation metric; did you mean R@1"):
        train(wrong, validate=validate)
