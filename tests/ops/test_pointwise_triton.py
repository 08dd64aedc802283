"""The pointwise operators in Triton without a GPU: interpreted, and compiled ahead of time for sm_80 and sm_90."""

from __future__ import annotations

from pathlib import Path

import formulas
import launches
import pytest
import torch
import torch.nn.functional as F
from inside import num_passed
from interpreter import ENVIRONMENT, RUNS_KERNELS, compiled, interpreted
from judged import joined
from oracle import assert_as_accurate_as_eager
from resources import CAPABILITIES, compiled_resources

from bclip_fast import ops
from bclip_fast.ops.pointwise import LIMITS, reference

pytest.importorskip("triton")
ours = pytest.importorskip("bclip_fast.ops.pointwise.triton")


@compiled
def test_suite_passes_under_the_interpreter():
    """Runs the tests that this file marks as interpreted, and the tests with few rows that take a backend."""
    assert num_passed(["test_pointwise.py", Path(__file__).name], "triton and not 197", **ENVIRONMENT) >= 15


@interpreted
@pytest.mark.parametrize("stream_dtype", [torch.float32, torch.float16], ids=str)
def test_triton_float16_branch_is_as_accurate_as_eager(stream_dtype, nan_filled):
    """The branch is float16, the stream float32 or float16, and both results of the norm are used."""
    seed = torch.tensor(-(2**40) + 5)
    options = {"dropout_p": 0.3, "seed": seed, "post": True, "dtype": torch.float16}

    def kernel(*tensors):
        return joined([part.float() for part in ops.add_norm(*tensors, 1e-6, **options, backend="triton")])

    def definition(*tensors):
        normed, _ = reference.add_norm(*tensors, 1e-6, 0.3, seed)
        rounded = normed.half() if tensors[0].dtype == stream_dtype else normed
        return joined([rounded, normed]).to(torch.float64 if normed.dtype == torch.float64 else torch.float32)

    def draw():
        tensors = torch.randn(37, 50).to(stream_dtype), torch.randn(37, 50).half()
        return [*tensors, torch.rand(50) + 0.5, torch.randn(50)]

    assert_as_accurate_as_eager(kernel, definition, draw, formulas.add_norm(1e-6, 0.3, seed, True, torch.float16))


@interpreted
def test_triton_dropout_drops_the_elements_of_the_reference():
    seed = torch.tensor(2**62 + 3)
    stream, branch = torch.zeros(19, 70), torch.ones(19, 70)
    _, total = ops.add_norm(stream, branch, stream[0], stream[0], 1e-6, dropout_p=0.4, seed=seed, backend="triton")
    assert torch.equal(total > 0, reference.dropout_mask(19, 70, 0.4, seed))


@interpreted
def test_triton_more_rows_than_programs_are_as_accurate_as_eager(monkeypatch):
    """Each program takes several rows, and some take more than others."""
    monkeypatch.setattr(ours, "MAX_PROGRAMS", 3)
    assert_as_accurate_as_eager(
        lambda x, w, b: ops.add_norm(x, None, w, b, 1e-6, backend="triton")[0],
        lambda x, w, b: F.layer_norm(x, (12,), w, b, 1e-6),
        lambda: [torch.randn(41, 12), torch.rand(12) + 0.5, torch.randn(12)],
        None,
    )


def test_limits_give_reasons():
    limits = LIMITS["triton"]
    assert "9000" in limits(torch.ones(1, 9000), torch.ones(9000))
    assert "float64" in limits(torch.ones(2, 4, dtype=torch.float64))
    assert (limits(torch.ones(1, 9000)) is None) if RUNS_KERNELS else "cpu" in limits(torch.ones(2, 4))


@compiled
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dim", [768, 1024, 8192])
@pytest.mark.parametrize("name", ["_add_norm_kernel", "_add_norm_backward_kernel"])
def test_norm_kernels_compile_without_spills(name, dim, capability, tmp_path):
    assert compiled_resources(*launches.add_norm(name, dim), capability, tmp_path).spilled == 0


@compiled
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", ["_gelu_kernel", "_gelu_backward_kernel"])
def test_gelu_kernels_compile_without_spills(name, capability, tmp_path):
    assert compiled_resources(*launches.gelu(name), capability, tmp_path).spilled == 0
