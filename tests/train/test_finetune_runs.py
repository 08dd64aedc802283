"""Runs of fine-tuning: refusals of another base model or data, and the machinery that they share with pretraining."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from finetunes import FAST, settings, write_pairs, write_questions, write_start
from peers import import_torchvision
from ranks import on_ranks
from runs import as_earlier_version, assert_equal_runs, column, records, saved_steps
from synthetic import tiny_run
from towers import SMALL

from bclip_fast.errors import UserError
from bclip_fast.train import checkpoint
from bclip_fast.train.finetune import FinetuneConfig, finetune
from bclip_fast.train.finetune_data import BatchReader, Samples
from bclip_fast.train.loss_spikes import SpikeConfig
from bclip_fast.train.signals import EXIT_STOPPED
from bclip_fast.train.trainer import train

PAIRS: dict[str, Any] = {"task": "", "epochs": 1, "checkpoint_every": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, pairs, questions, a run of two steps on pairs, and another on questions."""
    folder = tmp_path_factory.mktemp("finetune")
    start, pairs, questions = write_start(folder / "start"), write_pairs(folder), write_questions(folder)
    finetune(settings(start, pairs, folder / "pairs", **PAIRS | {"batch_size": 8}))
    finetune(settings(start, questions, folder / "answers", epochs=1, batch_size=8, checkpoint_every=0))
    return folder


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_refused(config: FinetuneConfig, words: str) -> None:
    before = content(Path(config.run))
    with pytest.raises(UserError, match=words) as caught:
        finetune(dataclasses.replace(config, resume=True))
    assert "\n" not in str(caught.value)
    assert content(Path(config.run)) == before


def test_resume_from_another_base_model_names_the_difference(folder: Path, tmp_path: Path) -> None:
    linear = dataclasses.replace(SMALL, text=dataclasses.replace(SMALL.text, projection="linear"))
    models: dict[str, dict[str, Any]] = {
        r"its base model\.config\.text\.projection is mlp, but this run has linear": {"config": linear},
        r"its base model\.weights is": {"seed": 2},
        r"its base model\.tokenizer is": {"texts": ["is it red", "other words here"]},
        r"its base model\.preprocess\.mean is \[0\.\d+.*but this run has \[0\.5": {"mean": (0.5, 0.5, 0.5)},
    }
    for number, (words, different) in enumerate(models.items()):
        model = write_start(tmp_path / str(number), **different)
        changes = PAIRS | {"batch_size": 8, "epochs": 2}
        assert_refused(settings(model, folder / "write_pairs.csv", folder / "pairs", **changes), words)


def test_resume_of_earlier_version_from_another_base_model_is_one_line(folder: Path, tmp_path: Path) -> None:
    run = shutil.copytree(folder / "pairs", tmp_path / "run")
    as_earlier_version(run)
    linear = dataclasses.replace(SMALL, text=dataclasses.replace(SMALL.text, projection="linear"))
    changes: dict[str, Any] = PAIRS | {"batch_size": 8, "epochs": 2}
    data = folder / "write_pairs.csv"
    words = r"its checkpoint is of another model: it has no tensor text\.proj"
    assert_refused(settings(write_start(tmp_path / "linear", linear), data, run, **changes), words)
    finetune(settings(folder / "start", data, run, **changes, resume=True))
    assert column(run, "step") == [1, 2, 3, 4]


def test_resume_with_other_parts_names_the_difference(folder: Path, tmp_path: Path) -> None:
    start, pairs, questions = folder / "start", folder / "write_pairs.csv", folder / "questions.csv"
    other = tmp_path / "other.csv"
    rows = pairs.read_text().replace("p0.jpg", "p1.jpg").replace("path,", "path,").splitlines()
    other.write_text("\n".join([rows[0], *(f"{folder}/{row}" for row in rows[1:])]) + "\n")
    fewer = tmp_path / "fewer.csv"
    rows = [row for row in questions.read_text().splitlines() if "grey" not in row]
    fewer.write_text("\n".join([rows[0], *(f"{folder}/{row}" for row in rows[1:])]) + "\n")
    on_pairs = settings(start, pairs, folder / "pairs", **PAIRS | {"batch_size": 8, "epochs": 2})
    on_questions = settings(start, questions, folder / "answers", batch_size=8)
    replace = dataclasses.replace
    assert_refused(replace(on_pairs, lora_rank=4), "another lora_rank: the checkpoint has lora_rank 0, this run has 4")
    assert_refused(replace(on_pairs, task="vqa", data=str(questions)), "another task: the checkpoint has task empty")
    assert_refused(replace(on_pairs, data=str(other)), "its data is .*, but this run has")
    assert_refused(replace(on_pairs, batch_size=4), "another batch_size")
    assert_refused(replace(on_pairs, optim=replace(FAST, lr=1.0)), r"optim\.lr: 0\.0001 -> 1\.0; restore them, or add")
    assert_refused(replace(on_questions, head_layers=2), "another head_layers")
    assert_refused(replace(on_questions, freeze_towers=True), "freeze_towers: False -> True")
    assert_refused(replace(on_questions, data=str(fewer)), "its (data|texts) is .*, but this run has")


def test_run_of_other_command_is_refused(folder: Path, shards: Path, tmp_path: Path) -> None:
    pretrained = train(tiny_run(tmp_path / "train", shards, max_steps=1))
    words = "is a run of `bclip train`, not of `bclip finetune`"
    assert_refused(settings(folder / "start", folder / "write_pairs.csv", pretrained, **PAIRS), words)
    before = content(folder / "pairs")
    with pytest.raises(UserError, match="is a run of `bclip finetune`, not of `bclip train`"):
        train(tiny_run(folder / "pairs", shards, resume=True))
    assert content(folder / "pairs") == before


def test_allowed_change_is_recorded(folder: Path, tmp_path: Path) -> None:
    run = shutil.copytree(folder / "answers", tmp_path / "run")
    changes = {"batch_size": 8, "epochs": 2, "resume": True, "allow_changes": True, "freeze_towers": True}
    finetune(settings(folder / "start", folder / "questions.csv", run, **changes))
    newest = checkpoint.load_latest(run / "checkpoints")
    assert [change["name"] for change in newest.run["changes"]] == ["epochs", "freeze_towers"]
    assert "freeze_towers = true" in (run / "config.toml").read_text()
    before = checkpoint.load_latest(folder / "answers" / "checkpoints")
    assert torch.equal(newest.model["clip.logit_scale"], before.model["clip.logit_scale"])
    assert newest.step == 2 * before.step


def test_lora_run_resumes_and_refuses_another_rank(folder: Path, tmp_path: Path) -> None:
    import_torchvision()
    pytest.importorskip("peft")
    data, run = folder / "write_pairs.csv", tmp_path / "run"
    changes = PAIRS | {"batch_size": 8, "lora_rank": 2, "epochs": 2, "checkpoint_every": 1}
    whole = finetune(settings(folder / "start", data, tmp_path / "whole", **changes))
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    assert_refused(settings(folder / "start", data, run, **changes | {"lora_rank": 4}), "another lora_rank")
    finetune(settings(folder / "start", data, run, **changes, resume=True))
    assert_equal_runs(run, whole)


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Send this process SIGTERM while it reads the batch after `step`."""
    read = BatchReader.__next__
    calls = iter(range(1, 1000))

    def stopping(self: BatchReader) -> Samples:
        if next(calls) == step + 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return read(self)

    monkeypatch.setattr(BatchReader, "__next__", stopping)


def test_signal_stops_with_checkpoint_and_resumes_exactly(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, data = folder / "start", folder / "write_pairs.csv"
    whole = finetune(settings(start, data, tmp_path / "whole", **PAIRS))
    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        stop_after(patched, 2)
        with pytest.raises(SystemExit) as stopped:
            finetune(settings(start, data, run, **PAIRS))
    assert stopped.value.code == EXIT_STOPPED
    assert saved_steps(run) == [2] and column(run, "step") == [1, 2] and not (run / "model").exists()
    assert [event["event"] for event in records(run, "events.jsonl")] == ["start", "stop", "checkpoint"]
    finetune(settings(start, data, run, **PAIRS, resume=True))
    assert_equal_runs(run, whole)
    assert (run / "model").is_dir()
    keys = {"samples", "tokens_per_second", "step_seconds", "peak_memory_bytes", "bad_samples", "skipped", "loss"}
    assert keys <= records(run)[0].keys()


def test_unreadable_data_stop_after_a_checkpoint(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The third batch can't be read. The two steps before it are saved, and the run continues when it can."""
    start, data, run = folder / "start", folder / "write_pairs.csv", tmp_path / "run"
    whole = finetune(settings(start, data, tmp_path / "whole", **PAIRS))
    real, reads = BatchReader._load_image, iter(range(100))

    def load_image(self: BatchReader, row: int, epoch: int) -> torch.Tensor:
        if next(reads) >= 8:
            raise UserError("the disk is gone")
        return real(self, row, epoch)

    with monkeypatch.context() as patched:
        patched.setattr(BatchReader, "_load_image", load_image)
        with pytest.raises(UserError, match="the disk is gone; step 2 is saved, and --resume continues from there"):
            finetune(settings(start, data, run, **PAIRS, num_workers=1, on_bad_image="stop"))
    assert saved_steps(run) == [2]
    finetune(settings(start, data, run, **PAIRS, num_workers=1, on_bad_image="stop", resume=True))
    assert_equal_runs(run, whole)


def test_checkpoints_are_written_by_default() -> None:
    assert FinetuneConfig(model="m", data="d").checkpoint_every == 500


def test_steps_without_finite_loss_are_skipped_and_limited(folder: Path, tmp_path: Path) -> None:
    start, data, run = folder / "start", folder / "write_pairs.csv", tmp_path / "run"
    optim = dataclasses.replace(FAST, lr=1e30, warmup_steps=0)
    spikes = SpikeConfig(max_skipped=2)
    words = "3 of the last 128 steps were skipped, the last one at step 4: the .* is nan; lower optim.lr"
    with pytest.raises(UserError, match=words):
        finetune(settings(start, data, run, **PAIRS | {"epochs": 2}, optim=optim, spikes=spikes))
    assert column(run, "skipped") == [0, 1, 2, 3]
    assert [event["event"] for event in records(run, "events.jsonl")].count("skip") == 3


def _on_two_ranks(rank: int, folder: str, run: str) -> list[str]:
    """Questions on two ranks. Then rank 1 can't read its images."""
    root, errors = Path(folder), []
    finetune(settings(root / "start", root / "questions.csv", Path(run) / "two", epochs=1))

    def fail(*_: Any) -> None:
        raise UserError("the disk of rank 1 is gone")

    if rank == 1:
        BatchReader._load_image = fail  # type: ignore[assignment, method-assign]
    try:
        finetune(settings(root / "start", root / "write_pairs.csv", Path(run) / "gone", **PAIRS, on_bad_image="stop"))
    except UserError as error:
        errors.append(str(error))
    return errors


def test_two_ranks_share_machinery(folder: Path, tmp_path: Path) -> None:
    errors = on_ranks(2, _on_two_ranks, str(folder), str(tmp_path))
    one = finetune(settings(folder / "start", folder / "questions.csv", tmp_path / "one", epochs=1))
    # Dropout differs between ranks, so the losses only agree in size. Rank 0 logs the loss of all ranks.
    torch.testing.assert_close(column(tmp_path / "two", "loss")[:1], column(one, "loss")[:1], rtol=0.2, atol=0)
    assert errors == [["rank 1: the disk of rank 1 is gone"]] * 2
