"""Tests of the compiled CUDA module, without a GPU: spills, tensor-core instructions, and the resource report."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from bclip_fast.benchmarks import cuda_resources
from bclip_fast.benchmarks.bounds import machine_code
from bclip_fast.ops.dispatch import MISSING

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.skipif("cuda" in MISSING, reason=MISSING.get("cuda", "")),
    pytest.mark.skipif(
        not machine_code.has_tools(), reason="cuobjdump or nvdisasm is missing: install the CUDA toolkit or Triton"
    ),
]


def has_hopper():
    from bclip_fast import _cuda

    return _cuda.CONTRASTIVE_HOPPER is not None


@pytest.fixture(scope="module")
def kernels(machine_codes):
    return cuda_resources.kernels(machine_codes)


def test_kernels_exist_for_every_architecture(kernels):
    for_all = [kernel for kernel in kernels if not kernel.name.startswith("hopper")]
    names = {kernel.name for kernel in for_all}
    architectures = {kernel.architecture for kernel in kernels}
    assert len(for_all) == len(names) * len(architectures)
    for kind in ("Half", "Bfloat16"):
        for flag in ("false", "true"):
            assert {
                f"attention_forward<{kind}, 64, 256, {flag}>",
                f"attention_backward<{kind}, 64, 8, {flag}>",
            } <= names
        assert {f"contrastive_{name}<{kind}>" for name in ("forward", "softmax", "sigmoid")} <= names
    assert {f"image_resize<{kind}>" for kind in ("uint8", "float", "Half", "Bfloat16")} <= names


def test_kernels_spill_no_registers(kernels):
    assert {kernel.name: kernel.spilled for kernel in kernels if kernel.spilled} == {}


def test_matrix_kernels_use_tensor_cores(kernels):
    few = [kernel.name for kernel in kernels if kernel.matrix_instructions < 32]
    assert [name for name in few if not name.startswith(("image", "hopper"))] == []


def test_kernels_reach_intended_occupancy(kernels):
    for kernel in (kernel for kernel in kernels if kernel.architecture in ("80", "90", "90a")):
        one = re.search(r"attention_backward<\w+, \d+, 8|^hopper", kernel.name)
        assert kernel.blocks >= (1 if one else 2), kernel


def test_report_lists_built_kernels(kernels):
    """It compares only names, because another nvcc allocates other registers."""
    written = re.findall(r"^\| (\w+<.*?>) \| (\w+) \|.*\| 0 \| [\d.]+ \|", cuda_resources.REPORT.read_text(), re.M)
    if not has_hopper():
        written = [row for row in written if not row[0].startswith("hopper")]
    built = [(kernel.name, kernel.architecture) for kernel in kernels if kernel.architecture in ("80", "90a")]
    assert sorted(written) == sorted(built)


def test_module_needs_no_cuda_or_torch_library():
    """It contains CUDA's runtime and nothing of torch, so it works with every torch. It is small enough for a wheel."""
    from bclip_fast import _cuda

    done = subprocess.run(["readelf", "-d", _cuda.__file__], capture_output=True, text=True, check=True)
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", done.stdout)
    assert needed and not [name for name in needed if re.match(r"lib(cuda|torch|c10|nvjpeg)", name)]
    assert Path(_cuda.__file__).stat().st_size < 20e6
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".cuh")]
    assert len(sources) > 40
    assert [path.name for path in sources if re.search(r"#include\s*[<\"](torch|ATen|c10)", path.read_text())] == []


def test_image_weights_round_like_pillow():
    """Its products of doubles are not fused with sums, and a quotient is one instruction."""
    from bclip_fast import _cuda

    ptx = machine_code.run("cuobjdump", "--dump-ptx", _cuda.__file__)
    [weigh] = re.findall(r"\.entry \w+5weigh\w+\(.*?\n\}", ptx, re.S)
    assert weigh.count("mul.rn.f64") > 10 and "div.rn.f64" in weigh and "fma.rn.f64" not in weigh


def test_module_has_ptx_for_newer_devices():
    from bclip_fast import _cuda

    ptx = machine_code.run("cuobjdump", "--list-ptx", _cuda.__file__)
    versions = set(re.findall(r"\.sm_(\w+)\.ptx", ptx))
    plain = [name for name in _cuda.architectures.split(";") if name.isdigit()]
    assert versions == {*plain[:1]} or not plain
