"""Tests of `make gpu` without a GPU: its steps, their time limits, and their commands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import cuda_emulator

from bclip_fast.benchmarks import gpu

ROOT = Path(gpu.__file__).resolve().parents[1]


def test_steps_time_limits_sum_to_less_than_9_minutes():
    assert sum(step.seconds for step in gpu.steps()) < 9 * 60


def test_steps_every_pytest_command_collects_tests():
    """All commands run in one process, which imports torch once.

    Without a GPU, pytest collects the kernels' tests only if the emulator runs them.
    """
    commands = [step.command for step in gpu.steps() if "pytest" in step.command]
    assert len(commands) == 5
    commands += [[*gpu.PYTEST, "benchmarks/bench_operators.py", "-k", gpu.MEASURED]]
    arguments = [[*command[command.index("pytest") + 1 :], "--collect-only"] for command in commands]
    code = f"import pytest, sys; sys.exit(any([pytest.main(arguments) for arguments in {arguments}]))"
    environment = {**os.environ, **cuda_emulator.environment()}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall(r"^\d+(/\d+)? tests collected", done.stdout, re.M)) == len(commands), done.stdout


def test_main_failing_step_runs_and_reports_the_rest(monkeypatch, capsys):
    steps = [("first", "pass", 9), ("second", "import sys; sys.exit(3)", 9), ("third", "import time; time.sleep(9)", 1)]
    plan = [gpu.Step(name, [sys.executable, "-c", code], seconds) for name, code, seconds in steps]
    monkeypatch.setattr(gpu, "steps", lambda: plan)
    assert gpu.main() == 2
    output = capsys.readouterr().out
    assert "first: ok" in output and "second: FAILED (3)" in output and "failed: second, third" in output


def alive(pid):
    """Return whether a process runs. A zombie does not, because a container's first process may not reap it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_run_timeout_kills_grandchildren(tmp_path):
    """A sanitizer starts the program in a new process."""
    pid_file = tmp_path / "pid"
    child = f"import os, time; open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(99)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert "timed out" in gpu.run(gpu.Step("slow", [sys.executable, "-c", code], 3), os.environ)
    deadline = time.monotonic() + 20
    while alive(pid_file.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert "No such file" in gpu.run(gpu.Step("none", ["compute-sanitizer-that-isn't-there"], 3), os.environ)
