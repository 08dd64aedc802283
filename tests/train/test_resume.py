"""Resumed and refused runs: settings that may change, records of changes, and files that a refusal leaves alone."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from ranks import on_ranks
from runs import as_earlier_version, column, records, saved_steps, stopped_after
from synthetic import tiny_model, tiny_run

from bclip_fast import config as config_files
from bclip_fast.cli import main
from bclip_fast.errors import UserError
from bclip_fast.train import checkpoint, report, resume_rules, run_folder
from bclip_fast.train.config import CheckpointConfig, DataConfig, TrainConfig, ValidationConfig
from bclip_fast.train.engine import EngineConfig
from bclip_fast.train.finetune import FinetuneConfig
from bclip_fast.train.loss_spikes import SpikeConfig
from bclip_fast.train.replay import Dump, read_dump, write_dump
from bclip_fast.train.resume_rules import RULES, Rule
from bclip_fast.train.schedule import OptimConfig
from bclip_fast.train.trainer import train

OPTIM = OptimConfig(lr=5e-4, warmup_steps=2, grad_clip_norm=2.0)


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def refused(folder: Path, words: str) -> Iterator[None]:
    """Expect a UserError of one line, and no change of any file in the folder."""
    before = content(folder)
    with pytest.raises(UserError, match=words) as caught:
        yield
    assert "\n" not in str(caught.value)
    assert content(folder) == before


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps with an EMA, and with a checkpoint after each step."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    settings = {"max_steps": 2, "ema_decay": 0.5, "checkpoint": CheckpointConfig(every_steps=1, keep=0)}
    return train(tiny_run(folder, shards, **settings))


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(run, tmp_path / "run")


def again(run: Path, shards: Path, **changes: Any) -> TrainConfig:
    settings = {"max_steps": 3, "ema_decay": 0.5, "resume": True, "checkpoint": CheckpointConfig(every_steps=0, keep=0)}
    return tiny_run(run, shards, **(settings | changes))


def leaves(cls: Any, prefix: str = "") -> Iterator[str]:
    """The dotted names of all fields of a configuration."""
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from leaves(hints[field.name], f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}"


@pytest.mark.parametrize(("command", "cls"), [("train", TrainConfig), ("finetune", FinetuneConfig)])
def test_every_field_has_one_resume_rule(command: str, cls: type) -> None:
    names = list(leaves(cls))
    assert all(isinstance(resume_rules.rule_of(command, name), Rule) for name in names)
    # A section has one rule only where a new field can't need another. Elsewhere a new field needs its own.
    sections = set(RULES[command]) - set(names)
    assert sections == (
        {"model", "init", "data.captions", "data.read", "log", "cluster"} if command == "train" else set()
    )
    with pytest.raises(KeyError, match=r"optim\.new has no rule"):
        resume_rules.rule_of(command, "optim.new")


CHANGES: dict[str, dict[str, Any]] = {
    "optim.lr: 0.0005 -> 0.001": {"optim": dataclasses.replace(OPTIM, lr=1e-3)},
    "engine.precision: fp32 -> bf16": {"engine": EngineConfig(name="ddp", precision="bf16")},
    "lock_image: False -> True": {"lock_image": True},
    "lock_text: False -> True": {"lock_text": True},
    "ema_decay: 0.5 -> 0.9": {"ema_decay": 0.9},
    "micro_batch_size: 0 -> 8": {"micro_batch_size": 8},
    "spikes.loss: 16.0 -> 8.0": {"spikes": SpikeConfig(loss=8.0)},
    "data.augment: True -> False": {"data.augment": False},
}


def test_change_of_arithmetic_needs_permission(run: Path, shards: Path) -> None:
    for text, changes in CHANGES.items():
        if "data.augment" in changes:
            changes = {"data": DataConfig(shards=str(shards), shuffle_block=32, augment=False)}
        with refused(run, rf"change its arithmetic: {text}; restore them, or add --allow_changes"):
            train(again(run, shards, **changes))


def test_allowed_changes_take_effect_and_are_recorded(copy: Path, shards: Path, tmp_path: Path, caplog: Any) -> None:
    optim = dataclasses.replace(OPTIM, lr=1e-3)
    with caplog.at_level(logging.WARNING):
        train(again(copy, shards, optim=optim, lock_image=True, allow_changes=True))
    names = ["max_steps: 2 -> 3", "lock_image: False -> True", "optim.lr: 0.0005 -> 0.001"]
    assert [record.message for record in caplog.records if "with other" in record.message] == [
        f"resuming {copy} with other {name}" for name in names
    ]
    assert column(copy, "lr")[1:] == [5e-4, 1e-3 * column(copy, "lr")[2] / 1e-3]
    assert column(copy, "lr")[2] > 5e-4 / 2
    newest = checkpoint.load_latest(copy / "checkpoints")
    assert newest.run["changes"][2] == {"step": 2, "name": "optim.lr", "recorded": 5e-4, "asked": 1e-3}
    assert newest.run["config"]["optim.lr"] == 1e-3
    written = config_files.from_toml(TrainConfig, copy / "config.toml")
    assert (written.optim.lr, written.lock_image, written.allow_changes) == (1e-3, True, False)
    assert [event.get("changes") for event in records(copy, "events.jsonl") if event["event"] == "resume"] == [names]
    page = tmp_path / "report.html"
    report.run(report.TrainReportConfig(runs=(str(copy),), out=str(page)))
    assert "optim.lr: 0.0005 -&gt; 0.001" in page.read_text()
    # The permission holds for one resume. The next one is compared with the new settings, and keeps the history.
    with refused(copy, r"lock_image: True -> False, optim\.lr: 0\.001 -> 0\.0005"):
        train(again(copy, shards, max_steps=4))
    train(again(copy, shards, max_steps=4, optim=optim, lock_image=True))
    assert [change["step"] for change in checkpoint.load_latest(copy / "checkpoints").run["changes"]] == [2, 2, 2, 3]


def test_free_changes_are_not_listed(copy: Path, shards: Path, caplog: Any) -> None:
    free = {
        "data": DataConfig(shards=str(shards), shuffle_block=32, num_threads=1, prefetch_batches=1),
        "validation": ValidationConfig(every_steps=5),
        "timeout_s": 9.0,
        "max_steps": 2,
    }
    with caplog.at_level(logging.WARNING):
        train(again(copy, shards, **free))
    assert not caplog.records


def test_checkpoint_and_not_edited_config_decides(copy: Path, shards: Path) -> None:
    path = copy / "config.toml"
    path.write_text(path.read_text().replace("lr = 0.0005", "lr = 0.01"))
    with refused(copy, r"optim\.lr: 0\.0005 -> 0\.01"):
        train(again(copy, shards, optim=dataclasses.replace(OPTIM, lr=0.01)))


def test_other_libraries_are_listed(copy: Path, shards: Path, caplog: Any, monkeypatch: Any) -> None:
    now = run_folder.environment()
    monkeypatch.setattr(run_folder, "environment", lambda: now | {"torch": "9.9", "ranks": "1"})
    with caplog.at_level(logging.WARNING):
        train(again(copy, shards))
    assert f"other torch: {now['torch']} -> 9.9" in caplog.text and "other ranks" not in caplog.text
    [*_, resumed] = [event for event in records(copy, "events.jsonl") if event["event"] == "resume"]
    assert resumed["changes"] == ["max_steps: 2 -> 3", f"torch: {now['torch']} -> 9.9"]


def test_checkpoint_of_earlier_version_is_compared_with_config(copy: Path, shards: Path) -> None:
    as_earlier_version(copy)
    with refused(copy, r"optim\.lr: 0\.0005 -> 0\.001; restore"):
        train(again(copy, shards, optim=dataclasses.replace(OPTIM, lr=1e-3)))
    train(again(copy, shards))
    assert column(copy, "step") == [1, 2, 3]


def foreign_file(run: Path) -> None:
    (run / "notes.txt").write_text("mine")


def foreign_config(run: Path) -> None:
    (run / "config.toml").write_text("[tool]\nname = 1\n")


def trained_model(run: Path) -> None:
    (run / "model").mkdir()
    (run / "model" / "open_clip_config.json").write_text("{}")


@pytest.mark.parametrize(
    ("fill", "resume", "words"),
    [
        (
            foreign_file,
            False,
            r"is not an empty folder: it holds notes\.txt; choose another run folder",
        ),
        (trained_model, False, r"is not an empty folder: it holds model"),
        (trained_model, True, r"holds a trained model/ but no checkpoint"),
        (foreign_config, True, r"holds a config\.toml that is not of a run of `bclip train`"),
    ],
)
def test_run_in_used_folder_is_refused(
    shards: Path, tmp_path: Path, fill: Callable[[Path], None], resume: bool, words: str
) -> None:
    (tmp_path / "run").mkdir()
    fill(tmp_path / "run")
    with refused(tmp_path / "run", words):
        train(tiny_run(tmp_path / "run", shards, resume=resume))


def test_run_in_place_of_file_is_refused(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with refused(tmp_path, "is a file"):
        train(tiny_run(tmp_path / "run", shards))


@pytest.mark.parametrize("resume", [False, True])
def test_failed_begin_leaves_records_as_they_were(copy: Path, shards: Path, tmp_path: Path, resume: bool) -> None:
    """The disk is full when the run begins to write."""
    path = copy if resume else tmp_path / "new"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with refused(tmp_path, "cannot be written: .*File too large"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
            train(again(path, shards, lock_text=True, allow_changes=True))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("damage", ["missing", "truncated"])
@pytest.mark.parametrize(
    "name", ["ema.safetensors", "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]
)
def test_checkpoint_with_damaged_file_is_skipped_by_name(copy: Path, caplog: Any, name: str, damage: str) -> None:
    file = copy / "checkpoints" / "step-00000002" / name
    if damage == "missing":
        file.unlink()
    else:
        os.truncate(file, file.stat().st_size // 2)
    with caplog.at_level(logging.WARNING):
        assert checkpoint.load_latest(copy / "checkpoints").step == 1
    assert len(caplog.records) == 1 and f"step-00000002 is not used: {name}" in caplog.text


def test_checkpoint_without_its_average_is_refused(copy: Path, shards: Path) -> None:
    """Neither the manifest nor the list of files may lose the EMA."""
    folder = copy / "checkpoints" / "step-00000002"
    (folder / "ema.safetensors").unlink()
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["ema.safetensors"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert checkpoint.verify(folder) == "ema.safetensors is not in the manifest"
    state = json.loads((folder / "state.json").read_text())
    state["files"].remove("ema.safetensors")
    (folder / "state.json").write_text(json.dumps(state))
    manifest["state.json"] = checkpoint._describe(folder / "state.json")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with refused(copy, r"step 2 has no ema\.safetensors, but the run keeps an EMA"):
        train(again(copy, shards))


def _refused_on_ranks(rank: int, shards: str, folder: str) -> list[str]:
    """Rank 1 has another learning rate, and then a dataset that can't be read."""
    errors = []
    run = Path(folder) / "run"
    for changes in ({"optim": dataclasses.replace(OPTIM, lr=1e-3)}, {"data": DataConfig("gone", shuffle_block=32)}):
        try:
            train(tiny_run(run, Path(shards), **(changes if rank == 1 else {})))
        except UserError as error:
            errors.append(str(error))
        if not errors[-1].startswith("rank 1 was started"):
            break
    return [*errors, str(sorted(Path(folder).iterdir()))]


def test_refusal_of_one_rank_leaves_no_file(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    first, second = on_ranks(2, _refused_on_ranks, str(shards), str(tmp_path / "shared"))
    words = "rank 1 was started with optim.lr=0.001, but rank 0 with optim.lr=0.0005; start all ranks with the same"
    assert first[0].startswith(words) and second[0].startswith(words)
    assert "no such folder" in second[1]
    assert first[-1] == second[-1] == "[]"


def test_replay_of_run_folder_names_the_dump(run: Path, tmp_path: Path, caplog: Any, capsys: Any) -> None:
    """The folder is checked before its backends are compared."""
    assert main(["train", "replay", str(tmp_path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "is not a complete step dump" in lines[0]
    (tmp_path / "dumps" / "step-00000003").mkdir(parents=True)
    assert main(["train", "replay", str(tmp_path)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert f"is a run folder, not a step dump; pass {tmp_path / 'dumps' / 'step-00000003'}" in line


def test_dump_keeps_changes_of_its_run(shards: Path, tmp_path: Path) -> None:
    changes = [{"step": 2, "name": "optim.lr", "recorded": 5e-4, "asked": 1e-3}]
    dump = Dump(tiny_run(tmp_path, shards), 3, 2.0, 1.0, 0.0, [], {"weight": torch.ones(2)}, changes)
    assert read_dump(write_dump(tmp_path, dump)).changes == changes


def test_best_value_of_another_metric_does_not_count(copy: Path, shards: Path) -> None:
    best = CheckpointConfig(every_steps=0, keep=0, best="R@1")
    settings = {"validation": ValidationConfig(every_steps=3), "checkpoint": best}
    train(again(copy, shards, **settings), validate=lambda *_: {"R@1": 0.9, "R@5": 0.1})
    settings = {"validation": ValidationConfig(every_steps=4), "checkpoint": dataclasses.replace(best, best="R@5")}
    train(again(copy, shards, max_steps=4, **settings), validate=lambda *_: {"R@1": 0.9, "R@5": 0.1})
    assert checkpoint.load_latest(copy / "checkpoints").rest["best"]["figure"] == "R@5"


def test_stopped_copy_is_resumed_from_its_step(run: Path, shards: Path, tmp_path: Path) -> None:
    """The changes of a later step are not those of an earlier checkpoint."""
    part = stopped_after(run, tmp_path / "part", 1)
    train(again(part, shards, max_steps=2))
    assert column(part, "loss") == column(run, "loss") and saved_steps(part) == [1, 2]
    assert checkpoint.load_latest(part / "checkpoints").run["changes"] == []
    assert tiny_model() == config_files.from_toml(TrainConfig, part / "config.toml").model
