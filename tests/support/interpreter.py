"""Marks of the tests that run Triton's kernels, and of those that compile them without a GPU."""

from __future__ import annotations

import inspect
import os
from typing import Any

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


def replace_builtins_faster() -> None:
    """Let Triton's interpreter list the functions of its language once.

    It replaces them before each launch and each call inside a kernel. It then looks at every member of the language's
    modules, which takes half the time of a small launch.
    """
    from triton.runtime import interpreter

    names: dict[Any, list[str]] = {}

    def patch_builtin(package: Any, builder: Any, scope: Any) -> None:
        if package not in names:
            members = inspect.getmembers(package)
            names[package] = [name for name, member in members if interpreter.tl.core.is_builtin(member)]
        for name in names[package]:
            member = getattr(package, name)
            if not interpreter.tl.core.is_builtin(member):
                return  # a call inside a kernel: the launch has replaced all functions of the package
            interpreter._patch_attr(package, name, member, builder, scope)

    interpreter._patch_builtin = patch_builtin
