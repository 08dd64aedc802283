"""Tests of `make gpu` without a GPU: a rehearsal of all steps, their limits, selections and requirements."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types

import pytest
import torch
import warm_forks
from _pytest.mark.expression import Expression
from interpreter import ENVIRONMENT

from bclip_fast.benchmarks import cases, measure
from bclip_fast.benchmarks.gpu import __main__ as command
from bclip_fast.benchmarks.gpu import needs, runner, summary
from bclip_fast.benchmarks.gpu.steps import LAYERS, LOSSES, ROOT, Setting, can_import, environment, steps


def rehearse_in_processes(monkeypatch):
    """The command as `make gpu-rehearsal` runs it. Each of seventeen processes imports torch."""
    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu", "--rehearse"], cwd=ROOT)
    return done.returncode


def rehearse_in_forks(monkeypatch):
    """The same command lines, in processes that start with torch."""
    server = warm_forks.Server(OPENBLAS_CORETYPE=ENVIRONMENT["OPENBLAS_CORETYPE"])
    try:
        options = {name: getattr(subprocess, name) for name in ("DEVNULL", "STDOUT", "TimeoutExpired")}
        monkeypatch.setattr(runner, "subprocess", types.SimpleNamespace(Popen=server.popen, **options))
        return command.main(["--rehearse"])
    finally:
        server.close()


@pytest.mark.slow
@pytest.mark.parametrize("rehearse", [rehearse_in_forks, pytest.param(rehearse_in_processes, marks=pytest.mark.long)])
def test_rehearsal_runs_every_step(rehearse, tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("PYTEST_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OUT", str(tmp_path))
    status = rehearse(monkeypatch)
    assert status == 0, (tmp_path / "gpu.log").read_text()[-20_000:]
    log = (tmp_path / "gpu.log").read_text()
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
    # A kernel of torch is a rival, even as one of our backends.
    rows.append({**common, "contender": "ours:sdpa_cudnn", "seconds": 0.01})
    assert summary.figures(rows) == [["attention-vit", "cuda", "20.000", "sdpa_cudnn", "0.50", "40%", "1e-03"]]
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
