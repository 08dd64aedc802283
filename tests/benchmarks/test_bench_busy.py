"""Tests of `bclip bench busy`: turns of work, the other processes, and wait policies."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from synthetic import write_shards

from bclip_fast.benchmarks import busy, busy_work
from bclip_fast.benchmarks.busy import BusyConfig, company
from bclip_fast.benchmarks.report import BenchConfig, run
from bclip_fast.errors import UserError


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data") / "shards", num_samples=16)


def test_busy_training_has_rows_idle_and_beside_others(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = BusyConfig(
        ("train",), ("idle", "short"), ("bclip",), shards=str(shards), batch_size=4, seconds=0.01, settle_seconds=0,
        rounds=1,
    )  # fmt: skip
    assert run(BenchConfig("busy", tmp_path, busy=config)) == 0
    rows = [json.loads(line) for line in (tmp_path / "bench.jsonl").read_text().splitlines()]
    assert [row["case"] for row in rows] == ["train-idle", "train-short"]
    idle, beside = rows
    assert idle["of_idle"] == idle["left"] == 1
    assert beside["of_idle"] == pytest.approx(beside["units_per_second"] / idle["units_per_second"])
    assert beside["of_left"] == pytest.approx(beside["of_idle"] / beside["left"])
    assert "left by others" in capsys.readouterr().out


class Stopped(Exception):
    """Ends the work after its turns."""


class ThreeTurns:
    """A connection to a measuring process that asks for three turns and records the answers."""

    def __init__(self) -> None:
        self.sent: list[tuple[float, float] | None] = []

    def recv(self) -> tuple[float, float]:
        if len(self.sent) == 4:
            raise Stopped
        return 0.0, 0.0

    def send(self, result: tuple[float, float] | None) -> None:
        self.sent.append(result)


def test_load_one_batch_per_turn_counts_its_samples(shards: Path):
    connection = ThreeTurns()
    with pytest.raises(Stopped):
        busy_work.load(str(shards), 4, busy_work.Turns(connection))
    assert connection.sent[0] is None and [units for units, _ in connection.sent[1:]] == [4, 4, 4]


@pytest.mark.parametrize("task", ["attention", "loss", "linear", "pointwise"])
def test_kernel_call_results_are_finite(task: str):
    results = busy_work.make_kernel_call(task, 2)()
    assert len(results) > 1 and all(torch.isfinite(result).all() for result in results if result is not None)


def children() -> set[int]:
    """Return the ids of child processes that this process has not waited for."""
    tasks = Path("/proc/self/task").iterdir()
    return {int(pid) for task in tasks for pid in (task / "children").read_text().split()}


@pytest.mark.parametrize("kind", ["one", "short"])
def test_company_end_of_block_kills_processes(kind: busy.Company):
    before = children()
    with company(kind):
        (started,) = children() - before
        assert os.getpgid(started) == started
    with pytest.raises(ProcessLookupError):
        os.killpg(started, 0)


def test_only_variables_end_of_block_restores_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    with busy.only_variables(busy.policy_variables("GOMP_SPINCOUNT=7")):
        assert os.environ["GOMP_SPINCOUNT"] == "7" and "OMP_WAIT_POLICY" not in os.environ
    assert os.environ["OMP_WAIT_POLICY"] == "active" and "GOMP_SPINCOUNT" not in os.environ


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 1}, r"busy\.batch_size=1"),
        ({"tasks": ()}, r"busy\.tasks is empty"),
        ({"company": ("one",)}, "add idle"),
        ({"policies": ("lazy",)}, "'lazy' is neither one of torch, bclip, passive"),
    ],
)
def test_busy_config_bad_field_is_named(options: dict, message: str):
    with pytest.raises(UserError, match=message):
        BusyConfig(**options)
