"""Whether the processor multiplies bfloat16 in hardware, and the precision that follows from it.

Without such instructions torch's bfloat16 products are 5 to 95 times slower than its float32 products. The operators
then multiply in float32 and round the results.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch

# Flags of /proc/cpuinfo, best first: x86's matrix unit, x86's vector unit, arm64.
_INSTRUCTIONS = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16", "bf16": "arm64 BF16"}

# Environment variables that restrict an x86 processor to older instructions, and their values that exclude bfloat16.
_ONEDNN = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")
_RESTRICTIONS = {
    "BCLIP_CPU_ISA": ("PLAIN", "AVX2"),
    "ATEN_CPU_CAPABILITY": ("DEFAULT", "AVX2"),
    "ONEDNN_MAX_CPU_ISA": _ONEDNN,
    "DNNL_MAX_CPU_ISA": _ONEDNN,
}


def bfloat16_instructions(flags: Collection[str], environment: Mapping[str, str]) -> tuple[str, str]:
    """The instructions that multiply bfloat16, or "", and a clause with the reason.

    Args:
        flags: flags of the processor, as in /proc/cpuinfo.
        environment: environment variables, which may restrict an x86 processor to older instructions.
    """
    name = next((name for flag, name in _INSTRUCTIONS.items() if flag in flags), "")
    if not name:
        return "", "the processor has no bfloat16 instructions"
    if "bf16" not in flags:
        for variable, values in _RESTRICTIONS.items():
            value = environment.get(variable, "")
            if value.upper() in values:
                return "", f"{variable}={value} excludes the processor's bfloat16 instructions ({name})"
    return name, f"the processor multiplies bfloat16 in hardware ({name})"


def _flags() -> set[str]:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), ":")
    return set(flags.split(":", 1)[1].split())


def _read_amx() -> tuple[bool, str | None]:
    if find_spec("bclip_fast._cpu") is None:
        return False, None
    from bclip_fast import _cpu

    try:
        _cpu.instruction_set()  # on a processor without AMX, has_amx() doesn't read BCLIP_CPU_ISA
        return _cpu.has_amx(), None
    except ValueError as error:
        return False, str(error)


# Whether our kernels use the matrix unit of x86, and the error in BCLIP_CPU_ISA, if any. Read once, because traced code
# can't call C++.
HAS_AMX, ISA_ERROR = _read_amx()

# Read once: libraries read these variables only when they start, and traced code can't read files.
BFLOAT16_INSTRUCTIONS, BFLOAT16_REASON = bfloat16_instructions(_flags(), os.environ)


def lacks_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products on this device should be computed in float32."""
    return device.type == "cpu" and not BFLOAT16_INSTRUCTIONS


def native_precision(device: torch.device) -> tuple[Literal["bf16", "fp32"], str]:
    """The precision `auto` on this device, and the reason as a clause.

    It is "bf16" on a device that multiplies bfloat16 in hardware, else "fp32".
    """
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        name = f"{torch.cuda.get_device_name(device)} (sm_{capability[0]}{capability[1]})"
        if capability >= (8, 0):
            return "bf16", f"{name} multiplies bfloat16 in hardware"
        return "fp32", f"{name} has no bfloat16 instructions, which need sm_80 or newer"
    return ("bf16" if BFLOAT16_INSTRUCTIONS else "fp32"), BFLOAT16_REASON
