"""Tests of the machine code of the kernels for Hopper: CUTLASS's main loop with the epilogues of the losses."""

from __future__ import annotations

import re

import pytest

from bclip_fast.benchmarks import cuda_resources
from bclip_fast.benchmarks.bounds import cuda_code, machine_code, mix
from bclip_fast.benchmarks.bounds.model import bound
from bclip_fast.benchmarks.bounds.rates import GPUS
from bclip_fast.ops.build_info import why_no_hopper
from bclip_fast.ops.dispatch import MISSING

pytestmark = [
    pytest.mark.skipif("cuda" in MISSING, reason=MISSING.get("cuda", "")),
    pytest.mark.skipif(
        not machine_code.has_tools(), reason="cuobjdump or nvdisasm is missing: install the CUDA toolkit or Triton"
    ),
]
NAMES = {f"hopper_{name}<{kind}>" for name in ("forward", "softmax", "sigmoid") for kind in ("Half", "Bfloat16")}
SHARED_BYTES, REGISTERS = 227 * 1024, 65536  # of a block, and of a multiprocessor


@pytest.fixture(scope="module")
def codes(machine_codes):
    """The machine code of each kernel for Hopper, by name."""
    from bclip_fast import _cuda

    if _cuda.CONTRASTIVE_HOPPER is None:
        pytest.skip(f"the CUDA module is built without kernels for Hopper: {why_no_hopper() or 'CUTLASS is missing'}")
    named = [(cuda_resources.kernel_name(code.symbol), code) for code in machine_codes]
    return {name: code for name, code in named if name.startswith("hopper")}


def test_kernels_for_hopper_are_compiled_for_it_alone(codes, machine_codes):
    assert set(codes) == NAMES and {code.architecture for code in codes.values()} == {"90a"}
    assert len([1 for code in machine_codes if "Hopper" in code.symbol]) == len(NAMES)


def test_kernels_for_hopper_multiply_wide_tiles_that_the_tma_copies(codes):
    """Two blocks share the copies of the text features, which halves the reads of L2 for them."""
    for name, code in codes.items():
        kinds = set(re.findall(r" (HGMMA\.[\w.]+x\d+x\d+)", code.listing))
        assert kinds == {"HGMMA.64x256x16"}, name
        copies = re.findall(r" (UTMALDG[\w.]*)", code.listing)
        assert sorted(copies) == ["UTMALDG.3D", "UTMALDG.3D.MULTICAST"], name
        assert " HMMA." not in code.listing and " LDSM" not in code.listing and " LDGSTS" not in code.listing


def test_warps_that_copy_give_their_registers_to_those_that_multiply(codes):
    for kernel in cuda_resources.kernels(list(codes.values())):
        least, most = kernel.groups
        assert kernel.threads == 384 and 128 * least + 256 * most <= REGISTERS
        assert (least, most) == (40, 232), kernel.name


def test_kernels_for_hopper_fit_without_spills(codes):
    for kernel in cuda_resources.kernels(list(codes.values())):
        assert (kernel.spilled, kernel.registers) == (0, 168), kernel.name
        assert kernel.blocks == 1 and 192 * 1024 <= kernel.shared <= SHARED_BYTES, kernel.name


def test_main_loops_for_hopper_reach_the_peak(codes):
    """Beside the products, shared memory, copies and issue slots have time to spare, and half of the epilogue hides."""
    works = [work for work in cuda_code.works(list(codes.values()), "hopper") if work.shape == "B=65536, D=512"]
    assert {work.kernel for work in works} == {"hopper_forward", "hopper_softmax", "hopper_sigmoid"}
    for work in works:
        assert mix.matrix(work.total) * work.threads / 32 == 8 * 4 * 512 / 64
        each = bound(work, GPUS["h100"])
        assert max(each.cycles, key=each.cycles.get) == "tensor"
        assert each.share > (0.85 if work.kernel == "hopper_sigmoid" else 0.95), (work.kernel, each.share)
