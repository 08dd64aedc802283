"""What is installed, what each operator can run on, and why not."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from . import __version__, threads
from .ops import BACKENDS, affine, attention, contrastive, image, pointwise
from .ops.dispatch import MISSING

OPERATORS = {
    "affine": affine.LIMITS,
    "attention": attention.LIMITS,
    "contrastive": contrastive.LIMITS,
    "image": image.LIMITS,
    "pointwise": pointwise.LIMITS,
}


@dataclass(frozen=True)
class DoctorConfig:
    """Prints backends, versions and devices, and why each missing part is missing."""


def run(config: DoctorConfig) -> None:
    print("\n".join(lines()))


def lines() -> list[str]:
    """The report, a line each."""
    out = [
        f"bclip_fast {__version__}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        f"Waiting threads: {threads.describe()}",
        "",
        "Backends" + (f" (BCLIP_BACKEND={os.environ['BCLIP_BACKEND']})" if "BCLIP_BACKEND" in os.environ else ""),
    ]
    out += [f"  {name:<12}{_backend(name)}" for name in BACKENDS]
    out += ["", "Operators"]
    for operator, limits in OPERATORS.items():
        states = [f"{name} ({_state(limits, name)})" for name in BACKENDS]
        out.append(f"  {operator:<12}{', '.join(states)}")
    out += ["", "CUDA"]
    out += [f"  {line}" for line in _cuda()]
    out += ["", "Packages, by extra"]
    for extra, names in _extras().items():
        out.append(f"  {extra:<12}{', '.join(map(_version, names))}")
        missing = [name for name in names if "not installed" in _version(name)]
        if missing:
            out.append(f"  {'':<12}-> pip install 'bclip_fast[{extra}]'")
    return out


def _backend(name: str) -> str:
    if name in MISSING:
        hint = {"cuda": _why_no_cuda_module(), "triton": "comes with torch's CUDA build", "cpu": "reinstall bclip_fast"}
        return f"missing: {MISSING[name]}; {hint[name]}"
    if name == "triton":
        interpreted = " (interpreted: TRITON_INTERPRET=1)" if os.environ.get("TRITON_INTERPRET") == "1" else ""
        return f"installed, {_version('triton')}{interpreted}"
    if name == "cuda":
        return "installed" if torch.cuda.is_available() else "installed, but there is no device that torch can use"
    return _instruction_set() if name == "cpu" else "always there: plain PyTorch"


def _instruction_set() -> str:
    from bclip_fast import _cpu

    asked = " (BCLIP_CPU_ISA)" if "BCLIP_CPU_ISA" in os.environ else ""
    try:
        return f"installed, {_cpu.instruction_set()}{' and AMX' if _cpu.has_amx() else ''}{asked}"
    except ValueError as error:
        return f"installed, but {error}"


def _why_no_cuda_module() -> str:
    if shutil.which("nvcc"):
        return "nvcc is on the PATH: reinstall with BCLIP_CUDA=1"
    return "it was built without nvcc: install the CUDA toolkit and reinstall"


def _state(limits: object, name: str) -> str:
    if name not in limits:  # type: ignore[operator]
        return "not implemented"
    if name in MISSING:
        return "missing"
    if limits is image.LIMITS:
        return limits[name](b"") or "ready"
    return "ready"


def _cuda() -> list[str]:
    out = [f"torch: CUDA {torch.version.cuda}" if torch.version.cuda else "torch: a CPU build"]
    if find_spec("bclip_fast._cuda") is None:
        return [*out, f"_cuda: not built ({_why_no_cuda_module()})"]
    from bclip_fast import _cuda  # type: ignore[attr-defined]

    out.append(f"_cuda: built for sm_{_cuda.architectures.replace(';', ', sm_')}")
    try:
        devices = [_cuda.device(index) for index in range(_cuda.count_devices())]
    except RuntimeError as error:
        return [*out, f"no device: {error}"]
    for index, device in enumerate(devices):
        major, minor = device["capability"]
        memory, state = device["memory_bytes"] / 2**30, device["refusal"] or "ready"
        out.append(f"device {index}: {device['name']}, sm_{major}{minor}, {memory:.1f} GiB, {state}")
    return out


def _extras() -> dict[str, list[str]]:
    """The distributions that each extra brings itself, as the installed metadata has them."""
    extras: dict[str, list[str]] = {}
    for requirement in importlib.metadata.requires("bclip_fast") or ():
        match = re.match(r"([\w.-]+)[^;]*;.*extra == ['\"](\w+)['\"]", requirement)
        if match and match[1].replace("-", "_") != "bclip_fast" and "python_version" not in requirement:
            extras.setdefault(match[2], []).append(match[1])
    return extras


def _version(distribution: str) -> str:
    try:
        return f"{distribution} {importlib.metadata.version(distribution)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{distribution} (not installed)"
