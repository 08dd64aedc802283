"""Marks of the tests that need Triton's interpreter, and of those that need compiled kernels."""

from __future__ import annotations

import os

from oracle import collected_if

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Triton reads the variable when it defines kernels, so a process has either interpreted or compiled kernels.
interpreted, compiled = collected_if(INTERPRETED), collected_if(not INTERPRETED)
