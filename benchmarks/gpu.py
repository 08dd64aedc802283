"""`make gpu`: builds on a machine with a GPU, tests there, looks for races, measures, and records what was measured.

For a machine with nvcc, PyTorch, Triton, pytest and pytest-benchmark, what builds (setuptools, pybind11, ninja) and no
network. Every step has its time, all together less than 9 minutes; a step that fails or runs out of it doesn't stop the
next ones, but the exit status tells.
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
    name: str
    command: list[str]
    seconds: int


def steps() -> list[Step]:
    # A few sequences, chunks of keys and tiles: a sanitizer slows kernels down a hundredfold.
    few = [*PYTEST, *KERNELS, "-k", "(hosted_ragged and 64) or rectangle"]
    sanitizer = shutil.which("compute-sanitizer") or "compute-sanitizer"
    check = [sanitizer, "--error-exitcode", "9", "--target-processes", "all", "--kernel-regex", "kns=bclip"]
    code = "import sys; from bclip_fast.benchmarks import measure; rows, status = measure.suite(sys.argv[1]); "
    code += "print(measure.record(rows) if rows else 'no figure'); sys.exit(status or not rows)"
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
    """Its exit status, or why there is none. With it ends what it started: a sanitizer's program, left behind, would
    take from what is measured next."""
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
    environment = os.environ | {
        "BCLIP_CUDA": "1",
        # The machine may have no headers of libjpeg; what is measured here decodes nothing.
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
        took = time.monotonic() - start
        print(f"== {step.name}: {'ok' if passed else f'FAILED ({status})'}, {took:.0f} s of {step.seconds}", flush=True)
    print(f"== failed: {', '.join(failed)}" if failed else "== all steps passed")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
