"""Tests that run in a new process with other environment variables."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path


def num_passed(files: Iterable[str], selected: str, **environment: str) -> int:
    """Run tests of `files` in tests/ops, all of which must pass. Returns their number.

    selected: expression for pytest's -k. environment: variables of the process. Tests marked `long` do not run.
    """
    folder = Path(__file__).parents[1] / "ops"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:randomly"]
    # Triton's interpreter uses NumPy, which warns of overflows.
    command += ["-W", "ignore::RuntimeWarning", "-m", "not long", "-k", selected]
    command += [str(folder / name) for name in files]
    options = dict(cwd=folder.parents[1], capture_output=True, text=True, timeout=600)
    done = subprocess.run(command, env={**os.environ, **environment}, **options)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-20_000:]
    return int(re.search(r"(\d+) passed", done.stdout).group(1))
