"""Signals, SIGKILL and lost ranks."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
from processes import DROPOUT, changed_since, log_of, num_lines, running, train_rank, wait_for
from ranks import fork_server
from runs import assert_equal_runs, column, saved_steps
from synthetic import tiny_run

from bclip_fast.train.config import CheckpointConfig
from bclip_fast.train.engine import EngineConfig
from bclip_fast.train.signals import EXIT_STOPPED
from bclip_fast.train.trainer import train


def kill_and_resume(shards: Path, folder: Path, kills: int, seed: int) -> None:
    """Compare a run that is killed `kills` times with an uninterrupted one. Every other kill hits a write."""
    config = tiny_run(
        folder / "whole", shards, model=DROPOUT, max_steps=20, checkpoint=CheckpointConfig(every_steps=1, keep=2)
    )
    with running(config):
        pass
    chance = random.Random(seed)
    run = folder / "killed"
    config = dataclasses.replace(config, run=str(run), resume=True)
    interrupted = 0
    for number in range(kills):
        with running(config, pause=0.01) as (process,):
            begun = time.time()
            wait_for(lambda: changed_since(run / "metrics.jsonl", begun))  # noqa: B023
            if number % 2:
                time.sleep(chance.random() * 0.2)
            else:
                wait_for(lambda: list(run.glob("checkpoints/.*.partial")))
            process.kill()
        interrupted += process.exitcode == -signal.SIGKILL
    assert interrupted == kills
    with running(config) as (process,):
        pass
    assert process.exitcode == 0
    assert_equal_runs(run, folder / "whole")


def test_killed_run_resumes_bitwise(shards: Path, tmp_path: Path):
    kill_and_resume(shards, tmp_path, kills=2, seed=0)


@pytest.mark.long
def test_run_killed_ten_times_resumes_bitwise(shards: Path, tmp_path: Path):
    kill_and_resume(shards, tmp_path, kills=10, seed=1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signal_stops_run_with_checkpoint(shards: Path, tmp_path: Path, number: int):
    run = tmp_path / "run"
    config = tiny_run(run, shards, model=DROPOUT, max_steps=30, checkpoint=CheckpointConfig(every_steps=0))
    with running(config, pause=0.05) as (process,):
        wait_for(lambda: num_lines(run) >= 2)
        os.kill(process.pid, number)
    assert process.exitcode == EXIT_STOPPED == 75
    (step,) = saved_steps(run)
    assert 2 <= step == num_lines(run) < 30
    assert f"stopped after step {step} of 30; --resume continues the run" in log_of(run)
    if number == signal.SIGTERM:
        uninterrupted = train(dataclasses.replace(config, run=str(tmp_path / "whole")))
        train(dataclasses.replace(config, resume=True))
        assert_equal_runs(run, uninterrupted)


def test_second_interrupt_stops_at_once(shards: Path, tmp_path: Path):
    run = tmp_path / "run"
    with running(tiny_run(run, shards, checkpoint=CheckpointConfig(every_steps=0)), pause=1000.0) as (process,):
        wait_for(lambda: num_lines(run) >= 1)
        # The pause after the step is longer than the test. So the run ends only if it does not wait for the step.
        deadline = time.monotonic() + 60
        while process.is_alive() and time.monotonic() < deadline:
            os.kill(process.pid, signal.SIGINT)
            process.join(0.2)
    assert process.exitcode not in (0, EXIT_STOPPED, None, -signal.SIGKILL)
    assert not saved_steps(run)


def test_signal_to_one_rank_stops_both(shards: Path, tmp_path: Path):
    run = tmp_path / "run"
    config = tiny_run(run, shards, max_steps=200, checkpoint=CheckpointConfig(every_steps=0))
    with running(config, num_ranks=2, pause=0.02) as ranks:
        wait_for(lambda: num_lines(run) >= 2)
        os.kill(ranks[1].pid, signal.SIGUSR1)
    assert [process.exitcode for process in ranks] == [EXIT_STOPPED] * 2
    assert saved_steps(run) == [num_lines(run)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        EngineConfig("ddp", precision="fp32"),
        pytest.param(EngineConfig(zero_stage=3, precision="fp32"), marks=pytest.mark.long),
    ],
    ids=["ddp", "zero3"],
)
def test_run_resumes_on_two_then_four_ranks(shards: Path, tmp_path: Path, settings: EngineConfig):
    config = tiny_run(
        tmp_path / "run", shards, engine=settings, checkpoint=CheckpointConfig(every_steps=0), resume=True
    )
    for num_ranks, stop_at in ((1, 2), (2, 4), (4, 0)):
        with running(config, num_ranks, stop_at=stop_at) as ranks:
            pass
        assert [process.exitcode for process in ranks] == [EXIT_STOPPED if stop_at else 0] * num_ranks
        assert num_lines(tmp_path / "run") == (stop_at or 6)
    # The tolerance is that of test_engine_ranks.py.
    uninterrupted = train(tiny_run(tmp_path / "whole", shards))
    torch.testing.assert_close(column(tmp_path / "run", "loss"), column(uninterrupted, "loss"), rtol=0, atol=2e-5)


@pytest.mark.parametrize("lost", [0, 1])
def test_lost_rank_is_named_by_others(shards: Path, tmp_path: Path, lost: int):
    run = tmp_path / "run"
    config = tiny_run(run, shards, max_steps=200, timeout_s=1000.0, checkpoint=CheckpointConfig(every_steps=2))
    with running(config, num_ranks=2, pause=0.02) as ranks:
        wait_for(lambda: num_lines(run) >= 4)
        ranks[lost].kill()
        ranks[1 - lost].join(60)
    # The timeout is longer than the test, so the rank did not wait for it.
    assert ranks[1 - lost].exitcode == 2
    text = log_of(run, 1 - lost)
    assert f"rank {1 - lost}: " in text
    assert " failed: " in text
    assert "--resume goes on from the newest checkpoint" in text
    # The ranks' store is in rank 0's process.
    cause = f"rank 1 ({socket.gethostname()}, process {ranks[1].pid}) is lost or stuck"
    assert (cause if lost else "process of rank 0 is lost") in text


def test_stuck_rank_is_named_after_timeout(shards: Path, tmp_path: Path):
    run = tmp_path / "run"
    config = tiny_run(run, shards, max_steps=200, timeout_s=2.0)
    with running(config, num_ranks=2, pause=0.02) as ranks:
        wait_for(lambda: num_lines(run) >= 2)
        os.kill(ranks[1].pid, signal.SIGSTOP)
        ranks[0].join(60)
        ranks[1].kill()
    assert ranks[0].exitcode == 2
    assert f"process {ranks[1].pid}) is lost or stuck" in log_of(run)


def test_missing_rank_is_an_error(shards: Path, tmp_path: Path):
    config = tiny_run(tmp_path / "run", shards, timeout_s=1.0)
    process = fork_server().Process(target=train_rank, args=(config, 1, 2, 1, 0.0, 0))
    process.start()
    process.join(60)
    assert process.exitcode == 2
    assert "rank 1 of 2 on " in log_of(tmp_path / "run", 1)
    assert "the ranks didn't meet at 127.0.0.1:1 within 1 s" in log_of(tmp_path / "run", 1)
