"""Requirements of the steps, and a check of this machine."""

from __future__ import annotations

import functools
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

from .steps import Setting, Step, is_installed, program, steps

# Without one of these, no step can run, and the command ends at once with this message.
ESSENTIAL = {
    "gpu": "this machine has no GPU: `nvidia-smi -L` lists none. `make gpu-rehearsal` runs the same steps without one",
    "torch": "{python} has no torch. Name the Python that has it: `make gpu PYTHON=PATH`",
}
# A step that misses one of these fails. A step that misses another requirement doesn't run.
REQUIRED = (
    *ESSENTIAL,
    *("nvcc", "c++", "pip", "setuptools", "pybind11", "ninja"),
    *("triton", "pytest", "pytest_benchmark", "numpy", "PIL"),
)
# The emulator and the interpreter replace these in a rehearsal.
REPLACED = ("gpu", "nvcc", "compute-sanitizer")


@functools.cache
def _has_gpu() -> bool:
    program = shutil.which("nvidia-smi")
    if program is None:
        # A container may have the driver without its programs.
        return any(Path("/proc/driver/nvidia/gpus").glob("*"))
    return subprocess.run([program, "-L"], capture_output=True).stdout.startswith(b"GPU")


PROGRAMS: dict[str, Callable[[], bool]] = {
    "gpu": _has_gpu,
    "nvcc": lambda: program("nvcc") != "nvcc",
    "c++": lambda: shutil.which(os.environ.get("CXX", "g++")) is not None,
    "compute-sanitizer": lambda: program("compute-sanitizer") != "compute-sanitizer",
}


def missing(step: Step, setting: Setting) -> list[str]:
    """Return the requirements of a step that this machine lacks."""
    names = [name for name in step.needs if not (setting.rehearsal and name in REPLACED)]
    return [name for name in names if not (PROGRAMS[name]() if name in PROGRAMS else is_installed(name))]


def obstacle(plan: Sequence[Step], setting: Setting) -> str:
    """Return why none of the steps can run on this machine, or ""."""
    absent = {name for step in plan for name in missing(step, setting)}
    return "; ".join(text.format(python=sys.executable) for name, text in ESSENTIAL.items() if name in absent)


def dry_run(setting: Setting) -> list[list[str]]:
    """Return a row for each step: name, limit, description, requirements, and the missing ones."""
    rows = []
    for step in steps(setting):
        absent = missing(step, setting)
        fatal = [name for name in absent if name in REQUIRED]
        verdict = "has all" if not absent else f"{'fails' if fatal else 'does not run'}: no {', '.join(absent)}"
        rows.append([step.name, f"{step.seconds}", step.what, ", ".join(step.needs) or "-", verdict])
    return rows


def versions(
    names: Sequence[str] = (
        "torch",
        "triton",
        "pytest",
        "pytest-xdist",
        "pytest-benchmark",
        "setuptools",
        "nvidia-cutlass",
    ),
) -> str:
    """Return the versions of Python and of some packages in one line."""
    parts = [f"Python {platform.python_version()}"]
    for name in names:
        try:
            parts.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            parts.append(f"no {name}")
    return ", ".join(parts)
