"""The C++ kernels on every instruction set that this processor has, not its best alone. Each needs its own process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from inside import num_passed

from bclip_fast import _cpu, doctor

# Of each file the tests by which a vector's length or a missing instruction shows, and the least number that must pass:
# of the losses tiles' edges, both losses, offsets of positives, one and two exponentials.
CHECKS = {
    "test_contrastive_cpu.py": (
        "(divide_nothing and 1031) or rectangular or without_positives or offset or too_far_apart or asked_for",
        20,  # more where AMX is
    ),
    "test_pointwise.py": ("matches and cpu", 25),
    "test_image.py": ("pillows", 12),
}


def run(name, *command):
    environment = {**os.environ, "BCLIP_CPU_ISA": name, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize("file", CHECKS)
@pytest.mark.parametrize("name", ["avx512", "avx2", "plain"])
def test_right_on(name, file):
    if name == _cpu.instruction_set():
        pytest.skip("it is what the file's tests run on by themselves")
    missing = run(name, "-c", "from bclip_fast import _cpu; _cpu.instruction_set()")
    if missing.returncode:
        pytest.skip(missing.stderr.splitlines()[-1])
    if file == "test_image.py" and not hasattr(_cpu, "decode_resize"):
        pytest.skip("built without libjpeg-turbo (BCLIP_JPEG=0)")
    checks, least = CHECKS[file]
    assert num_passed([file], checks, BCLIP_CPU_ISA=name, OMP_NUM_THREADS="1") >= least


def test_the_best_is_chosen_and_the_doctor_names_it():
    line = next(line for line in doctor.lines() if line.strip().startswith("cpu "))
    assert f"installed, {_cpu.instruction_set()}" in line and ("AMX" in line) == _cpu.has_amx()
    if "BCLIP_CPU_ISA" not in os.environ and Path("/proc/cpuinfo").exists():
        flags = Path("/proc/cpuinfo").read_text().split()
        assert ("avx512dq" in flags) == (_cpu.instruction_set() == "avx512")


def test_an_unknown_name_is_refused_and_what_there_is_listed():
    code = "import torch; from bclip_fast import doctor, ops; print(*doctor.lines(), sep='\\n'); "
    code += "ops.clip_loss(torch.eye(3), torch.eye(3), 1.0, backend='cpu')"
    done = run("sse9", "-c", code)
    reason = "BCLIP_CPU_ISA is 'sse9'; this processor and build have"
    assert done.stderr.splitlines()[-1].startswith(f"ValueError: {reason}") and "plain" in done.stderr
    assert f"installed, but {reason}" in done.stdout
