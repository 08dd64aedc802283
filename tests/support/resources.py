"""The GPU resources of a Triton kernel, read from its compiled code without a GPU."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

# `make test` compiles only for sm_80. sm_90 has as many registers and more shared memory, so sm_80 has tighter limits.
CAPABILITIES = [80, pytest.param(90, marks=pytest.mark.long)]
TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


class Resources(NamedTuple):
    """Registers per thread, bytes of registers spilled per thread, and bytes of shared memory per program."""

    registers: int
    spilled: int
    shared: int


def compiled_resources(
    kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any], capability: int, folder: Path
) -> Resources:
    """Compile a kernel for sm_<capability> and return its resources.

    types: types of arguments. An argument without a type is an i32.
    constants: compile-time constants, and the compiler's options, which are names that the kernel does not have.
    Pointers and strides count as multiples of 16, as in real launches.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {name: value for name, value in constants.items() if name not in kernel.arg_names and value is not None}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {arg: "constexpr" if arg in constants else types.get(arg, "i32") for arg in kernel.arg_names}
    aligned = [arg for arg, kind in signature.items() if kind.startswith("*") or "stride" in arg]
    position = kernel.arg_names.index
    binary = triton.compile(
        ASTSource(
            kernel,
            signature,
            {(position(arg),): value for arg, value in constants.items()},
            {(position(arg),): [["tt.divisibility", 16]] for arg in aligned},
        ),
        target=GPUTarget("cuda", capability, 32),
        options=options,
    )
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(binary.asm["cubin"])
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    report = subprocess.run(
        [cuobjdump, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+).*LOCAL:(\d+)", report).groups()
    return Resources(int(registers), int(stack) + int(local), binary.metadata.shared)
