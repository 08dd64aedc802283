"""Training on several datasets: the samples of a stopped run that other ranks resume, metrics, validation."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from ranks import on_ranks
from runs import column, records
from synthetic import tiny_run, write_shards

from bclip_fast.data.batch import Batch
from bclip_fast.data.loader import Loader
from bclip_fast.errors import UserError
from bclip_fast.eval.command import EvalCommand
from bclip_fast.eval.command import run as evaluate
from bclip_fast.train import report
from bclip_fast.train.config import CheckpointConfig, DataConfig, TrainConfig, ValidationConfig
from bclip_fast.train.trainer import train


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    write_shards(root / "large", num_samples=60, num_val=8)
    write_shards(root / "small", num_samples=20, num_val=8, seed=1)
    return root


def run_of(run: Path, root: Path, **changes: Any) -> TrainConfig:
    shards = [{"path": str(root / "large"), "weight": 3}, {"path": str(root / "small"), "weight": 1}]
    settings: dict[str, Any] = {
        "data": DataConfig(shards=shards, shuffle_block=32),  # type: ignore[arg-type]
        "checkpoint": CheckpointConfig(every_steps=0),
        "max_steps": 12,
    }
    return tiny_run(run, root, **(settings | changes))


def keys_of_steps(rank: int, config: TrainConfig) -> list[list[str]]:
    """Train, and return this rank's keys of each step."""
    steps: list[list[str]] = []
    read = Loader.__next__

    def record(loader: Loader) -> Batch:
        batch = read(loader)
        steps.append(batch.keys)
        return batch

    Loader.__next__ = record  # type: ignore[method-assign]
    try:
        train(config)
    finally:
        Loader.__next__ = read  # type: ignore[method-assign]
    return steps


def joined(ranks: list[list[list[str]]]) -> list[list[str]]:
    """The keys of each step over all ranks. With costs, the number of ranks decides their order."""
    return [sorted(key for keys in step for key in keys) for step in zip(*ranks, strict=True)]


def test_stopped_on_two_ranks_and_resumed_on_four_sees_the_same_samples(root: Path, tmp_path: Path):
    """An epoch has 5 steps of 16 samples, so the run stops in the middle of its second epoch."""
    expected = joined([keys_of_steps(0, run_of(tmp_path / "whole", root))])
    first = joined(on_ranks(2, keys_of_steps, run_of(tmp_path / "run", root, max_steps=7)))
    second = joined(on_ranks(4, keys_of_steps, run_of(tmp_path / "run", root, resume=True)))
    assert first + second == expected
    assert len({tuple(step) for step in expected}) == len(expected) == 12
    assert all(sum(key.startswith("small/") for key in step) == 4 for step in expected)
    assert column(tmp_path / "run", "samples/large") == [12 * step for step in range(1, 13)]
    assert column(tmp_path / "run", "samples/small") == [4 * step for step in range(1, 13)]
    report.run(report.TrainReportConfig(runs=(str(tmp_path / "run"),)))
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Samples of small" in page
    assert "48 (25.0 %)" in page


def test_validation_takes_every_member_that_has_the_split(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    shutil.copytree(root, tmp_path / "data")
    settings: dict[str, Any] = {"max_steps": 1, "validation": ValidationConfig(every_steps=1, batch_size=8)}
    both = run_of(tmp_path / "both", tmp_path / "data", **settings)
    train(both)
    assert len(records(tmp_path / "both")) == 2
    evaluate(EvalCommand(model=str(tmp_path / "both"), task=("retrieval",), progress=False, cache="none"))
    results = tmp_path / "both" / "eval" / "large-small-val" / "results.json"
    assert '"num_samples": 16' in results.read_text()
    write_shards(tmp_path / "data" / "small2", num_samples=20, num_val=0, seed=1)
    shutil.rmtree(tmp_path / "data" / "small")
    (tmp_path / "data" / "small2").rename(tmp_path / "data" / "small")
    with caplog.at_level(logging.INFO):
        train(run_of(tmp_path / "one", tmp_path / "data", **settings))
    assert "split val is that of large; without it: small" in caplog.text


def test_run_with_a_broken_member_writes_nothing(root: Path, tmp_path: Path):
    shutil.copytree(root, tmp_path / "data")
    next((tmp_path / "data" / "small").glob("train-*.index.json")).write_text("{}")
    for path in (tmp_path / "data" / "small").glob("train-*.tar"):
        path.write_bytes(path.read_bytes()[:-512])
    with pytest.raises(UserError, match=r"dataset small: .*truncated"):
        train(run_of(tmp_path / "run", tmp_path / "data"))
    assert not (tmp_path / "run").exists()


def test_changed_weights_are_refused_on_resume(root: Path, tmp_path: Path):
    config = run_of(tmp_path / "run", root, max_steps=1)
    train(config)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    shards = [{"path": str(root / "large"), "weight": 2}, {"path": str(root / "small"), "weight": 1}]
    data = DataConfig(shards=shards, shuffle_block=32)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="dataset large had a share of 3, and has 2"):
        train(run_of(tmp_path / "run", root, data=data, resume=True))
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
