"""Marks of the tests that run Triton's kernels, and of those that compile them without a GPU."""

from __future__ import annotations

import os

from oracle import collected_if

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Triton reads TRITON_INTERPRET when it defines kernels, so a process has either interpreted or compiled kernels.
# A machine with a GPU runs the compiled ones.
RUNS_KERNELS = INTERPRETED or os.environ.get("BCLIP_TEST_DEVICE") == "cuda"
interpreted, compiled = collected_if(RUNS_KERNELS), collected_if(not RUNS_KERNELS)
