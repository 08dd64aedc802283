"""The built CUDA module, read without a GPU: no spills, tensor-core instructions, the committed report of resources."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from bclip_fast.benchmarks import cuda_resources
from bclip_fast.ops.dispatch import MISSING

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.skipif("cuda" in MISSING, reason=MISSING.get("cuda", "")),
    pytest.mark.skipif(cuda_resources.cuobjdump() is None, reason="no cuobjdump, of the toolkit or of Triton"),
]


@pytest.fixture(scope="module")
def kernels():
    return cuda_resources.kernels()


def test_every_kernel_is_there_for_every_architecture(kernels):
    names = {kernel.name for kernel in kernels}
    architectures = {kernel.architecture for kernel in kernels}
    assert len(kernels) == len(names) * len(architectures)
    for kind in ("Half", "Bfloat16"):
        for flag in ("false", "true"):
            assert {
                f"attention_forward<{kind}, 64, 256, {flag}>",
                f"attention_backward<{kind}, 64, 8, {flag}>",
            } <= names
        assert {f"contrastive_{name}<{kind}>" for name in ("forward", "softmax", "sigmoid")} <= names
    assert {f"image_resize<{kind}>" for kind in ("uint8", "float", "Half", "Bfloat16")} <= names


def test_no_kernel_spills(kernels):
    assert {kernel.name: kernel.spilled for kernel in kernels if kernel.spilled} == {}


def test_every_kernel_that_multiplies_matrices_does_it_on_tensor_cores(kernels):
    few = [kernel.name for kernel in kernels if kernel.matrix_instructions < 32]
    assert [name for name in few if not name.startswith("image")] == []


def test_as_many_blocks_fit_as_the_kernels_were_laid_out_for(kernels):
    for kernel in (kernel for kernel in kernels if kernel.architecture in ("80", "90", "90a")):
        one = re.search(r"attention_backward<\w+, \d+, 8|attention_forward<\w+, 128", kernel.name)
        assert kernel.blocks >= (1 if one else 2), kernel


def test_the_committed_report_is_of_these_kernels(kernels):
    """By name: another nvcc gives other registers."""
    written = re.findall(r"^\| (\w+<.*?>) \| (\w+) \|.*\| 0 \| [\d.]+ \|", cuda_resources.REPORT.read_text(), re.M)
    built = [(kernel.name, kernel.architecture) for kernel in kernels if kernel.architecture in ("80", "90a")]
    assert sorted(written) == sorted(built)


def test_it_stands_alone():
    """CUDA's runtime is in it, and nothing of torch: one file for every torch, and small enough for a wheel."""
    from bclip_fast import _cuda

    done = subprocess.run(["readelf", "-d", _cuda.__file__], capture_output=True, text=True, check=True)
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", done.stdout)
    assert needed and not [name for name in needed if re.match(r"lib(cuda|torch|c10|nvjpeg)", name)]
    assert Path(_cuda.__file__).stat().st_size < 20e6
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".cuh")]
    assert len(sources) > 40
    assert [path.name for path in sources if re.search(r"#include\s*[<\"](torch|ATen|c10)", path.read_text())] == []


def test_a_pictures_weights_are_rounded_as_pillow_rounds_them():
    """No product of its doubles is fused with a sum; the quotients are whole instructions here."""
    from bclip_fast import _cuda

    done = subprocess.run(
        [cuda_resources.cuobjdump(), "--dump-ptx", _cuda.__file__], capture_output=True, text=True, check=True
    )
    [weigh] = re.findall(r"\.entry \w+5weigh\w+\(.*?\n\}", done.stdout, re.S)
    assert weigh.count("mul.rn.f64") > 10 and "div.rn.f64" in weigh and "fma.rn.f64" not in weigh


def test_there_is_ptx_for_devices_to_come():
    from bclip_fast import _cuda

    done = subprocess.run(
        [cuda_resources.cuobjdump(), "--list-ptx", _cuda.__file__], capture_output=True, text=True, check=True
    )
    found = set(re.findall(r"\.sm_(\w+)\.ptx", done.stdout))
    plain = [name for name in _cuda.architectures.split(";") if name.isdigit()]
    assert found == {*plain[:1]} or not plain
