"""What a run survives: steps that must not be taken, signals, SIGKILL, lost ranks, full disks."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import random
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import fork_server, on_ranks
from synthetic import tiny_model, tiny_run, weights, write_shards

from bclip_fast import distributed
from bclip_fast.cli import main
from bclip_fast.errors import UserError
from bclip_fast.io.runs import read_metrics
from bclip_fast.model.biomedclip import BiomedClip
from bclip_fast.train import checkpoint, trainer
from bclip_fast.train.config import CheckpointConfig, TrainConfig, ValidationConfig
from bclip_fast.train.engine import EngineConfig, StepResult, build_engine
from bclip_fast.train.loss_spikes import LossSpikes, SpikeConfig
from bclip_fast.train.schedule import OptimConfig
from bclip_fast.train.signals import EXIT_STOPPED
from bclip_fast.train.trainer import train

DROPOUT = tiny_model(dropout=0.1)


def column(run: Path, name: str) -> list[Any]:
    return [record[name] for record in read_metrics(run / "metrics.jsonl") if name in record]


def steps(run: Path) -> list[int]:
    return [int(path.name[5:]) for path in reversed(checkpoint.list_checkpoints(run / "checkpoints"))]


def assert_equal_runs(run: Path, whole: Path) -> None:
    assert column(run, "loss") == column(whole, "loss")
    expected, found = weights(whole), weights(run)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


# Steps that are not taken.


def test_the_rule_of_spikes():
    spikes = LossSpikes(SpikeConfig(window=4, loss=10.0, grad_norm=20.0, max_skipped=1))
    taken, refused = StepResult(1.0, False), StepResult(1.0, True)
    for step, loss in enumerate([3.0, 3.1, 2.9], 1):
        assert spikes.limit(loss, 16) == math.inf and spikes.observe(step, loss, taken) is None
    assert spikes.limit(1e9, 16) == math.inf and spikes.limit(math.nan, 16) == -1.0
    spikes.observe(4, 3.3, StepResult(2.0, False))
    # Losses 2.9 3.0 3.1 3.3: median 3.05, deviations 0.05 0.05 0.15 0.25, so the limit is 3.05 + 10 * 0.1. Most norms
    # are 1: no deviation, and the least is a hundredth of their median.
    assert spikes.limit(4.04, 16) == pytest.approx(1 + 20 * 0.01) and spikes.limit(4.06, 16) == -1.0
    assert spikes.observe(5, 4.06, refused) == "the loss is 4.06, the limit 4.05"
    assert not spikes.too_many and spikes.num_skipped == 1
    again = LossSpikes(SpikeConfig(window=4, loss=10.0, grad_norm=20.0, max_skipped=1))
    again.load_state_dict(json.loads(json.dumps(spikes.state_dict())))
    for rule in (spikes, again):
        assert rule.limit(4.06, 16) == -1.0
        assert rule.observe(6, 3.0, StepResult(1.3, True)) == "the gradient's norm is 1.3, the limit 1.2"
        assert rule.too_many and rule.num_skipped == 2
        # Skips that are older than the window don't count; another batch size has its own window.
        assert rule.observe(10, math.nan, StepResult(math.nan, True)) == "the loss is nan"
        assert not rule.too_many and rule.num_skipped == 3
        assert rule.limit(5.0, 64) == math.inf
    # fp16's scaler looks after its own overflows.
    assert spikes.observe(11, 3.0, StepResult(math.inf, True, overflow=True)) is None and spikes.num_skipped == 3
    off = LossSpikes(SpikeConfig(window=1, loss=0.0, grad_norm=0.0))
    off.observe(1, 1.0, taken)
    assert off.limit(1e30, 0) == math.inf and off.limit(math.inf, 0) == -1.0
    with pytest.raises(UserError, match=r"spikes\.window=0"):
        SpikeConfig(window=0)


@pytest.mark.parametrize("name, stage", [("ddp", 0), *(("deepspeed", stage) for stage in range(4))])
def test_an_engine_refuses_a_step_and_goes_on(name: str, stage: int):
    """As if the refused steps, one of them of NaN, had never been: weights, moments and the count of updates."""
    found = []
    for limits in ([math.inf, math.inf], [math.inf, -1.0, 1e-9, math.nan, math.inf]):
        torch.manual_seed(0)
        model = BiomedClip(tiny_model())
        config = EngineConfig(name=name, zero_stage=stage, precision="fp32")
        wrapped = build_engine(model, config, OptimConfig(grad_clip_norm=1.0), 2)
        image, ids = torch.rand(2, 3, 32, 32), torch.randint(1, 90, (2, 12))
        for limit in limits:
            output = wrapped(image, ids)
            loss = (output["image_features"] * output["text_features"]).sum()
            wrapped.backward(loss * math.nan if math.isnan(limit) else loss)
            result = wrapped.step(1e-3, math.inf if math.isnan(limit) else limit)
            assert result.skipped == (limit != math.inf) and not result.overflow
            assert math.isfinite(result.grad_norm) != math.isnan(limit)
        found.append((wrapped.model_state(), wrapped.optimizer_state()))
        wrapped.close()
    (model_a, optimizer_a), (model_b, optimizer_b) = found
    assert all(torch.equal(model_a[key], model_b[key]) for key in model_a)
    assert optimizer_a.num_steps == optimizer_b.num_steps == 2
    for key, moments in optimizer_a.moments.items():
        assert all(torch.equal(moments[kind], optimizer_b.moments[key][kind]) for kind in moments)


@pytest.fixture
def broken_at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, float], None]:
    """Multiplies the loss of a step, counted from 1 over all runs of the test."""
    calls, real, factors = [0], trainer.ClipLoss.forward, {}

    def forward(self: Any, *args: Any, **keywords: Any) -> Any:
        calls[0] += 1
        return real(self, *args, **keywords) * factors.get(calls[0], 1.0)

    monkeypatch.setattr(trainer.ClipLoss, "forward", forward)
    return factors.__setitem__


@pytest.mark.parametrize("factor", [math.nan, 1e4])
def test_a_broken_step_is_skipped(shards: Path, tmp_path: Path, broken_at_step: Any, factor: float):
    """The position and the rate advance as if it had been taken; a run stopped right after it resumes to the same."""
    broken_at_step(5, factor)
    spikes = SpikeConfig(window=3, loss=50.0)
    config = tiny_run(tmp_path / "run", shards, model=DROPOUT, max_steps=8, spikes=spikes)
    config = dataclasses.replace(config, checkpoint=CheckpointConfig(every_steps=5))
    run = train(config)
    assert column(run, "skipped") == [0, 0, 0, 0, 1, 1, 1, 1]
    assert column(run, "samples") == [16 * step for step in range(1, 9)]
    saved = checkpoint.load_latest(run / "checkpoints")
    assert saved.optimizer.num_steps == 7 and all(torch.isfinite(tensor).all() for tensor in saved.model.values())
    part = tmp_path / "part"
    os.rename(run, part)
    expected = column(part, "loss"), weights(part)
    checkpoint.shutil.rmtree(part / "checkpoints" / "step-00000008")
    train(dataclasses.replace(config, run=str(part), resume=True))
    assert column(part, "skipped") == [0, 0, 0, 0, 1, 1, 1, 1]
    assert str(column(part, "loss")) == str(expected[0])
    assert all(torch.equal(tensor, expected[1][name]) for name, tensor in weights(part).items())


@pytest.mark.parametrize("micro_batch_size", [0, 4])
def test_a_run_that_skips_too_often_leaves_a_dump_that_computes_it_again(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], micro_batch_size: int
):
    """A limit at the middle of what norms are: one step may be skipped, at the second in a row the run gives up."""
    config = tiny_run(
        tmp_path / "run",
        shards,
        model=DROPOUT,
        micro_batch_size=micro_batch_size,
        spikes=SpikeConfig(window=2, grad_norm=1e-9, max_skipped=1),
        max_steps=60,
    )
    words = r"2 of the last 2 steps were skipped, the last one at step \d+: the gradient's norm is"
    with pytest.raises(UserError, match=words) as e:
        train(config)
    (dump,) = (tmp_path / "run" / "dumps").iterdir()
    last = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    assert last["skipped"] >= 2 and dump.name == f"step-{last['step']:08d}" and str(dump) in str(e.value)
    assert {path.suffix for path in dump.iterdir()} == {".safetensors", ".json", ".toml"}
    capsys.readouterr()
    assert main(["train", "replay", str(dump)]) == 0
    said = capsys.readouterr().err
    for name in ("loss", "grad_norm"):
        assert f"{name} {last[name]!r} in the run, {last[name]!r} computed again" in said
    # A single bit of the batch shows.
    file = dump / "batch-0000.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 255
    file.write_bytes(data)
    assert main(["train", "replay", str(dump)]) == 1
    state = json.loads((dump / "state.json").read_text())
    assert len(state["ranks"][0]) == (4 if micro_batch_size else 1)
    state["ranks"].append([])
    (dump / "state.json").write_text(json.dumps(state))
    assert main(["train", "replay", str(dump)]) == 2
    file.write_bytes(data[:1000])
    assert "was made by 2 rank(s), here are 1: torchrun --nproc-per-node 2" in capsys.readouterr().err
    state["ranks"].pop()
    (dump / "state.json").write_text(json.dumps(state))
    assert main(["train", "replay", str(dump)]) == 2 and "is no whole dump" in capsys.readouterr().err


def _give_up_and_replay(rank: int, folder: str) -> dict[str, int]:
    """Exit status of `bclip train replay` by engine."""
    os.environ["LOCAL_RANK"] = str(rank)
    found = {}
    for name, settings, micro in (
        ("ddp", EngineConfig("ddp", precision="fp32"), 0),
        ("zero2", EngineConfig(zero_stage=2, precision="fp32"), 4),
    ):
        run = Path(folder) / name
        options: dict[str, Any] = dict(model=DROPOUT, engine=settings, micro_batch_size=micro, max_steps=60)
        rule = SpikeConfig(window=2, grad_norm=1e-9, max_skipped=1)
        with pytest.raises(UserError, match="steps were skipped"):
            train(tiny_run(run, Path(folder) / "shards", spikes=rule, **options))
        distributed.barrier()
        (dump,) = (run / "dumps").iterdir()
        found[name] = main(["train", "replay", str(dump)])
        # Of one rank alone, whose gradient is part of both ranks': every one of them sees the difference.
        if rank == 1:
            batch = dump / "batch-0001.safetensors"
            batch.write_bytes(batch.read_bytes()[:-1] + b"\xa5")
        distributed.barrier()
        found[f"{name} of another batch"] = main(["train", "replay", str(dump)])
    return found


def test_two_ranks_compute_a_dumped_step_again(tmp_path: Path):
    write_shards(tmp_path / "shards")
    names = {"ddp": 0, "ddp of another batch": 1, "zero2": 0, "zero2 of another batch": 1}
    assert on_ranks(2, _give_up_and_replay, str(tmp_path)) == [names, names]


# Checkpoints.


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's thread
def test_a_full_disk_does_not_end_the_run(shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Files are limited to 1 kB from step 3 to 5, so the checkpoint of step 4 fails, and lines wait."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def on_step(record: dict[str, Any]) -> None:
        limit = 1000 if record["step"] in (3, 4) else soft
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        if record["step"] == 5:
            kept.extend(steps(tmp_path / "run"))

    kept: list[int] = []
    config = tiny_run(tmp_path / "run", shards, checkpoint=CheckpointConfig(every_steps=2, background=False))
    try:
        train(config, on_step=on_step)
        assert kept == [2] and steps(tmp_path / "run") == [2, 6]
        assert column(tmp_path / "run", "step") == [1, 2, 3, 4, 5, 6]
        assert caplog.text.count("metrics.jsonl cannot be written") == 1
        assert "step-00000004: cannot be written: " in caplog.text and "File too large" in caplog.text
        assert "training goes on" in caplog.text
        # The last one is what the run was for.
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        longer = dataclasses.replace(config, max_steps=8, resume=True)
        with pytest.raises(UserError, match="step-00000008: cannot be written: .*older checkpoints are untouched"):
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


def test_checkpoints_are_written_while_training_goes_on(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A slow disk: the step after a checkpoint doesn't wait for it; the next checkpoint does, and so does the end."""
    events: list[str] = []
    real = checkpoint.save
    last_step_is_done = threading.Event()

    def slow(folder: Path, saved: checkpoint.Checkpoint, **options: Any) -> Path:
        assert last_step_is_done.wait(120), "training waits for the checkpoint of step 2"
        path = real(folder, saved, **options)
        events.append(f"saved {saved.step}")
        return path

    monkeypatch.setattr(checkpoint, "save", slow)
    found = {}

    def on_step(record: dict[str, Any]) -> None:
        events.append(f"step {record['step']}")
        if record["step"] == 4:
            last_step_is_done.set()

    # In the second run, whose steps do wait, the disk is fast: the event stays set.
    for background in (True, False):
        events.clear()
        settings = CheckpointConfig(every_steps=2, keep=0, background=background)
        run = tmp_path / str(background)
        train(tiny_run(run, shards, checkpoint=settings, max_steps=4), on_step=on_step)
        found[background] = list(events)
    assert found[False] == ["step 1", "step 2", "saved 2", "step 3", "step 4", "saved 4"]
    assert found[True] == ["step 1", "step 2", "step 3", "step 4", "saved 2", "saved 4"]
    assert_equal_runs(tmp_path / "True", tmp_path / "False")


def test_an_error_of_the_writer_that_is_no_full_disk_ends_the_run(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(checkpoint, "save", broken)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        train(tiny_run(tmp_path / "run", shards))


def test_which_checkpoints_are_kept(shards: Path, tmp_path: Path):
    figures = iter([0.1, 0.5, 0.3, 0.2])

    def validate(*_: Any) -> dict[str, float]:
        return {"R@1": next(figures)}

    settings = CheckpointConfig(every_steps=2, keep=1, keep_every_steps=4, best="R@1")
    config = tiny_run(
        tmp_path / "run", shards, max_steps=12, checkpoint=settings, validation=ValidationConfig(every_steps=3)
    )
    run = train(config, validate=validate)
    # 3 was the best until 6 was; 4, 8 and 12 are kept for ever.
    assert steps(run) == [4, 6, 8, 12]
    assert checkpoint.load_latest(run / "checkpoints").rest["best"] == {"step": 6, "figure": "R@1", "value": 0.5}
    lowest = dataclasses.replace(settings, best="-R@1", keep_every_steps=0)
    figures = iter([0.1, 0.5, 0.3, 0.05])
    assert steps(
        train(dataclasses.replace(config, run=str(tmp_path / "low"), checkpoint=lowest), validate=validate)
    ) == [12]
    with pytest.raises(UserError, match=r"checkpoint\.best=R@2: the validation has no such figure, but R@1"):
        figures = iter([0.1])
        wrong = dataclasses.replace(config, run=str(tmp_path / "w"), checkpoint=CheckpointConfig(best="R@2"))
        train(wrong, validate=validate)


# Processes.


def _train(config: TrainConfig, rank: int, num_ranks: int, port: int, pause: float, stop_at: int) -> None:
    torch.set_num_threads(1)
    distributed._GRACE_S = 1.0
    logging.basicConfig(level=logging.WARNING, filename=f"{config.run}.{rank}.log")
    if num_ranks > 1:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(num_ranks), LOCAL_RANK=str(rank))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))

    def on_step(record: dict[str, Any]) -> None:
        time.sleep(pause)
        if record["step"] == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        train(config, on_step=on_step)
    except UserError as error:
        logging.getLogger().error("%s", error)
        raise SystemExit(2) from None


@contextlib.contextmanager
def running(config: TrainConfig, num_ranks: int = 1, pause: float = 0.0, stop_at: int = 0) -> Iterator[list[Any]]:
    """The ranks of a run, ended for certain; rank 0 sleeps `pause` seconds after each step, and is told to stop after
    step `stop_at`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    Path(config.run).parent.mkdir(parents=True, exist_ok=True)
    ranks = [
        fork_server().Process(target=_train, args=(config, rank, num_ranks, port, pause, stop_at))
        for rank in range(num_ranks)
    ]
    for process in ranks:
        process.start()
    try:
        yield ranks
        for process in ranks:
            process.join(60)
    finally:
        for process in ranks:
            if process.is_alive():
                process.kill()
            process.join()


def wait_for(what: Callable[[], Any], seconds: float = 60.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return found


def changed_since(path: Path, moment: float) -> bool:
    return path.is_file() and path.stat().st_mtime > moment


def num_lines(run: Path) -> int:
    path = run / "metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.is_file() else 0


def log_of(run: Path, rank: int = 0) -> str:
    return Path(f"{run}.{rank}.log").read_text()


def kill_and_resume(shards: Path, folder: Path, kills: int, seed: int) -> None:
    """A run that is killed `kills` times, every other time while a checkpoint is written, ends as one that isn't."""
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


def test_a_run_that_is_killed_goes_on_bit_for_bit(shards: Path, tmp_path: Path):
    kill_and_resume(shards, tmp_path, kills=2, seed=0)


@pytest.mark.long
def test_a_run_that_is_killed_ten_times_goes_on_bit_for_bit(shards: Path, tmp_path: Path):
    kill_and_resume(shards, tmp_path, kills=10, seed=1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_stops_with_a_checkpoint(shards: Path, tmp_path: Path, number: int):
    run = tmp_path / "run"
    config = tiny_run(run, shards, model=DROPOUT, max_steps=30, checkpoint=CheckpointConfig(every_steps=0))
    with running(config, pause=0.05) as (process,):
        wait_for(lambda: num_lines(run) >= 2)
        os.kill(process.pid, number)
    assert process.exitcode == EXIT_STOPPED == 75
    (step,) = steps(run)
    assert 2 <= step == num_lines(run) < 30
    assert f"stopped after step {step} of 30; the command with --resume goes on" in log_of(run)
    if number == signal.SIGTERM:
        whole = train(dataclasses.replace(config, run=str(tmp_path / "whole")))
        train(dataclasses.replace(config, resume=True))
        assert_equal_runs(run, whole)


def test_a_second_interrupt_stops_at_once(shards: Path, tmp_path: Path):
    run = tmp_path / "run"
    with running(tiny_run(run, shards, checkpoint=CheckpointConfig(every_steps=0)), pause=1000.0) as (process,):
        wait_for(lambda: num_lines(run) >= 1)
        # The run is in a pause that outlasts the test, so it ends only if it doesn't wait for the step.
        deadline = time.monotonic() + 60
        while process.is_alive() and time.monotonic() < deadline:
            os.kill(process.pid, signal.SIGINT)
            process.join(0.2)
    assert process.exitcode not in (0, EXIT_STOPPED, None, -signal.SIGKILL)
    assert not steps(run)


def test_two_ranks_stop_by_a_signal_to_one(shards: Path, tmp_path: Path):
    run = tmp_path / "run"
    config = tiny_run(run, shards, max_steps=200, checkpoint=CheckpointConfig(every_steps=0))
    with running(config, num_ranks=2, pause=0.02) as ranks:
        wait_for(lambda: num_lines(run) >= 2)
        os.kill(ranks[1].pid, signal.SIGUSR1)
    assert [process.exitcode for process in ranks] == [EXIT_STOPPED] * 2
    assert steps(run) == [num_lines(run)]


@pytest.mark.parametrize(
    "settings",
    [
        EngineConfig("ddp", precision="fp32"),
        pytest.param(EngineConfig(zero_stage=3, precision="fp32"), marks=pytest.mark.long),
    ],
    ids=["ddp", "zero3"],
)
def test_one_rank_then_two_then_four(shards: Path, tmp_path: Path, settings: EngineConfig):
    config = tiny_run(
        tmp_path / "run", shards, engine=settings, checkpoint=CheckpointConfig(every_steps=0), resume=True
    )
    for num_ranks, stop_at in ((1, 2), (2, 4), (4, 0)):
        with running(config, num_ranks, stop_at=stop_at) as ranks:
            pass
        assert [process.exitcode for process in ranks] == [EXIT_STOPPED if stop_at else 0] * num_ranks
        assert num_lines(tmp_path / "run") == (stop_at or 6)
    # The tolerance of test_engine_ranks.
    whole = train(tiny_run(tmp_path / "whole", shards))
    torch.testing.assert_close(column(tmp_path / "run", "loss"), column(whole, "loss"), rtol=0, atol=2e-5)


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_rank_ends_the_others_with_its_name(shards: Path, tmp_path: Path, lost: int):
    run = tmp_path / "run"
    config = tiny_run(run, shards, max_steps=200, timeout_s=1000.0, checkpoint=CheckpointConfig(every_steps=2))
    with running(config, num_ranks=2, pause=0.02) as ranks:
        wait_for(lambda: num_lines(run) >= 4)
        ranks[lost].kill()
        ranks[1 - lost].join(60)
    # It didn't wait for the timeout, which outlasts the test.
    assert ranks[1 - lost].exitcode == 2
    said = log_of(run, 1 - lost)
    assert (
        f"rank {1 - lost}: " in said and " failed: " in said and "--resume goes on from the newest checkpoint" in said
    )
    # Rank 0's process is where the ranks' store is.
    cause = f"rank 1 ({socket.gethostname()}, process {ranks[1].pid}) is lost or stuck"
    assert (cause if lost else "process of rank 0 is lost") in said


def test_a_stuck_rank_is_lost_after_the_timeout(shards: Path, tmp_path: Path):
    run = tmp_path / "run"
    config = tiny_run(run, shards, max_steps=200, timeout_s=2.0)
    with running(config, num_ranks=2, pause=0.02) as ranks:
        wait_for(lambda: num_lines(run) >= 2)
        os.kill(ranks[1].pid, signal.SIGSTOP)
        ranks[0].join(60)
        ranks[1].kill()
    assert ranks[0].exitcode == 2
    assert f"process {ranks[1].pid}) is lost or stuck" in log_of(run)


def test_a_rank_that_never_comes_is_said_so(shards: Path, tmp_path: Path):
    config = tiny_run(tmp_path / "run", shards, timeout_s=1.0)
    process = fork_server().Process(target=_train, args=(config, 1, 2, 1, 0.0, 0))
    process.start()
    process.join(60)
    assert process.exitcode == 2
    assert "rank 1 of 2 on " in log_of(tmp_path / "run", 1)
    assert "the ranks didn't meet at 127.0.0.1:1 within 1 s" in log_of(tmp_path / "run", 1)
