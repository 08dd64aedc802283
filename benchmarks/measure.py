"""What a contender errs on the very inputs that are timed, and what this machine's matmul can do at best."""

from __future__ import annotations

import ctypes
import gc
import json
import platform
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
    double = [_double(value) for value in inputs]
    return [tensor.detach() for tensor in case.truth(*double)]


def error_of(results: list[Tensor | None], truth: list[Tensor]) -> float:
    """The largest difference over all results that there are, relative to each result's largest value.

    Raises AssertionError where a result is no approximation at all: a time for wrong numbers is no figure.
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
    """`run`, which returns when a GPU has done what it was given."""
    if DEVICE.type == "cpu":
        return run

    def to_its_end(*inputs: Any) -> Any:
        results = run(*inputs)
        torch.cuda.synchronize(DEVICE)
        return results

    return to_its_end


def peak_extra_bytes(run: Callable[[], Any]) -> tuple[int | None, Any]:
    """What `run` takes at its peak beyond what is held before it, by torch's allocator on CUDA, resident on Linux; and
    what it returns.

    None where the kernel keeps no resettable peak. Resident memory is counted in pages that were touched, and memory
    that the C library kept from earlier is given back first, so small figures are good to about a MiB.
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
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
        before = _resident("VmRSS")
    except (OSError, AttributeError):
        return None, run()
    results = run()
    return max(0, _resident("VmHWM") - before), results


def _resident(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


# Rows of the square matmul whose rate every FLOP figure is compared with.
MATMUL_SIZE = 8192 if DEVICE.type == "cuda" else 2048


def matmul_rate(dtype: torch.dtype, repeats: int = 3) -> dict[str, Any]:
    """The best rate of torch's own square matmul, as the columns `matmul_flops_per_second` and `matmul_dtype` of a row.

    Every row measures it again, since a machine's speed drifts. A CPU without bf16 instructions is measured in
    float32: torch emulates bf16 there at about a hundredth of that rate, which no kernel should be compared with.
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
    """For a table's title: the dtype of the reference matmul, where it isn't the dtype of the rows."""
    emulated = any(row["dtype"] in ("bf16", "bfloat16") and row.get("matmul_dtype") == "float32" for row in rows)
    return "; compared with torch's float32 matmul, as this CPU has no bf16 instructions" if emulated else ""


def suite(words: str, large: bool = False) -> tuple[list[dict[str, Any]], int]:
    """The rows of the cases and contenders that pytest's -k `words` names, and pytest's exit status."""
    import pytest

    here = Path(__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bench.json"
        args = [str(here / "bench_operators.py"), "-q", "-rs", f"--benchmark-json={path}", "-p", "no:cacheprovider"]
        args += ["-p", "no:randomly"]  # rows come in the order of the cases
        args += ["--benchmark-disable-gc", "--benchmark-quiet", f"--rootdir={here}", "-c", "/dev/null"]
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
    """Appends the rows, of one device, to results/<device>.jsonl of the source tree."""
    path = Path(__file__).parent / "results" / results_name(rows[0]["device"])
    with open(path, "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def environment() -> dict[str, str]:
    """What a figure needs beside it to mean anything later."""
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
