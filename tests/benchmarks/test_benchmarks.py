"""Tests of the benchmark suite: the truth of contrastive cases, refusals, errors, tables and plots."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from fake_cuda import CUDA, fake_cuda
from towers import SMALL

from bclip_fast.benchmarks import cases, measure, report, step
from bclip_fast.benchmarks.cases import attention, contrastive, matmul, pointwise
from bclip_fast.benchmarks.cases.attention import attention_case, varlen_case
from bclip_fast.benchmarks.cases.model import StepConfig
from bclip_fast.benchmarks.cases.pointwise import norm_case
from bclip_fast.ops import use_backend
from bclip_fast.ops.contrastive import reference

no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU peer may run here")


def small(monkeypatch, maker, dtype=torch.float32):
    """Return a case with 8 copies of 5 pairs, built like those of large batches."""
    monkeypatch.setattr(contrastive, "LARGEST_DENSE", 5)
    return maker(40, 24, dtype)


@pytest.mark.parametrize(
    ("maker", "dense"),
    [(contrastive.contrastive_case, reference.dense), (contrastive.siglip_case, reference.dense_siglip)],
)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_truth_by_symmetry_equals_dense_truth(maker, dense, dtype, monkeypatch):
    case = small(monkeypatch, maker, dtype)
    inputs = case.make_inputs()
    assert len(torch.unique(inputs[0].detach(), dim=0)) == 40, "all pairs must be different"
    double = [value.detach().double().requires_grad_() for value in inputs]
    for value, true in zip(measure.truth_of(case, inputs), cases.with_gradients(dense)(*double), strict=True):
        torch.testing.assert_close(value, true, rtol=1e-12, atol=1e-14)


def test_num_copies_batch_is_not_a_power_of_two_raises():
    assert [contrastive.num_copies(batch) for batch in (1, 8192, 16384, 65536)] == [1, 1, 2, 8]
    for batch in (8193, 24576):
        with pytest.raises(AssertionError, match="power of two"):
            contrastive.num_copies(batch)


@pytest.mark.parametrize("maker", [contrastive.contrastive_case, contrastive.siglip_case])
def test_contenders_error_is_rounding(maker, monkeypatch):
    case = small(monkeypatch, maker)
    inputs = case.make_inputs()
    truth = measure.truth_of(case, inputs)
    for name in ("ours:cpu", "ours:reference", "torch dense"):
        assert measure.error_of(case.contenders[name]()(*inputs), truth) < 2e-6


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_layer_contenders_error_is_rounding(dropout_p):
    """A contender that the limits refuse is unavailable, and no other one is wrong or raises."""
    made = [norm_case(10, 24, dropout_p)]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        made.append(attention_case("images", 2, 5, 1, 32, dtype, dropout_p))
        made.append(varlen_case("captions", [3, 1, 5], 1, 32, dtype, dropout_p))
    for case in made:
        inputs, errors = case.make_inputs(), {}
        for name, make in case.contenders.items():
            try:
                contender = make()
            except cases.Unavailable:
                continue
            errors[name] = measure.error_of(contender(*inputs), measure.truth_of(case, inputs))
        assert "ours:reference" in errors
        assert max(errors.values()) < (1e-5 if case.dtype == torch.float32 else 0.03), (case.id, errors)


@pytest.fixture
def simulated_gpu(monkeypatch):
    """The benchmarks measure the simulated GPU of support/fake_cuda.py, by the reference and by torch."""
    for module in (attention, contrastive, matmul, pointwise, measure, step):
        monkeypatch.setattr(module, "DEVICE", CUDA)
    numbers = {"memory_allocated": 0, "max_memory_allocated": 0, "mem_get_info": (2**40, 2**40)}
    for name, value in numbers.items():
        monkeypatch.setattr(torch.cuda, name, lambda device=None, value=value: value)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device=None: None)
    with fake_cuda() as fake, use_backend("reference"):
        yield fake


def test_cases_on_a_gpu_leave_nothing_on_the_host(simulated_gpu):
    """An operation that mixes devices raises an error. Autocast is not simulated, so `linear` is left out."""
    half = torch.float16
    made = [contrastive.contrastive_case(40, 24, half), contrastive.siglip_case(40, 24, half), norm_case(10, 24, 0.1)]
    made += [attention_case("images", 2, 5, 1, 32, half, 0.1), varlen_case("captions", [3, 1, 5], 1, 32, half)]
    num_runs = 0
    for one in made:
        inputs = one.make_inputs()
        assert {tensor.device.type for tensor in inputs} == {"cuda"}, one.id
        for name in {"ours:reference", "torch dense", "torch sdpa", "torch sdpa padded"} & set(one.contenders):
            contender = measure.synchronised(one.contenders[name]())
            extra_bytes, results = measure.peak_extra_bytes(lambda run=contender, inputs=inputs: run(*inputs))
            assert extra_bytes == 0
            assert measure.error_of(results, measure.truth_of(one, inputs)) < 0.01
            num_runs += 1
    assert num_runs == 9


def test_step_runs_on_a_gpu(simulated_gpu, tmp_path, monkeypatch, capsys):
    """The host measures every variant of ours, with its improvements turned on one by one."""
    lengths = tmp_path / "lengths"
    lengths.write_text("5 1\n9 1\n")
    monkeypatch.setattr(measure, "MATMUL_SIZE", 64)
    monkeypatch.setattr(step, "preset", lambda name: SMALL)
    config = StepConfig("small", 2, "fp32", lengths=str(lengths), rounds=1, open_clip=False)
    rows = step.measure_step(config)
    step.show_step(rows)
    names = [row["contender"] for row in rows]
    assert (len(names), names[0], names[-1]) == (10, "ours, padded, plain PyTorch", "ours, checkpointed")
    assert "+ fused AdamW" in capsys.readouterr().out


@no_cuda
def test_gpu_peers_without_gpu_are_unavailable():
    softmax, sigmoid = (make(64, 16, torch.float32) for make in (contrastive.contrastive_case, contrastive.siglip_case))
    peers = softmax.contenders["inf-cl x2"], softmax.contenders["memeff"], sigmoid.contenders["siglip-kernel"]
    for make_peer in peers:
        with pytest.raises(cases.Unavailable, match="needs CUDA"):
            make_peer()


def test_dense_contender_matrices_exceed_free_memory_is_unavailable(monkeypatch):
    monkeypatch.setattr(contrastive, "free_bytes", lambda: 20 * 2**30)
    large = contrastive.contrastive_case(65536, 512, torch.float32)
    with pytest.raises(cases.Unavailable, match="4 matrices of 65536 x 65536 float32 are about 64 GiB, and 20 GiB"):
        large.contenders["torch dense"]()
    contrastive.contrastive_case(8192, 512, torch.float32).contenders["torch dense"]()
    assert 0 < measure.peak_extra_bytes(lambda: torch.ones(1 << 23))[0] < 2**30


def test_error_of_ignores_missing_and_refuses_wrong_results():
    without_scale = cases.with_gradients(lambda image, text, scale: reference.dense(image, text, 3.0), num_constants=1)
    inputs = [torch.randn(4, 3, requires_grad=True) for _ in range(2)] + [torch.tensor(3.0, requires_grad=True)]
    results, truth = without_scale(*inputs), cases.with_gradients(reference.dense)(*inputs)
    assert results[3] is None and measure.error_of(results, truth) < 1e-6
    with pytest.raises(AssertionError, match="the numbers are wrong"):
        measure.error_of([*results[:2], 2 * results[2], None], truth)
    with pytest.raises(ValueError, match="longer than"):
        measure.error_of(results[:3], truth)


def row(contender, batch, seconds, extra_bytes, **others):
    common = dict(device="d", threads="1", torch="t", operator="contrastive", flops=1e9, bytes=1e6, error=1e-6)
    common |= dict(matmul_flops_per_second=1e10, matmul_dtype="float32", dtype="float32")
    common |= dict(curve="clip, float32", num_results=4, num_compared=4)
    return {
        **common, "case": f"clip-{batch}", "contender": contender, "batch": batch, "seconds": seconds,
        "extra_bytes": extra_bytes, **others,
    }  # fmt: skip


def test_table_shows_ratios_to_open_clip_and_compared_results(capsys):
    report.show(
        [
            row("ours:cpu", 64, 0.2, 1e6),
            row("open_clip", 64, 0.5, 20e6),
            row("memeff", 64, 0.25, None, num_compared=3),
            row("ours:cpu", 128, 0.8, 2e6),
            row("torch dense", 128, 1.2, 4e6),
        ]
    )
    lines = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    cells = {tuple(cell.strip() for cell in line) for line in lines}
    assert ("ours:cpu", "200.00", "0.40", "5 GFLOP/s", "50%", "1", "0.05", "1.0e-06") in cells
    assert ("memeff", "250.00", "0.50", "4 GFLOP/s", "40%", "", "", "1.0e-06 (3 of 4)") in cells
    assert ("torch dense", "1200.00", "1.50", "1 GFLOP/s", "8%", "4", "2.00", "1.0e-06") in cells


def test_matmul_rate_without_bf16_instructions_is_float32(monkeypatch, capsys):
    monkeypatch.setattr(measure, "MATMUL_SIZE", 64)
    for has_bf16, expected in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(measure, "lacks_bfloat16", lambda device, lacks=not has_bf16: lacks)
        assert measure.matmul_rate(torch.float32)["matmul_dtype"] == "float32"
        rate = measure.matmul_rate(torch.bfloat16)
        assert rate["matmul_dtype"] == expected and rate["matmul_flops_per_second"] > 0
        report.show([row("ours:cpu", 64, 0.2, 1e6, **rate | {"dtype": "bfloat16"})])
        assert ("no bf16 instructions" in capsys.readouterr().out) == (not has_bf16)
    rate = measure.matmul_rate(torch.float16)
    assert rate["matmul_dtype"] == "float32", "torch emulates float16 products on a CPU"
    report.show([row("ours:cpu", 64, 0.2, 1e6, **rate | {"dtype": "float16"})])
    assert "no fp16 instructions" in capsys.readouterr().out


def test_plot_scaling_draws_every_curve(tmp_path):
    rows = [row(name, batch, batch / 1e3, 1e6) for name in ("ours:cpu", "open_clip") for batch in (64, 128)]
    report.plot_scaling([*rows, row("memeff", 64, 1.0, None, curve="clip, bfloat16")], tmp_path / "scaling.svg")
    svg = (tmp_path / "scaling.svg").read_text()
    for words in ("clip, float32", "clip, bfloat16", "peak extra memory", "memeff"):
        assert f"<!-- {words}" in svg


TINY = """
import pathlib, sys, torch
from bclip_fast.benchmarks import cases, measure, report
from bclip_fast.benchmarks.cases import contrastive
contrastive.LARGEST_DENSE = 32
measure.MATMUL_SIZE = 64
cases.CASES[:] = [contrastive.contrastive_case(batch, 16, torch.float32) for batch in (32, 64)]
only, large = sys.argv[2:]
sys.exit(report.run(report.BenchConfig("contrastive", pathlib.Path(sys.argv[1]), only=only, large=large == "large")))
"""


@no_cuda
def test_suite_selection_measures_only_selected(tmp_path):
    def bench(only, large):
        # pytest-benchmark measures nothing in a worker of pytest-xdist.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        command = [sys.executable, "-c", TINY, tmp_path, only, large]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        written = tmp_path / "bench.jsonl"
        return done, [json.loads(line) for line in written.read_text().splitlines()] if written.exists() else []

    done, rows = bench("64 and cpu", "")
    assert "takes minutes per call: --large" in done.stdout and "UserError: no results for" in done.stderr and not rows
    done, rows = bench("cpu or dense", "large")
    assert done.returncode == 0, done.stdout + done.stderr
    measured = [(row["contender"], row["batch"], row["curve"]) for row in rows]
    names = ("ours:cpu", "torch dense")
    assert measured == [(name, batch, "clip, float32") for batch in (32, 64) for name in names]
    for row in rows:
        assert 0 < row["error"] < 1e-5 and row["num_compared"] == row["num_results"] == 4
        assert (row["min"] == row["seconds"] == row["max"]) == (row["batch"] == 64), "a large case must run once"
