"""Slurm: the variables of a task, and the script that requeues a run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import records
from synthetic import tiny_run

from bclip_fast import distributed
from bclip_fast.config import CONFIGS, to_toml


def test_slurm_variables_become_launcher_variables(monkeypatch: pytest.MonkeyPatch):
    task = {
        "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "2", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8",
        "SLURM_STEP_NUM_TASKS": "8", "SLURM_JOB_NODELIST": "login1,gpu[03-04]", "SLURM_STEP_NODELIST": "gpu[03-04]",
    }  # fmt: skip
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    variables = distributed.slurm_variables(task)
    assert variables == {
        "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu03",
        "MASTER_PORT": str(12000 + (4711 * 31 + 2) % 20000),
    }  # fmt: skip
    chosen = distributed.slurm_variables(task | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"})
    assert (chosen["MASTER_ADDR"], chosen["MASTER_PORT"]) == ("10.0.0.1", "1234")
    # A task that sees only one GPU numbers it 0.
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert distributed.slurm_variables(task)["LOCAL_RANK"] == "0"
    # torchrun under srun, a single task, and the batch script itself get no variables.
    assert distributed.slurm_variables(task | {"RANK": "0"}) == {}
    assert distributed.slurm_variables(task | {"SLURM_STEP_NUM_TASKS": "1"}) == {}
    assert distributed.slurm_variables({key: task[key] for key in task if "STEP" not in key}) == {}


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node7", "node7"), ("gpu[03-07,9]-ib,login1", "gpu03-ib"), ("a[12],b", "a12"), ("x1,x2", "x1"),
        ("rack[2-3]node[08,10]", "rack2node08"),
    ],
)  # fmt: skip
def test_first_host_is_read_from_slurm_list(nodes: str, host: str):
    assert distributed.first_host(nodes) == host


# srun with two tasks. As soon as the file of SIGNAL_AFTER has content, it sends SIGUSR1, like sbatch --signal=USR1.
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
    """Run the package's script with stubs of Slurm's programs. Return its result, and scontrol's first argument."""
    folder.mkdir()
    scripts = {
        "srun": SRUN.format(python=sys.executable),
        "scontrol": f'#!/bin/sh\necho "$@" > {folder}/request\n',
        "bclip": f"#!/bin/sh\n{bclip}\n",
    }
    for name, text in scripts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    job = str(os.getpid())
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "RANK"))}
    environment |= {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": job, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        ["bash", str(CONFIGS / "slurm.sbatch"), *args],
        env=environment, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    request = folder / "request"
    return result, request.read_text().split()[0] if request.is_file() else ""


def test_slurm_script_trains_on_two_tasks_until_signal(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """At the signal, the run writes a checkpoint and the script requeues the job."""
    run = tmp_path / "run"
    config = tiny_run(run, shards, max_steps=100_000)
    (tmp_path / "config.toml").write_text(to_toml(config))
    monkeypatch.setenv("SIGNAL_AFTER", str(run / "metrics.jsonl"))
    bclip = f'exec {sys.executable} -m bclip_fast.cli "$@"'
    result, request = _sbatch(tmp_path / "bin", bclip, str(tmp_path / "config.toml"))
    assert (result.returncode, request) == (75, "requeue"), result.stderr
    events, steps = records(run, "events.jsonl"), records(run)
    assert (events[0]["event"], events[0]["ranks"]) == ("start", 2)
    assert events[-1]["event"] == "checkpoint"
    assert [line["step"] for line in steps] == list(range(1, len(steps) + 1))
    assert (run / "checkpoints" / f"step-{len(steps):08d}").is_dir()
    assert all(line["communication_seconds"] >= 0 for line in steps[1:])
    # Only rank 0 logs.
    assert result.stderr.count("training on 96 samples") == 1


@pytest.mark.parametrize(("status", "asked"), [(75, "requeue"), (2, ""), (0, "")])
def test_slurm_script_requeues_only_stopped_run(tmp_path: Path, status: int, asked: str):
    done, request = _sbatch(tmp_path / "bin", f'echo "$@" > {tmp_path}/args; exit {status}', "my.toml", "--seed", "3")
    assert (done.returncode, request) == (status, asked), done.stderr
    assert (tmp_path / "args").read_text().split() == ["train", "my.toml", "--seed", "3", "--resume"]
