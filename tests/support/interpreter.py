"""Marks of the tests that run Triton's kernels, and of those that compile them without a GPU."""

from __future__ import annotations

import os

from oracle import collected_if

# The environment of a process with interpreted kernels. NumPy multiplies the tiles. On processors with FMA, OpenBLAS
# chooses kernels that round an element by its place in the tile. A GPU rounds it alike at any place, so a logit is the
# same number in the forward and the backward pass, and their errors cancel.
ENVIRONMENT = {"TRITON_INTERPRET": "1", "OPENBLAS_CORETYPE": "Nehalem"}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Triton reads TRITON_INTERPRET when it defines kernels, so a process has either interpreted or compiled kernels.
# A machine with a GPU runs the compiled ones.
RUNS_KERNELS = INTERPRETED or os.environ.get("BCLIP_TEST_DEVICE") == "cuda"
interpreted, compiled = collected_if(RUNS_KERNELS), collected_if(not RUNS_KERNELS)
