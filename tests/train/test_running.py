"""What one sees of a run: its lines, the live line, wandb, validation when it is due, events."""

from __future__ import annotations

import dataclasses
import logging
import os
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic import tiny_model, tiny_run

from bclip_fast import distributed
from bclip_fast.config import CONFIGS, to_toml
from bclip_fast.data.sampler import ShardSampler
from bclip_fast.errors import UserError
from bclip_fast.io.runs import read_metrics
from bclip_fast.model import flops
from bclip_fast.train import progress, trainer
from bclip_fast.train.config import LogConfig, TrainConfig, ValidationConfig
from bclip_fast.train.step_timer import StepTimer
from bclip_fast.train.trainer import train
from bclip_fast.train.validation import ValidationSchedule

PARTS = ("data_wait", "forward", "loss", "backward", "optimizer")


def lines(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return read_metrics(run / name)


def test_a_line_splits_its_step(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The parts add up to the step, and tokens and MFU follow from what was in the batch."""
    monkeypatch.setattr(trainer, "device_peak", lambda device, precision: 1e12)
    # This thread's CPU time, of which other processes take nothing.
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
    for line, own in zip(lines(run), [a + b for a, b in zip(lengths[::2], lengths[1::2], strict=True)], strict=True):
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
    clock = StepTimer(torch.device("cuda"))
    found = []
    for parts in (["forward", "backward"], ["forward", "", "forward", "backward"], []):
        clock.start()
        for part in parts:
            clock.lap(part) if part else clock.skip()
        found.append(clock.seconds())
    assert found == [
        {},
        {"forward_seconds": 0.5, "backward_seconds": 0.5},
        {"forward_seconds": 1.0, "backward_seconds": 0.5},
    ]


RECORD = {
    "step": 3, "samples": 48, "loss": 1.25, "logit_scale": 14.3, "grad_norm": 0.5, "samples_per_second": 1234.4,
    "tokens_per_second": 98765.4, "step_seconds": 2.0, "data_wait_seconds": 0.1,
}  # fmt: skip


def test_the_live_line(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch):
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
    bar = progress.Progress(10, 0, 160)
    bar.update(RECORD)
    bar.close()
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
    stream = ShardSampler([50, 46], "", batch_size=16)
    validation = ValidationSchedule(settings, tmp_path, 14)
    found = []
    for step in range(1, 15):
        if validation.is_due(step, stream.locate(step)[0], stream.locate(step - 1)[0]):
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


def test_slurms_variables(monkeypatch: pytest.MonkeyPatch):
    task = {
        "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "2", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8",
        "SLURM_STEP_NUM_TASKS": "8", "SLURM_JOB_NODELIST": "login1,gpu[03-04]", "SLURM_STEP_NODELIST": "gpu[03-04]",
    }  # fmt: skip
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    found = distributed.slurm_variables(task)
    assert found == {
        "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu03",
        "MASTER_PORT": str(12000 + (4711 * 31 + 2) % 20000),
    }  # fmt: skip
    chosen = distributed.slurm_variables(task | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"})
    assert (chosen["MASTER_ADDR"], chosen["MASTER_PORT"]) == ("10.0.0.1", "1234")
    # A task that is shown one GPU calls it 0.
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert distributed.slurm_variables(task)["LOCAL_RANK"] == "0"
    # torchrun under srun, a lone task, and the batch script itself are left as they are.
    assert distributed.slurm_variables(task | {"RANK": "0"}) == {}
    assert distributed.slurm_variables(task | {"SLURM_STEP_NUM_TASKS": "1"}) == {}
    assert distributed.slurm_variables({key: task[key] for key in task if "STEP" not in key}) == {}


@pytest.mark.parametrize(
    "nodes, host",
    [
        ("node7", "node7"), ("gpu[03-07,9]-ib,login1", "gpu03-ib"), ("a[12],b", "a12"), ("x1,x2", "x1"),
        ("rack[2-3]node[08,10]", "rack2node08"),
    ],
)  # fmt: skip
def test_the_first_host_of_slurms_list(nodes: str, host: str):
    assert distributed.first_host(nodes) == host


# Two tasks; once there is a line in the file that SIGNAL_AFTER names, they get what sbatch --signal=USR1 sends.
SRUN = """#!{python}
import os, signal, subprocess, sys, time
command = sys.argv[[arg.startswith("-") for arg in sys.argv[1:]].index(False) + 1:]
tasks = [
    subprocess.Popen(command, env={{**os.environ, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i), "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost"}}) for i in range(2)
]
path = os.environ.get("SIGNAL_AFTER")
while path and tasks[0].poll() is None and not (os.path.exists(path) and os.path.getsize(path)):
    time.sleep(0.05)
for task in tasks if path else []:
    task.send_signal(signal.SIGUSR1)
sys.exit(max(task.wait() for task in tasks))
"""


def _sbatch(folder: Path, bclip: str, *args: str) -> tuple[subprocess.CompletedProcess[str], str]:
    """The package's script with stand-ins for Slurm's programs; what scontrol was asked."""
    folder.mkdir()
    scripts = {
        "srun": SRUN.format(python=sys.executable),
        "scontrol": f'#!/bin/sh\necho "$@" > {folder}/asked\n',
        "bclip": f"#!/bin/sh\n{bclip}\n",
    }
    for name, text in scripts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    job = str(os.getpid())
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "RANK"))}
    environment |= {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": job, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", str(CONFIGS / "slurm.sbatch"), *args],
        env=environment, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    asked = folder / "asked"
    return done, asked.read_text().split()[0] if asked.is_file() else ""


def test_the_slurm_script_trains_on_two_tasks(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Until the signal before the time limit: a checkpoint is written and the job requeued."""
    run = tmp_path / "run"
    config = tiny_run(run, shards, max_steps=100_000)
    (tmp_path / "config.toml").write_text(to_toml(config))
    monkeypatch.setenv("SIGNAL_AFTER", str(run / "metrics.jsonl"))
    bclip = f'exec {sys.executable} -m bclip_fast.cli "$@"'
    done, asked = _sbatch(tmp_path / "bin", bclip, str(tmp_path / "config.toml"))
    assert (done.returncode, asked) == (75, "requeue"), done.stderr
    events, steps = lines(run, "events.jsonl"), lines(run)
    assert (events[0]["event"], events[0]["ranks"]) == ("start", 2) and events[-1]["event"] == "checkpoint"
    assert [line["step"] for line in steps] == list(range(1, len(steps) + 1))
    assert (run / "checkpoints" / f"step-{len(steps):08d}").is_dir()
    assert all(line["communication_seconds"] >= 0 for line in steps[1:])
    # One rank says what happens.
    assert done.stderr.count("training on 96 samples") == 1


@pytest.mark.parametrize("status, asked", [(75, "requeue"), (2, ""), (0, "")])
def test_the_slurm_script_requeues_what_was_stopped(tmp_path: Path, status: int, asked: str):
    done, found = _sbatch(tmp_path / "bin", f'echo "$@" > {tmp_path}/args; exit {status}', "my.toml", "--seed", "3")
    assert (done.returncode, found) == (status, asked), done.stderr
    assert (tmp_path / "args").read_text().split() == ["train", "my.toml", "--seed", "3", "--resume"]
