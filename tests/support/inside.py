"""Tests of some files in a process of their own, whose environment says what they run on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path


def num_passed(files: Iterable[str], selected: str, **environment: str) -> int:
    """How many of tests/ops' `files` pass among those that `selected` (pytest's -k) names; all of them must.

    Covering arrays only (support/pairwise.py): what is marked `long` is left out.
    """
    folder = Path(__file__).parents[1] / "ops"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:randomly"]
    # Triton's interpreter is numpy, which warns of what overflows.
    command += [
        "-W",
        "ignore::RuntimeWarning",
        "-m",
        "not long",
        "-k",
        selected,
        *(str(folder / name) for name in files),
    ]
    options = dict(cwd=folder.parents[1], capture_output=True, text=True, timeout=600)
    done = subprocess.run(command, env={**os.environ, **environment}, **options)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-20_000:]
    return int(re.search(r"(\d+) passed", done.stdout).group(1))
