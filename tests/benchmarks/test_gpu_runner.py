"""Tests of the runner of `make gpu`: limits, processes, signals and outcomes of its steps."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from bclip_fast.benchmarks.gpu import __main__ as command
from bclip_fast.benchmarks.gpu import needs, runner
from bclip_fast.benchmarks.gpu.steps import Setting, Step


def plan_of(*codes):
    return [Step(name, [sys.executable, "-c", code], seconds, "") for name, code, seconds in codes]


def test_main_failing_step_runs_and_reports_the_rest(monkeypatch, capsys, tmp_path):
    codes = (
        ("first", "pass", 9),
        ("second", "print('why'); import sys; sys.exit(3)", 9),
        ("third", "import time; time.sleep(60)", 1),
    )
    monkeypatch.setattr(command, "steps", lambda setting: plan_of(*codes))
    monkeypatch.setattr(command, "environment", lambda setting: {})
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(
        runner.Process, "wait", lambda self, limit, wait=runner.Process.wait: wait(self, min(limit, 2.0))
    )
    assert command.main([]) == 2
    output = capsys.readouterr().out
    assert "== first: ok" in output
    assert "== second: FAILED: exit status 3" in output
    assert "why" in output
    assert "== third: FAILED: stopped after" in output
    assert "failed: second, third" in output
    log = (tmp_path / "gpu.log").read_text()
    assert log.index("==== first") < log.index("==== second") < log.index("why") < log.index("==== third")
    assert [outcome["name"] for outcome in json.loads((tmp_path / "steps.json").read_text())] == [
        "first",
        "second",
        "third",
    ]
    assert "stopped after" in (tmp_path / "table.txt").read_text()


def test_step_uses_time_that_earlier_steps_left_over(tmp_path, monkeypatch):
    limits, now = [], [0.0]

    def wait(self, limit):
        limits.append(limit)
        now[0] += 4.0
        self.process.kill()
        self.process.wait()
        return ""

    monkeypatch.setattr(runner, "monotonic", lambda: now[0])
    monkeypatch.setattr(runner.Process, "wait", wait)
    runner.run_steps(plan_of(("one", "pass", 10), ("two", "pass", 5), ("three", "pass", 1)), Setting(tmp_path), {})
    assert limits == [10, 11, 8]


def test_step_beside_others_ends_with_the_next_one(tmp_path):
    slow, fast = plan_of(("slow", "print('warm')", 60), ("fast", "pass", 60))
    slow = Step(slow.name, slow.command, slow.seconds, "", beside=True)
    outcomes = runner.run_steps([slow, fast], Setting(tmp_path), dict(os.environ))
    assert [(outcome.name, outcome.failure) for outcome in outcomes] == [("fast", ""), ("slow", "")]
    assert "warm" in (tmp_path / "gpu.log").read_text()


def test_step_without_selected_tests_fails(tmp_path):
    """So does a step with a wrong option."""
    setting = Setting(tmp_path, rehearsal=True)
    files = ["tests/ops/test_dispatch.py", "tests/ops/test_processor.py"]
    plan = [
        Step("one file", setting.pytest(files, "required"), 1, ""),
        Step("option", [*setting.pytest(files[:1], "required"), "--no-such-option"], 1, ""),
    ]
    outcomes = runner.run_steps(plan, setting, dict(os.environ))
    assert [outcome.failure for outcome in outcomes] == ["exit status 4", "exit status 4"]
    assert "no test is selected in" in (tmp_path / "gpu.log").read_text()


def test_step_without_its_requirements_does_not_run(tmp_path, monkeypatch):
    monkeypatch.setitem(needs.PROGRAMS, "gpu", lambda: False)
    plan = [Step("optional", ["no-such-program"], 1, "", ("no_such_module",)), Step("required", [], 1, "", ("gpu",))]
    outcomes = runner.run_steps(plan, Setting(tmp_path), {})
    assert [(one.failure, one.skipped) for one in outcomes] == [("", "no no_such_module"), ("no gpu", "")]
    rehearsed = runner.run_steps(plan[:1], Setting(tmp_path, rehearsal=True), {})
    assert rehearsed[0].failure == "no no_such_module"


def test_signal_ends_steps_and_keeps_the_table(tmp_path):
    """The steps' processes die too, also one beside another step."""
    code = """
import os, sys
from bclip_fast.benchmarks.gpu import __main__ as command
from bclip_fast.benchmarks.gpu.steps import Step
sleep = "import os, time; open({!r}, 'w').write(str(os.getpid())); time.sleep(99)"
steps = [Step("done", [sys.executable, "-c", "pass"], 99, "")]
for name, beside in (("beside", True), ("running", False)):
    path = os.path.join(os.environ["OUT"], name)
    steps.append(Step(name, [sys.executable, "-c", sleep.format(path)], 99, "", beside=beside))
steps.append(Step("late", [sys.executable, "-c", "pass"], 99, ""))
command.steps = lambda setting: steps
command.environment = lambda setting: {}
sys.exit(command.main([]))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "OUT": str(tmp_path)}, stdout=subprocess.PIPE, text=True
    )
    files = [tmp_path / "beside", tmp_path / "running"]
    while not all(file.is_file() and file.read_text() for file in files):
        assert process.poll() is None
        time.sleep(0.02)
    process.terminate()
    output = process.communicate()[0]
    assert process.returncode == 3, output
    outcomes = {one["name"]: one["failure"] for one in json.loads((tmp_path / "steps.json").read_text())}
    stopped = "stopped by SIGTERM"
    assert outcomes == {"done": "", "beside": stopped, "running": stopped, "late": f"not run, {stopped}"}
    assert stopped in (tmp_path / "table.txt").read_text()
    assert not any(alive(int(file.read_text())) for file in files)


def test_run_under_nohup_ignores_a_hangup(tmp_path):
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        plan = plan_of(("hangup", "import os, signal; os.kill(os.getppid(), signal.SIGHUP)", 60))
        assert runner.run_steps(plan, Setting(tmp_path), {})[0].failure == ""
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_outcome_names_the_signal_that_killed_a_step(tmp_path):
    plan = plan_of(("killed", "import os; os.kill(os.getpid(), 9)", 60))
    assert runner.run_steps(plan, Setting(tmp_path), {})[0].failure == "killed by SIGKILL"


def test_counts_of_an_unfinished_report_are_unknown(tmp_path):
    path = tmp_path / "report.xml"
    assert runner.counts(path) is None
    path.write_text('<?xml version="1.0"?><testsuites><testsuite tests="3"')
    assert runner.counts(path) is None


def alive(pid):
    """Return whether a process runs. A zombie does not, because a container's first process may not reap it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_process_timeout_kills_grandchildren(tmp_path):
    """A sanitizer starts the program in a new process."""
    pid_file = tmp_path / "pid"
    child = f"import os, time; open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(99)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    process = runner.Process(Step("slow", [sys.executable, "-c", code], 3, ""), os.environ, tmp_path / "log")
    assert process.wait(3) == "stopped after 3 s"
    deadline = time.monotonic() + 20
    while alive(pid_file.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    nothing = runner.Process(Step("none", ["compute-sanitizer-that-isn't-there"], 3, ""), os.environ, tmp_path / "log")
    assert "No such file" in nothing.wait(3)
