"""Tests of `make gpu` without a GPU: a rehearsal of all steps, their limits, selections and outcomes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from _pytest.mark.expression import Expression

from bclip_fast.benchmarks import cases, measure
from bclip_fast.benchmarks.gpu import __main__ as command
from bclip_fast.benchmarks.gpu import needs, runner, summary
from bclip_fast.benchmarks.gpu.steps import LAYERS, LOSSES, ROOT, Setting, Step, can_import, environment, steps


@pytest.mark.slow
def test_rehearsal_runs_every_step(tmp_path):
    """It needs a minute: seventeen processes, each of which imports torch."""
    program = [sys.executable, "-m", "benchmarks.gpu", "--rehearse"]
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(program, cwd=ROOT, env={**variables, "OUT": str(tmp_path)}, capture_output=True, text=True)
    log = (tmp_path / "gpu.log").read_text()
    assert done.returncode == 0, done.stdout + done.stderr + log[-20_000:]
    plan = [step.name for step in steps(Setting(tmp_path, rehearsal=True))]
    outcomes = {outcome["name"]: outcome for outcome in json.loads((tmp_path / "steps.json").read_text())}
    assert sorted(outcomes) == sorted(plan)
    assert all(f"==== {name}: " in log for name in plan)
    assert [name for name, one in outcomes.items() if one["tests"] and not one["tests"]["passed"]] == ["dali"]
    rows = summary.read_rows(tmp_path)
    assert {row["operator"] for row in rows} == {"contrastive", "attention", "affine", "pointwise", "step"}
    assert (tmp_path / "tuning.json").is_file()
    # A lent machine returns at most eight files.
    assert len(list(tmp_path.iterdir())) <= 8


@pytest.fixture
def setting(tmp_path):
    return Setting(tmp_path / "out")


def test_limits_sum_to_less_than_9_minutes_and_figures_come_first(setting):
    plan = steps(setting)
    assert sum(step.seconds for step in plan if not step.beside) < 9 * 60
    names = [step.name for step in plan]
    assert names[:2] == ["warm-up", "build"]
    assert plan[0].beside, "no limit may include the first import of torch"
    figures, tests = ["losses", "layers", "step"], ["kernels", "operators", "graphs"]
    order = [names.index(name) for name in [*figures, *tests, "memcheck", "racecheck"]]
    assert order == sorted(order)


def test_steps_on_a_gpu_and_in_a_rehearsal_differ_only_in_their_sizes(setting):
    """So a rehearsal checks the command lines."""
    real = {step.name: step for step in steps(setting)}
    rehearsed = {step.name: step for step in steps(Setting(setting.out, rehearsal=True))}
    assert set(rehearsed) - set(real) == {"emulator"}
    extra = ("--dry-run", "--device", "cpu", "cuda", "--sample", "--to", "-n", "--processes", "compute-sanitizer")
    for name, step in real.items():
        words = [
            [word for word in one.command if word not in extra and not word.isdigit()]
            for one in (step, rehearsed[name])
        ]
        words = [[word for word in one if "results" not in word and "fake_sanitizer" not in word] for one in words]
        assert [word for word in words[0] if word != sys.executable] == [
            word for word in words[1] if word != sys.executable
        ]


@pytest.mark.parametrize(
    ("selected", "operators"), [(LOSSES, {"contrastive"}), (LAYERS, {"attention", "affine", "pointwise"})]
)
def test_measured_cases_hold_both_half_precisions_of_every_gpu_backend(selected, operators):
    expression, measured = Expression.compile(selected), set()
    for case in cases.CASES:
        for contender in case.contenders:
            name = f"{case.id}-{contender}"
            if expression.evaluate(lambda word, name=name, **_: word.lower() in name.lower()):
                measured.add((case.operator, case.dtype, contender))
    assert {operator for operator, *_ in measured} == operators
    assert not {contender for *_, contender in measured if "reference" in contender or "compiled" in contender}
    for operator in operators & {"contrastive", "attention"}:
        for dtype in (torch.bfloat16, torch.float16):
            assert {(operator, dtype, f"ours:{backend}") for backend in ("triton", "cuda")} <= measured
    assert torch.float32 not in {dtype for _, dtype, _ in measured}


def test_cases_names_spell_dtypes_as_torch_does():
    for case in cases.CASES:
        assert not {"bf16", "fp16", "fp32"} & set(case.name.split("-")), case.name


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


@pytest.mark.parametrize(("name", "message"), [("gpu", "has no GPU"), ("torch", "make gpu PYTHON=")])
def test_main_without_gpu_or_torch_starts_no_step(monkeypatch, capsys, tmp_path, name, message):
    monkeypatch.setitem(needs.PROGRAMS, "gpu", lambda: name != "gpu")
    monkeypatch.setattr(needs, "is_installed", lambda module: module != name)
    monkeypatch.setattr(command, "run_steps", None)
    monkeypatch.setenv("OUT", str(tmp_path))
    assert command.main([]) == 1
    assert message in capsys.readouterr().out


def test_main_names_out_folder_that_cannot_be_written(monkeypatch, capsys, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr(command, "obstacle", lambda plan, setting: "")
    monkeypatch.setattr(command, "run_steps", None)
    monkeypatch.setenv("OUT", str(tmp_path / "file" / "results"))
    assert command.main([]) == 1
    assert f"OUT={tmp_path / 'file' / 'results'} cannot be written: Not a directory" in capsys.readouterr().out


def test_run_that_may_not_write_recorded_results_writes_rows_to_out(monkeypatch, setting):
    assert setting.folders == [str(setting.out), str(measure.RESULTS)]
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert setting.folders == [str(setting.out)]


def test_tests_run_in_one_process_if_xdist_cannot_be_imported(monkeypatch, tmp_path):
    (tmp_path / "broken_xdist.py").write_text("raise ImportError('execnet')")
    monkeypatch.syspath_prepend(tmp_path)
    assert not can_import("broken_xdist")
    assert can_import("json")
    monkeypatch.setattr(command, "can_import", lambda module: False)
    monkeypatch.setattr(command, "obstacle", lambda plan, setting: "stop" if not setting.parallel else "")
    monkeypatch.setenv("OUT", str(tmp_path))
    assert command.main([]) == 1
    assert "-n" not in " ".join(Setting(tmp_path, parallel=False).pytest(["a.py"], "word")).split()


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


def test_dry_run_names_what_is_missing(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(needs.PROGRAMS, "gpu", lambda: True)
    monkeypatch.setitem(needs.PROGRAMS, "nvcc", lambda: False)
    monkeypatch.setattr(needs, "is_installed", lambda name: name not in ("tyro", "nvidia.dali"))
    assert command.main(["--dry-run"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines["build"].endswith("fails: no nvcc")
    assert lines["trainer"].endswith("does not run: no tyro")
    assert lines["training"].endswith("has all")


def test_programs_of_cuda_are_found_outside_the_path(monkeypatch, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "compute-sanitizer").touch(mode=0o755)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert needs.PROGRAMS["compute-sanitizer"]()
    assert not needs.PROGRAMS["nvcc"]()
    command_line = next(step.command for step in steps(Setting(tmp_path)) if step.name == "memcheck")
    assert command_line[0] == str(tmp_path / "bin" / "compute-sanitizer")


def test_rows_survive_a_killed_process(tmp_path):
    path = tmp_path / "GPU.jsonl"
    measure.append([{"case": "a"}], [path])
    with open(path, "a") as file:
        file.write('{"case": "b", "sec')
    assert summary.read_rows(tmp_path) == [{"case": "a"}]
    sizes = summary.file_sizes(tmp_path)
    measure.append([{"case": "c"}], [path, tmp_path / "Another.jsonl"])
    assert summary.read_rows(tmp_path) == [{"case": "c"}, {"case": "a"}, {"case": "c"}]
    assert summary.read_rows(tmp_path, sizes) == [{"case": "c"}, {"case": "c"}]


def test_commit_without_git_is_unknown(monkeypatch):
    monkeypatch.setenv("PATH", "")
    measure.commit.cache_clear()
    try:
        assert measure.environment()["commit"] == "unknown"
    finally:
        measure.commit.cache_clear()


def test_table_compares_ours_with_the_fastest_rival():
    common = {"operator": "attention", "case": "vit", "flops": 8e9, "matmul_flops_per_second": 1e12, "error": 1e-3}
    times = {"ours:triton": 0.04, "ours:cuda": 0.02, "ours:torch": 0.03, "torch sdpa": 0.05, "ours:reference": 9.0}
    rows = [{**common, "contender": name, "seconds": seconds} for name, seconds in times.items()]
    assert summary.figures(rows) == [["attention-vit", "cuda", "20.000", "torch", "1.50", "40%", "1e-03"]]
    text = summary.table([runner.Outcome("build", "", 3.0), runner.Outcome("dali", "", 0.0, skipped="no DALI")], rows)
    assert "not run: no DALI" in text


def test_environment_builds_only_for_the_machines_gpu(tmp_path, monkeypatch):
    """Without nvidia-smi for the shipped architectures, and without libjpeg's headers without the decoder."""
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("BCLIP_CUDA_ARCHS", "BCLIP_JPEG"):
        monkeypatch.delenv(name, raising=False)
    variables = environment(Setting(tmp_path))
    assert (variables["BCLIP_CUDA_ARCHS"], variables["BCLIP_JPEG"]) == ("80;90a", "0")
    program = tmp_path / "nvidia-smi"
    for capability, expected in (("9.0", "90a"), ("8.9", "89"), ("[N/A]", "80;90a")):
        program.write_text(f"#!/bin/sh\necho '{capability}'\n")
        program.chmod(0o755)
        assert environment(Setting(tmp_path))["BCLIP_CUDA_ARCHS"] == expected


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
