"""Fingerprints of devices and environments, which identify tuning records."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import os
import platform
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import torch

from bclip_fast.errors import BackendError
from bclip_fast.io.hashing import sha256_of_file, sha256_of_parts
from bclip_fast.version import __version__

from . import processor
from .cuda_device import hopper_refusal


def fingerprint(kind: str, index: int = 0) -> dict[str, str]:
    """Everything that a record of this device depends on. `kind` is "cpu" or "cuda"."""
    common = {"torch": torch.__version__, "bclip_fast": __version__}
    if kind == "cpu":
        threads = 1 << (torch.get_num_threads().bit_length() - 1)
        limits = ("ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
        return {
            "device": "cpu",
            "name": cpu_name(),
            "architecture": cpu_architecture(),
            "torch_instructions": torch.backends.cpu.get_cpu_capability(),
            "libraries": " ".join(f"{name}={os.environ[name]}" for name in limits if name in os.environ),
            "threads": "1" if threads == 1 else f"{threads} to {2 * threads - 1}",
            **common,
            "kernels": _build("bclip_fast._cpu"),
        }
    return {
        "device": "cuda",
        "name": torch.cuda.get_device_name(index),
        "architecture": _gpu_architecture(index),
        "driver": _driver(),
        "cuda": str(torch.version.cuda),
        **common,
        "triton": importlib.metadata.version("triton") if find_spec("triton") else "none",
        "kernels": f"{_build('bclip_fast._cuda')} {_triton_sources()}",
    }


@functools.cache
def cpu_name() -> str:
    """The processor's model name."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1].strip() if match else platform.processor() or platform.machine()


def cpu_architecture() -> str:
    """The instruction set that our kernels use. The package's defaults for it have the same name."""
    if platform.machine() in ("aarch64", "arm64"):
        return "arm64"
    if find_spec("bclip_fast._cpu") is None:
        return "none"
    module = importlib.import_module("bclip_fast._cpu")
    try:
        if module.has_amx():
            return "amx"
        name = module.instruction_set()
    except ValueError:
        return "unknown"  # BCLIP_CPU_ISA is unknown, which every call of the cpu backend reports
    return "avx512_bf16" if name == "avx512" and processor.BFLOAT16_INSTRUCTIONS else name


def _gpu_architecture(index: int) -> str:
    """The architecture of a GPU, such as "sm_90", or "sm_90a" if the losses take the kernels for Hopper there.

    These change the order of the backends, so the package has defaults for both.
    """
    major, minor = torch.cuda.get_device_capability(index)
    try:
        letter = "" if hopper_refusal(torch.device("cuda", index)) else "a"
    except BackendError:
        letter = ""  # which a call of a loss reports
    return f"sm_{major}{minor}{letter}"


@functools.cache
def _build(module: str) -> str:
    """The first digits of the SHA-256 of the compiled module."""
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        return "none"
    return sha256_of_file(Path(spec.origin))[:12]


@functools.cache
def _triton_sources() -> str:
    sources = sorted(Path(__file__).parent.rglob("triton*.py"))
    return sha256_of_parts(path.read_bytes() for path in sources)[:12]


def _driver() -> str:
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return "unknown"
    match = re.search(r"\b(\d+\.\d+(\.\d+)?)\b", text)
    return match[1] if match else "unknown"


def differences(one: Mapping[str, str], other: Mapping[str, str]) -> str:
    """The differences of two fingerprints, for messages. Equal fingerprints give ""."""
    names = [name for name in {**one, **other} if one.get(name) != other.get(name)]
    return ", ".join(f"{name} {one.get(name) or 'none'} / {other.get(name) or 'none'}" for name in names)
