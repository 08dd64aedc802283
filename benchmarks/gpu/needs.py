"""Requirements of the steps, and a check of this machine."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Sequence
from importlib import metadata

from .steps import Setting, Step, is_installed, program, steps

# A machine without one of these can't run `make gpu` at all. A step that misses another requirement only doesn't run.
REQUIRED = (
    *("gpu", "nvcc", "c++", "pip", "setuptools", "pybind11", "ninja"),
    *("triton", "pytest", "pytest_benchmark", "numpy", "PIL"),
)
# The emulator and the interpreter replace these in a rehearsal.
REPLACED = ("gpu", "nvcc", "compute-sanitizer")


def _has_gpu() -> bool:
    program = shutil.which("nvidia-smi")
    return program is not None and subprocess.run([program, "-L"], capture_output=True).stdout.startswith(b"GPU")


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
    names: Sequence[str] = ("torch", "triton", "pytest", "pytest-xdist", "pytest-benchmark", "setuptools"),
) -> str:
    """Return the versions of Python and of some packages in one line."""
    parts = [f"Python {platform.python_version()}"]
    for name in names:
        try:
            parts.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            parts.append(f"no {name}")
    return ", ".join(parts)
