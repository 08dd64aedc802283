"""What a Triton kernel takes of a GPU, from compiling it ahead of time: no GPU is needed."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

# What `make test` compiles for. sm_90 has more shared memory and the same registers, so sm_80 is the tighter one.
CAPABILITIES = [80, pytest.param(90, marks=pytest.mark.long)]
TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


class Resources(NamedTuple):
    registers: int  # of a thread
    spilled: int  # bytes of a thread's stack, where registers that don't fit go
    shared: int  # bytes of a program


def compiled_resources(
    kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any], capability: int, folder: Path
) -> Resources:
    """Compiles for sm_<capability>; what `constants` writes in lower case and the kernel doesn't take is an option.

    Arguments that `types` doesn't name are i32. Pointers and strides are multiples of 16, as the launcher finds them.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {name: value for name, value in constants.items() if name not in kernel.arg_names and value is not None}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {arg: "constexpr" if arg in constants else types.get(arg, "i32") for arg in kernel.arg_names}
    aligned = [arg for arg, kind in signature.items() if kind.startswith("*") or "stride" in arg]
    place = kernel.arg_names.index
    binary = triton.compile(
        ASTSource(
            kernel,
            signature,
            {(place(arg),): value for arg, value in constants.items()},
            {(place(arg),): [["tt.divisibility", 16]] for arg in aligned},
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
