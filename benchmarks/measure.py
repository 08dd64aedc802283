"""Measurement of a contender: its error on the timed inputs, its memory, and the rate of this machine's matmul."""

from __future__ import annotations

import ctypes
import functools
import gc
import json
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bclip_fast.hardware import device_name, results_name
from bclip_fast.ops.processor import lacks_bfloat16

from .cases import DEVICE, TINY, Case, Inputs


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
    import resource  # Windows lacks it

    kinds = [resource.RUSAGE_SELF] + [resource.RUSAGE_CHILDREN] * with_children
    return sum(usage.ru_utime + usage.ru_stime for usage in map(resource.getrusage, kinds))


def _resident(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


# Rows of the square matmul. Tables compare every FLOP rate with its rate.
MATMUL_SIZE = 64 if TINY else 8192 if DEVICE.type == "cuda" else 2048


def matmul_rate(dtype: torch.dtype, repeats: int = 3) -> dict[str, Any]:
    """Return the best rate of torch's square matmul, in the columns `matmul_flops_per_second` and `matmul_dtype`.

    Every row measures it again, because a machine's speed drifts. On a CPU without bf16 instructions, the matmul is in
    float32. torch emulates bf16 there, at about a hundredth of that rate. The same holds for float16 on every CPU.
    """
    if (dtype == torch.bfloat16 and lacks_bfloat16(DEVICE)) or (dtype == torch.float16 and DEVICE.type == "cpu"):
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
    emulated = {row["dtype"] for row in rows if row.get("matmul_dtype") == "float32"} - {"float32", "fp32"}
    if not emulated:
        return ""
    short = "fp16" if emulated == {"float16"} else "bf16"
    return f"; compared with torch's float32 matmul, as this CPU has no {short} instructions"


def suite(words: str, large: bool = False, folders: Sequence[Path] = ()) -> tuple[list[dict[str, Any]], int]:
    """Run the benchmark suite. Returns its rows and pytest's exit status.

    words: expression for pytest's -k, which selects cases and contenders.
    large: whether to run the cases that take minutes per call.
    folders: folders whose <device>.jsonl gets each row as soon as it is measured.
    """
    import pytest

    package = Path(__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        args = [str(package / "bench_operators.py"), "-q", "-rs", "-p", "no:cacheprovider"]
        args += ["-p", "no:randomly"]  # the rows keep the order of the cases
        args += ["--benchmark-disable-gc", "--benchmark-quiet", f"--rootdir={package}", "-c", "/dev/null"]
        args += [f"--rows={file}" for file in (path, *result_files(folders))]
        status = pytest.main([*args, "-k", words] + ["--large"] * large)
        lines = path.read_text().splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines], int(status)


def result_files(folders: Iterable[Path]) -> list[Path]:
    """Return the path of this device's file <device>.jsonl in each folder."""
    return [folder / results_name(device_name(DEVICE)) for folder in folders]


# Rows of GPUs and CPUs, by device, in the source tree.
RESULTS = Path(__file__).parent / "results"


def record(rows: list[dict[str, Any]]) -> Path:
    """Append the rows of one device to results/<device>.jsonl of the source tree. Returns the file's path."""
    path = RESULTS / results_name(rows[0]["device"])
    append(rows, [path])
    return path


def append(rows: Iterable[dict[str, Any]], paths: Iterable[Path]) -> None:
    """Append rows to JSONL files. Afterwards the operating system has them, so a killed process loses none.

    If a killed process left the last line of a file unfinished, the rows begin on a new line.
    """
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab+") as file:
            file.seek(-min(1, file.tell()), os.SEEK_END)
            file.write(text if file.read() in (b"", b"\n") else b"\n" + text)


@functools.cache
def commit() -> str:
    """Return the commit of the source tree, or "unknown" without git or a repository."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def environment() -> dict[str, str]:
    """Return the columns that describe the machine, the versions and the commit of a row."""
    return {
        "device": device_name(DEVICE),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }
