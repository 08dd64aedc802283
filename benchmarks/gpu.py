"""`make gpu`: build on a machine with a GPU, test, look for races, measure, and record the results.

The machine needs nvcc, PyTorch, Triton, pytest, pytest-benchmark, setuptools, pybind11 and ninja, and no network.
Every step has a time limit. The limits add up to less than 9 minutes. If a step fails or exceeds its limit, the next
steps still run. The exit status is the number of failed steps.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
TESTS = [
    f"tests/ops/test_{name}.py" for name in ("attention", "contrastive", "contrastive_modes", "contrastive_targets")
]
KERNELS = [f"tests/ops/test_{name}_cuda.py" for name in ("attention", "contrastive", "image")]
PYTEST = [sys.executable, "-m", "pytest", "-q", "-rf", "-p", "no:cacheprovider", "-p", "no:randomly"]
MEASURED = "(contrastive or siglip or attention) and (bfloat16 or float16) and not reference"


class Step(NamedTuple):
    """A command and its time limit in seconds."""

    name: str
    command: list[str]
    seconds: int


def steps() -> list[Step]:
    """Return the steps in the order in which they run."""
    # A sanitizer makes kernels a hundred times slower. These tests have few sequences, chunks of keys and tiles.
    few = [*PYTEST, *KERNELS, "-k", "(hosted_ragged and 64) or rectangle"]
    sanitizer = shutil.which("compute-sanitizer") or "compute-sanitizer"
    check = [sanitizer, "--error-exitcode", "9", "--target-processes", "all", "--kernel-regex", "kns=bclip"]
    code = "import sys; from bclip_fast.benchmarks import measure; rows, status = measure.suite(sys.argv[1]); "
    code += "print(measure.record(rows) if rows else 'no results'); sys.exit(status or not rows)"
    return [
        Step(
            "build", [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "-e", "."], 150
        ),
        Step("required backends", [*PYTEST, "tests/ops/test_dispatch.py", "-k", "required"], 20),
        Step("kernels", [*PYTEST, *KERNELS, "-k", "cuda"], 60),
        Step("operators", [*PYTEST, *TESTS, "-k", "cuda or triton"], 100),
        Step("memcheck", [*check, "--tool", "memcheck", *few], 40),
        Step("racecheck", [*check, "--tool", "racecheck", *few], 40),
        Step("benchmarks", [sys.executable, "-c", code, MEASURED], 120),
    ]


def run(step: Step, environment: Mapping[str, str]) -> int | str:
    """Return the exit status of a step, or the reason why it has none.

    Kill the step's whole process group at the end. A program that a sanitizer left behind would disturb the next
    measurement.
    """
    try:
        process = subprocess.Popen(step.command, cwd=ROOT, env=environment, start_new_session=True)
    except FileNotFoundError as error:
        return str(error)
    try:
        return process.wait(step.seconds)
    except subprocess.TimeoutExpired as error:
        return str(error)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main() -> int:
    """Run the steps and report each one. Returns the number of failures."""
    environment = os.environ | {
        "BCLIP_CUDA": "1",
        # The machine may lack libjpeg's headers, and no benchmark here decodes images.
        "BCLIP_JPEG": os.environ.get("BCLIP_JPEG", "0"),
        "BCLIP_REQUIRE_BACKENDS": "cuda,triton",
        "BCLIP_TEST_DEVICE": "cuda",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }
    failed = []
    for step in steps():
        start = time.monotonic()
        status = run(step, environment)
        passed = status == 0
        failed += [] if passed else [step.name]
        seconds = time.monotonic() - start
        outcome = "ok" if passed else f"FAILED ({status})"
        print(f"== {step.name}: {outcome}, {seconds:.0f} s of {step.seconds}", flush=True)
    print(f"== failed: {', '.join(failed)}" if failed else "== all steps passed")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
