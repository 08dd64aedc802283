"""What a contender errs on the very inputs that are timed, and what this machine's matmul can do at best."""

from __future__ import annotations

import functools
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .cases import Case, Inputs


def truth_of(case: Case, inputs: Inputs) -> list[Tensor]:
    double = [_double(value) for value in inputs]
    return [tensor.detach() for tensor in case.truth(*double)]


def error_of(results: list[Tensor], truth: list[Tensor]) -> float:
    """The largest difference over all results, relative to each result's largest value.

    Raises AssertionError where a result is no approximation at all: a time for wrong numbers is no figure.
    """
    worst = 0.0
    for result, true in zip(results, truth, strict=True):
        difference = (result.double() - true.double()).abs().max().item()
        worst = max(worst, difference / max(true.double().abs().max().item(), 1e-30))
    assert worst < 0.2, f"relative error {worst:.3g}: the numbers are wrong"
    return worst


def _double(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().double().requires_grad_(value.requires_grad)
    return value


@functools.cache
def matmul_flops_per_second(dtype: torch.dtype, size: int = 2048, repeats: int = 5) -> float:
    """The best rate of torch's own square matmul on this machine, the yardstick beside every FLOP figure."""
    a, b = torch.randn(2, size, size).to(dtype)
    a @ b
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def environment() -> dict[str, str]:
    """What a figure needs beside it to mean anything later."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
    ).stdout.strip()
    return {
        "device": device_name(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit or "unknown",
        "date": time.strftime("%Y-%m-%d"),
    }


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()
