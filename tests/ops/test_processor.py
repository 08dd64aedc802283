"""Detection of bfloat16 instructions, and the precision that `auto` takes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from bclip_fast.ops import processor
from bclip_fast.ops.processor import bfloat16_instructions, native_precision

ZEN4 = ["fma", "avx2", "avx512f", "avx512_bf16"]
AVX2 = {
    "BCLIP_CPU_ISA": "avx2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}


@pytest.mark.parametrize(
    ("flags", "environment", "name", "words"),
    [
        (["avx2", "fma"], {}, "", "the processor has no bfloat16 instructions"),
        (["avx512f", "avx512_vnni"], {}, "", "has no bfloat16 instructions"),
        (ZEN4, {}, "AVX512-BF16", "multiplies bfloat16 in hardware"),
        ([*ZEN4, "amx_bf16", "amx_tile"], {}, "AMX", "AMX"),
        (["asimd", "bf16", "i8mm"], {}, "arm64 BF16", "arm64"),
        (["asimd", "bf16"], {"BCLIP_CPU_ISA": "plain", "ATEN_CPU_CAPABILITY": "default"}, "arm64 BF16", "arm64"),
        (ZEN4, {"BCLIP_CPU_ISA": "avx512", "ONEDNN_MAX_CPU_ISA": "avx512_core_bf16"}, "AVX512-BF16", ""),
        (ZEN4, {"BCLIP_CPU_ISA": "plain"}, "", "BCLIP_CPU_ISA=plain"),
        (ZEN4, {"ATEN_CPU_CAPABILITY": "default"}, "", "ATEN_CPU_CAPABILITY=default"),
        (ZEN4, {"ONEDNN_MAX_CPU_ISA": "avx512_core"}, "", "ONEDNN_MAX_CPU_ISA=avx512_core"),
        (ZEN4, {"DNNL_MAX_CPU_ISA": "AVX2"}, "", "DNNL_MAX_CPU_ISA=AVX2"),
    ],
)
def test_bfloat16_instructions_follow_flags_and_variables(flags, environment, name, words):
    result, reason = bfloat16_instructions(flags, environment)
    assert result == name
    assert words in reason


@pytest.mark.parametrize(("instructions", "precision"), [("AMX", "bf16"), ("", "fp32")])
def test_precision_follows_the_processors_instructions(instructions, precision, monkeypatch):
    monkeypatch.setattr(processor, "BFLOAT16_INSTRUCTIONS", instructions)
    assert native_precision(torch.device("cpu")) == (precision, processor.BFLOAT16_REASON)


@pytest.mark.parametrize(("capability", "precision"), [((7, 5), "fp32"), ((8, 0), "bf16"), ((12, 0), "bf16")])
def test_precision_follows_the_gpus_capability(capability, precision, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA T4")
    result, reason = native_precision(torch.device("cuda", 0))
    assert result == precision
    assert f"NVIDIA T4 (sm_{capability[0]}{capability[1]})" in reason


def test_process_restricted_to_avx2_multiplies_bfloat16_in_float32():
    pytest.importorskip("bclip_fast._cpu")
    code = """
import torch
from bclip_fast import ops
from bclip_fast.ops import processor
x, weight = torch.randn(3, 64).bfloat16(), torch.randn(5, 64)
print(processor.lacks_bfloat16(torch.device("cpu")), processor.native_precision(torch.device("cpu"))[0])
print(torch.equal(ops.linear(x, weight), (x.float() @ weight.T).bfloat16()))
"""
    environment = {**os.environ, **AVX2, "OMP_NUM_THREADS": "1"}
    options = {"capture_output": True, "text": True, "check": False, "env": environment}
    done = subprocess.run([sys.executable, "-c", code], **options)
    if "BCLIP_CPU_ISA is 'avx2'" in done.stderr:
        pytest.skip(done.stderr.splitlines()[-1])
    assert done.stdout.split() == ["True", "fp32", "True"], done.stderr
