"""Measurement of a contender: its error on the timed inputs, its memory, and the rate of this machine's matmul."""

from __future__ import annotations

import ctypes
import gc
import json
import platform
import resource
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bclip_fast.hardware import device_name, results_name
from bclip_fast.ops.processor import lacks_bfloat16

from .cases import DEVICE, Case, Inputs


def truth_of(case: Case, inputs: Inputs) -> list[Tensor]:
    """Return the correct results of a case, computed from its inputs in float64."""
    double = [_double(value) for value in inputs]
    return [tensor.detach() for tensor in case.truth(*double)]


def error_of(results: list[Tensor | None], truth: list[Tensor]) -> float:
    """Return the largest difference from the truth, relative to the largest value of each result.

    results: results of a contender. None stands for a result that it does not compute.
    Raises AssertionError if a result is wrong. The time of wrong results would mean nothing.
    """
    worst = 0.0
    for result, true in zip(results, truth, strict=True):
        if result is None:
            continue
        difference = (result.double() - true.double()).abs().max().item()
        worst = max(worst, difference / max(true.double().abs().max().item(), 1e-30))
    assert worst < 0.2, f"relative error {worst:.3g}: the numbers are wrong"
    return worst


def _double(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().double().requires_grad_(value.requires_grad)
    return value


def synchronised(run: Callable[..., Any]) -> Callable[..., Any]:
    """Return `run` with a wait for the GPU at its end."""
    if DEVICE.type == "cpu":
        return run

    def run_and_wait(*inputs: Any) -> Any:
        results = run(*inputs)
        torch.cuda.synchronize(DEVICE)
        return results

    return run_and_wait


def peak_extra_bytes(run: Callable[[], Any]) -> tuple[int | None, Any]:
    """Return the peak memory of `run` in bytes, beyond the memory in use before it, and its result.

    On CUDA, the bytes are those of torch's allocator. On a CPU, they are resident memory, which Linux counts in touched
    pages, so small values are accurate to about a MiB. They are None if the operating system cannot reset the peak.
    """
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize(DEVICE)
        torch.cuda.reset_peak_memory_stats(DEVICE)
        before = torch.cuda.memory_allocated(DEVICE)
        results = run()
        torch.cuda.synchronize(DEVICE)
        return torch.cuda.max_memory_allocated(DEVICE) - before, results
    try:
        # Return the memory that the C library kept from earlier calls.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak to the present resident memory
        before = _resident("VmRSS")
    except (OSError, AttributeError):
        return None, run()
    results = run()
    return max(0, _resident("VmHWM") - before), results


def cpu_seconds(with_children: bool = False) -> float:
    """Return the CPU time of this process, on request with the children that it has waited for.

    Unlike wall time, it hardly depends on other processes.
    """
    kinds = [resource.RUSAGE_SELF] + [resource.RUSAGE_CHILDREN] * with_children
    return sum(usage.ru_utime + usage.ru_stime for usage in map(resource.getrusage, kinds))


def _resident(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


# Rows of the square matmul. Tables compare every FLOP rate with its rate.
MATMUL_SIZE = 8192 if DEVICE.type == "cuda" else 2048


def matmul_rate(dtype: torch.dtype, repeats: int = 3) -> dict[str, Any]:
    """Return the best rate of torch's square matmul, in the columns `matmul_flops_per_second` and `matmul_dtype`.

    Every row measures it again, because a machine's speed drifts. On a CPU without bf16 instructions, the matmul is in
    float32. torch emulates bf16 there, at about a hundredth of that rate.
    """
    if dtype == torch.bfloat16 and lacks_bfloat16(DEVICE):
        dtype = torch.float32
    size = MATMUL_SIZE
    a, b = torch.randn(2, size, size, device=DEVICE).to(dtype)
    multiply = synchronised(torch.mm)
    multiply(a, b)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        multiply(a, b)
        best = min(best, time.perf_counter() - start)
    name = str(dtype).removeprefix("torch.")
    return {"matmul_flops_per_second": 2 * size**3 / best, "matmul_dtype": name}


def matmul_note(rows: list[dict[str, Any]]) -> str:
    """Return an addition to a table's title if the dtype of the reference matmul differs from the dtype of the rows."""
    emulated = any(row["dtype"] in ("bf16", "bfloat16") and row.get("matmul_dtype") == "float32" for row in rows)
    return "; compared with torch's float32 matmul, as this CPU has no bf16 instructions" if emulated else ""


def suite(words: str, large: bool = False) -> tuple[list[dict[str, Any]], int]:
    """Run the benchmark suite. Returns its rows and pytest's exit status.

    words: expression for pytest's -k, which selects cases and contenders.
    large: whether to run the cases that take minutes per call.
    """
    import pytest

    package = Path(__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bench.json"
        args = [str(package / "bench_operators.py"), "-q", "-rs", f"--benchmark-json={path}", "-p", "no:cacheprovider"]
        args += ["-p", "no:randomly"]  # the rows keep the order of the cases
        args += ["--benchmark-disable-gc", "--benchmark-quiet", f"--rootdir={package}", "-c", "/dev/null"]
        status = pytest.main([*args, "-k", words] + ["--large"] * large)
        data = json.loads(path.read_text()) if path.is_file() and path.stat().st_size else {"benchmarks": []}
    common = environment()
    rows = []
    for entry in data["benchmarks"]:
        stats = entry["stats"]
        rows.append(
            {**common, **entry["extra_info"], "seconds": stats["median"], "min": stats["min"], "max": stats["max"]}
        )
    return rows, int(status)


def record(rows: list[dict[str, Any]]) -> Path:
    """Append the rows of one device to results/<device>.jsonl of the source tree. Returns the file's path."""
    path = Path(__file__).parent / "results" / results_name(rows[0]["device"])
    with open(path, "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def environment() -> dict[str, str]:
    """Return the columns that describe the machine, the versions and the commit of a row."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
    ).stdout.strip()
    return {
        "device": device_name(DEVICE),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit or "unknown",
        "date": time.strftime("%Y-%m-%d"),
    }
