"""`bclip bench busy`: each kind of work is measured in turns, and other processes end with their turn."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from synthetic import write_shards

from bclip_fast.benchmarks import busy
from bclip_fast.benchmarks.busy import BusyConfig, company
from bclip_fast.benchmarks.report import BenchConfig, run
from bclip_fast.errors import UserError


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data") / "shards", num_samples=16)


def test_training_is_measured_idle_and_in_company(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
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
    pass


class ThreeTurns:
    """Stands in for the connection to the process that measures: three turns, and what was sent for each."""

    def __init__(self) -> None:
        self.sent: list[tuple[float, float] | None] = []

    def recv(self) -> tuple[float, float]:
        if len(self.sent) == 4:
            raise Stopped
        return 0.0, 0.0

    def send(self, result: tuple[float, float] | None) -> None:
        self.sent.append(result)


def test_loader_counts_the_samples_of_a_turn(shards: Path):
    connection = ThreeTurns()
    with pytest.raises(Stopped):
        busy._load(BusyConfig(shards=str(shards), batch_size=4), busy.Turns(connection))
    assert connection.sent[0] is None and [units for units, _ in connection.sent[1:]] == [4, 4, 4]


@pytest.mark.parametrize("task", ["attention", "loss", "linear", "pointwise"])
def test_kernel_gives_finite_results(task: str):
    results = busy._kernel(task, 2)()
    assert len(results) > 1 and all(torch.isfinite(result).all() for result in results if result is not None)


def children() -> set[int]:
    """The processes that this one has started and not yet waited for."""
    tasks = Path("/proc/self/task").iterdir()
    return {int(pid) for task in tasks for pid in (task / "children").read_text().split()}


@pytest.mark.parametrize("kind", ["one", "short"])
def test_company_ends_with_its_block(kind: busy.Company):
    before = children()
    with company(kind):
        (started,) = children() - before
        assert os.getpgid(started) == started
    with pytest.raises(ProcessLookupError):
        os.killpg(started, 0)


def test_policy_sets_its_variables_for_its_process_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    with busy._environment(busy._variables("GOMP_SPINCOUNT=7")):
        assert os.environ["GOMP_SPINCOUNT"] == "7" and "OMP_WAIT_POLICY" not in os.environ
    assert os.environ["OMP_WAIT_POLICY"] == "active" and "GOMP_SPINCOUNT" not in os.environ


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 1}, r"busy\.batch_size=1"),
        ({"tasks": ()}, r"busy\.tasks is empty"),
        ({"company": ("one",)}, "needs idle"),
        ({"policies": ("lazy",)}, "'lazy' is neither one of torch, bclip, passive"),
    ],
)
def test_bad_settings_are_named(options: dict, message: str):
    with pytest.raises(UserError, match=message):
        BusyConfig(**options)
