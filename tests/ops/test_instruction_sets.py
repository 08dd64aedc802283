"""The instruction sets of the C++ kernels: the selection, and a short run on each one that this processor has.

`make test-avx2` and `make test-portable` run all of the operators' tests that way.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from inside import num_passed

from bclip_fast import _cpu
from bclip_fast.doctor import backends as doctor

# Tests that depend on vector length or instructions, and the least number that must pass. Attention isn't listed,
# because its tests run every instruction set in one process.
CHECKS = {
    "test_contrastive_cpu": ("rectangular or without_positives or offset or distant or requested", 10),
    "test_pointwise": ("as_accurate and cpu", 20),
    "test_image": ("resized_pixels_equal_pillows", 8),
    "test_image_damage": ("refused", 13),
}


def run(name, *command):
    environment = {**os.environ, "BCLIP_CPU_ISA": name, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize("name", ["avx512", "avx2", "plain"])
def test_kernels_pass_on_each_instruction_set(name):
    if "BCLIP_CPU_ISA" in os.environ:
        pytest.skip("BCLIP_CPU_ISA names the one instruction set to test")
    if name == _cpu.instruction_set():
        pytest.skip("all tests run on the best instruction set")
    missing = run(name, "-c", "from bclip_fast import _cpu; _cpu.instruction_set()")
    if missing.returncode:
        pytest.skip(missing.stderr.splitlines()[-1])
    # A build without libjpeg-turbo (BCLIP_JPEG=0) has no tests of images.
    files = [file for file in CHECKS if not file.startswith("test_image") or hasattr(_cpu, "decode_resize")]
    selected = " or ".join(f"({file} and ({CHECKS[file][0]}))" for file in files)
    least = sum(CHECKS[file][1] for file in files)
    assert num_passed([f"{file}.py" for file in files], selected, BCLIP_CPU_ISA=name, OMP_NUM_THREADS="1") >= least


NAN_ROUNDING = """
import torch
from bclip_fast import _cpu
bits = [0x7FA12345, -0x5EDCBB, 0x7F800001, 0x7FFFFFFF]
stream = torch.tensor(bits * 5, dtype=torch.int32).view(torch.float32)
zeros, normed, total = torch.zeros(20), torch.empty(20), torch.empty(20, dtype=torch.bfloat16)
values = [_cpu.Values(x.data_ptr(), x.dtype == torch.bfloat16) for x in (stream, zeros, zeros, zeros, total, normed)]
_cpu.add_norm(1, 20, *values, _cpu.Values(0, False), 1e-5, _cpu.Dropout(0, 0, 1.0), 1)
assert total.view(torch.int16).tolist() == [0x7FE1, -0x1F, 0x7FC0, 0x7FFF] * 5, total.view(torch.int16)
"""


@pytest.mark.parametrize("name", ["avx512", "avx2", "plain"])
def test_bfloat16_rounding_keeps_sign_and_payload_of_nan(name):
    if run(name, "-c", "from bclip_fast import _cpu; _cpu.instruction_set()").returncode:
        pytest.skip(f"this processor has no {name}")
    done = run(name, "-c", NAN_ROUNDING)
    assert done.returncode == 0, done.stderr


def test_best_instruction_set_is_chosen_and_named_by_the_doctor():
    line = next(line for line in doctor.lines() if line.strip().startswith("cpu "))
    assert f"installed, {_cpu.instruction_set()}" in line
    assert ("AMX" in line) == _cpu.has_amx()
    if "BCLIP_CPU_ISA" not in os.environ and Path("/proc/cpuinfo").exists():
        flags = Path("/proc/cpuinfo").read_text().split()
        assert ("avx512dq" in flags) == (_cpu.instruction_set() == "avx512")


def test_unknown_instruction_set_is_refused_by_every_operator():
    code = """
import torch
from bclip_fast import ops
from bclip_fast.doctor import backends as doctor
print(*doctor.lines(), sep="\\n")
image, qkv = torch.eye(3, 16), torch.zeros(1, 2, 3, 1, 16)
for call in (lambda **name: ops.clip_loss(image, image, 1.0, **name), lambda **name: ops.fused_attention(qkv, **name),
             lambda **name: ops.gelu(image, **name), lambda **name: ops.linear(image.bfloat16(), image, **name)):
    call()
    try:
        call(backend="cpu")
    except ops.BackendError as error:
        print("refused", error)
"""
    done = run("sse9", "-c", code)
    reason = "BCLIP_CPU_ISA is 'sse9'; this processor and build have"
    assert done.returncode == 0, done.stderr
    assert f"the cpu backend is off: {reason}" in done.stderr
    assert "plain" in done.stderr
    assert f"installed, but {reason}" in done.stdout
    refusals = [line for line in done.stdout.splitlines() if line.startswith("refused")]
    assert len(refusals) == 4
    assert all(f"cannot run: cpu: {reason}" in line for line in refusals)
