"""The benchmark's own arithmetic: what it calls true, what it refuses, and what its table says."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from bclip_fast.benchmarks import cases, measure, report
from bclip_fast.ops.contrastive import reference

no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="a rival may run here")


def small(monkeypatch, maker, dtype=torch.float32):
    """A case of 8 copies of 5 pairs, as large ones are built."""
    monkeypatch.setattr(cases, "LARGEST_DENSE", 5)
    return maker(40, 24, dtype)


@pytest.mark.parametrize(
    ("maker", "dense"), [(cases.contrastive_case, reference.dense), (cases.siglip_case, reference.dense_siglip)]
)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_the_truth_by_symmetry_is_the_dense_one(maker, dense, dtype, monkeypatch):
    case = small(monkeypatch, maker, dtype)
    inputs = case.make_inputs()
    assert len(torch.unique(inputs[0].detach(), dim=0)) == 40, "every pair is a different one"
    double = [value.detach().double().requires_grad_() for value in inputs]
    for own, true in zip(measure.truth_of(case, inputs), cases.with_gradients(dense)(*double), strict=True):
        torch.testing.assert_close(own, true, rtol=1e-12, atol=1e-14)


def test_large_batches_are_powers_of_two_times_a_small_problem():
    assert [cases.num_copies(batch) for batch in (1, 8192, 16384, 65536)] == [1, 1, 2, 8]
    for batch in (8193, 24576):
        with pytest.raises(AssertionError, match="power of two"):
            cases.num_copies(batch)


@pytest.mark.parametrize("maker", [cases.contrastive_case, cases.siglip_case])
def test_what_can_run_agrees_with_the_truth(maker, monkeypatch):
    case = small(monkeypatch, maker)
    inputs = case.make_inputs()
    truth = measure.truth_of(case, inputs)
    for name in ("ours:cpu", "ours:reference", "torch dense"):
        assert measure.error_of(case.contenders[name]()(*inputs), truth) < 2e-6


@no_cuda
def test_rivals_for_gpus_say_that_there_is_none():
    case, sigmoid = cases.contrastive_case(64, 16, torch.float32), cases.siglip_case(64, 16, torch.float32)
    for made in (case.contenders["inf-cl x2"], case.contenders["memeff"], sigmoid.contenders["siglip-kernel"]):
        with pytest.raises(cases.Unavailable, match="needs CUDA"):
            made()


def test_a_dense_rival_is_refused_where_its_matrices_exceed_the_free_memory(monkeypatch):
    monkeypatch.setattr(cases, "free_bytes", lambda: 20 * 2**30)
    large = cases.contrastive_case(65536, 512, torch.float32)
    with pytest.raises(cases.Unavailable, match="4 matrices of 65536 x 65536 float32 are about 64 GiB, and 20 GiB"):
        large.contenders["torch dense"]()
    cases.contrastive_case(8192, 512, torch.float32).contenders["torch dense"]()
    assert 0 < measure.peak_extra_bytes(lambda: torch.ones(1 << 23))[0] < 2**30


def test_a_result_that_a_rival_does_not_compute_is_left_out_and_a_wrong_one_is_an_error():
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


def test_the_table_holds_ratios_to_open_clip_and_says_what_was_compared(capsys):
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


def test_matmul_rate_without_bf16_instructions_is_of_float32_and_the_table_says_so(monkeypatch, capsys):
    monkeypatch.setattr(measure, "MATMUL_SIZE", 64)
    for has_bf16, expected in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(measure, "lacks_bfloat16", lambda device, lacks=not has_bf16: lacks)
        assert measure.matmul_rate(torch.float32)["matmul_dtype"] == "float32"
        found = measure.matmul_rate(torch.bfloat16)
        assert found["matmul_dtype"] == expected and found["matmul_flops_per_second"] > 0
        report.show([row("ours:cpu", 64, 0.2, 1e6, **found | {"dtype": "bfloat16"})])
        assert ("no bf16 instructions" in capsys.readouterr().out) == (not has_bf16)


def test_time_and_memory_are_drawn_against_the_batch(tmp_path):
    rows = [row(name, batch, batch / 1e3, 1e6) for name in ("ours:cpu", "open_clip") for batch in (64, 128)]
    report.plot_scaling([*rows, row("memeff", 64, 1.0, None, curve="clip, bfloat16")], tmp_path / "scaling.svg")
    drawn = (tmp_path / "scaling.svg").read_text()
    for words in ("clip, float32", "clip, bfloat16", "peak extra memory", "memeff"):
        assert f"<!-- {words}" in drawn


TINY = """
import pathlib, sys, torch
from bclip_fast.benchmarks import cases, measure, report
cases.LARGEST_DENSE = 32
measure.MATMUL_SIZE = 64
cases.CASES[:] = [cases.contrastive_case(batch, 16, torch.float32) for batch in (32, 64)]
only, large = sys.argv[2:]
sys.exit(report.run(report.BenchConfig("contrastive", pathlib.Path(sys.argv[1]), only=only, large=large == "large")))
"""


@no_cuda
def test_the_suite_measures_what_it_is_asked_for(tmp_path):
    def bench(only, large):
        # As a worker of xdist's, pytest-benchmark measures nothing.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        command = [sys.executable, "-c", TINY, tmp_path, only, large]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        written = tmp_path / "bench.jsonl"
        return done, [json.loads(line) for line in written.read_text().splitlines()] if written.exists() else []

    done, rows = bench("64 and cpu", "")
    assert "takes minutes a call: --large" in done.stdout and "UserError: no figure for" in done.stderr and not rows
    done, rows = bench("cpu or dense", "large")
    assert done.returncode == 0, done.stdout + done.stderr
    measured = [(row["contender"], row["batch"], row["curve"]) for row in rows]
    names = ("ours:cpu", "torch dense")
    assert measured == [(name, batch, "clip, float32") for batch in (32, 64) for name in names]
    for row in rows:
        assert 0 < row["error"] < 1e-5 and row["num_compared"] == row["num_results"] == 4
        assert (row["min"] == row["seconds"] == row["max"]) == (row["batch"] == 64), "measured once where large"
