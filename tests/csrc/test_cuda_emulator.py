"""Tests of the emulator that runs CUDA kernels on a CPU: its fragments, its sums, and the faults that it reports."""

from __future__ import annotations

import os
import subprocess
import sys

import cuda_emulator
import pytest
import torch


@pytest.fixture(scope="module")
def host():
    return cuda_emulator.module()


# Copied by hand from the PTX ISA's figures of ldmatrix and of mma.m16n8k16 ("Matrix fragments for mma.m16n8k16 with
# floating point type"). Each row lists (lane, number): (5, 2) is a2, b2 or c2 of lane 5.
def row_of(first_lane, numbers):
    return [(first_lane + step, number) for step in range(4) for number in numbers]


FIGURES = {
    "a": [row_of(4 * (row % 8), (0, 1) if row < 8 else (2, 3)) + row_of(4 * (row % 8), (4, 5) if row < 8 else (6, 7))
          for row in range(16)],
    "b": [[(4 * column + row % 8 // 2, row % 2 + row // 8 * 2) for column in range(8)] for row in range(16)],
    "c": [row_of(4 * (row % 8), (0, 1) if row < 8 else (2, 3)) for row in range(16)],
    "plain": [row_of(4 * row, (0, 1)) for row in range(8)],
    "transposed": [[(4 * column + row // 2, row % 2) for column in range(8)] for row in range(8)],
}  # fmt: skip


@pytest.mark.parametrize("fragment", FIGURES)
def test_place_fragments_equal_ptx_manual(host, fragment):
    figure = FIGURES[fragment]
    held = {(lane, number) for row in figure for lane, number in row}
    assert len(held) == len(figure) * len(figure[0])
    for row, numbers in enumerate(figure):
        for column, (lane, number) in enumerate(numbers):
            assert host.place(fragment, lane, number) == (row, column)


def operands():
    return torch.randn(16, 16).half(), torch.randn(16, 16).half(), torch.full((16, 16), torch.nan)


# As in csrc/cuda/emulator/faulty_kernel.h.
FAULTS = ["NONE", "NO_BARRIER", "NO_WAIT", "NO_WARP_BARRIER", "OVERWRITE", "UNWRITTEN", "SHARED_BOUNDS"]
FAULTS += ["GLOBAL_BOUNDS", "LAYOUT", "DIVERGENCE", "MISSING_THREADS"]


def run(host, fault, a, b, c):
    host.run_faulty_kernel(FAULTS.index(fault), a.data_ptr(), b.data_ptr(), c.data_ptr())


@pytest.mark.parametrize("seed", range(5))
def test_no_fault_product_is_correct(host, seed):
    host.set_seed(seed)
    a, b, c = operands()
    run(host, "NONE", a, b, c)
    torch.testing.assert_close(c.double(), a.double() @ b.double().T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("exponent", "true", "cut"), [(-24, 1 + 3.5 * 2**-23, 1 + 3 * 2**-23), (-25, 1 + 1.75 * 2**-23, 1)]
)
def test_sums_are_truncated_like_tensor_cores(host, exponent, true, cut):
    """The first group of eight products is 1 and seven small numbers. The next group adds -1."""
    a, b, c = operands()
    a[0] = torch.tensor([1.0] + [2.0**-12] * 7 + [0.0] * 7 + [1.0])
    b[0] = torch.tensor([1.0] + [2.0 ** (exponent + 12)] * 7 + [0.0] * 7 + [-1.0])
    assert (a[0].double() @ b[0].double()).item() == true - 1
    run(host, "NONE", a, b, c)
    assert c[0, 0].item() == cut - 1


def test_wrong_fragment_layout_gives_wrong_product(host):
    a, b, c = operands()
    run(host, "LAYOUT", a, b, c)
    assert (c.double() - a.double() @ b.double().T).norm() > 1


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("NO_BARRIER", "reads what (thread .* wrote: a barrier is missing|a copy is still to write)"),
        ("NO_WAIT", "what a copy is still to write"),
        ("NO_WARP_BARRIER", "(reads what thread|others may still read).*a barrier is missing|nobody wrote"),
        ("OVERWRITE", "overwrites what others may still read: a barrier is missing"),
        ("UNWRITTEN", "nobody wrote"),
        ("SHARED_BOUNDS", "outside the 1152 bytes"),
        ("DIVERGENCE", "lanes have parted"),
        ("MISSING_THREADS", "wait for others that ended"),
    ],
)
@pytest.mark.parametrize("seed", range(5))
def test_injected_fault_is_reported_in_any_order(host, fault, words, seed):
    host.set_seed(seed)
    with pytest.raises(RuntimeError, match=words):
        run(host, fault, *operands())
    # The emulator works again after a fault.
    a, b, c = operands()
    run(host, "NONE", a, b, c)
    assert c.isfinite().all()


@pytest.mark.parametrize(("fault", "words"), [("NONE", None), ("GLOBAL_BOUNDS", "heap-buffer-overflow")])
def test_sanitized_emulator_reports_out_of_bounds(fault, words):
    code = (
        "import importlib.util, os, torch\n"
        "spec = importlib.util.spec_from_file_location('_cuda_emulator', os.environ['BCLIP_CUDA_HOST'])\n"
        "host = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(host)\n"
        "a, b, c = torch.ones(16, 16).half(), torch.ones(16, 16).half(), torch.empty(16, 16)\n"
        f"host.run_faulty_kernel({FAULTS.index(fault)}, a.data_ptr(), b.data_ptr(), c.data_ptr())\n"
        "assert (c == 16).all()\n"
    )
    environment = {**os.environ, **cuda_emulator.environment(sanitized=True)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    if words is None:
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode != 0 and words in done.stderr and "matmul" in done.stderr, done.stderr
