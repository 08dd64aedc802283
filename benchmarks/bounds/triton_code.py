"""The machine code of Triton kernels as their wrappers launch them, compiled ahead of time without a GPU."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch

from . import machine_code, sass

_TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Launch:
    """A launch of a kernel: its arguments by name, the options of the compiler, and the kernel's name in reports."""

    kernel: Any
    arguments: Mapping[str, Any]
    options: Mapping[str, Any]
    programs: int
    title: str = ""

    @property
    def name(self) -> str:
        """The kernel's name."""
        return str(self.kernel.__name__).strip("_").removesuffix("_kernel")


@dataclass(frozen=True)
class Code:
    """A compiled kernel: registers per thread, bytes of shared memory and threads per program."""

    function: sass.Function
    registers: int
    shared: int
    threads: int


class _Enough(Exception):
    """The number of launches is reached."""


class _Recorder:
    """A kernel's substitute, which records the launches and ends the call after `limit` of them."""

    def __init__(self, kernel: Any, launches: list[Launch], limit: int | None) -> None:
        self.kernel, self.launches, self.limit = kernel, launches, limit

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*arguments: Any, **named: Any) -> None:
            names = self.kernel.arg_names
            values = dict(zip(names, arguments, strict=False)) | {k: v for k, v in named.items() if k in names}
            options = {name: value for name, value in named.items() if name not in names}
            sizes = grid(values) if callable(grid) else grid
            self.launches.append(Launch(self.kernel, values, options, math.prod(sizes)))
            if len(self.launches) == self.limit:
                raise _Enough

        return launch


@contextmanager
def recorded(
    modules: list[ModuleType], capability: tuple[int, int], limit: int | None = None
) -> Iterator[list[Launch]]:
    """Record the launches of all kernels of these modules instead of running them.

    capability: compute capability that the modules see.
    limit: number of launches after which the block ends. None runs the block to its end.
    """
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []
    with patch("torch.cuda.get_device_capability", lambda *_: capability):
        patches = [
            patch.object(module, name, _Recorder(value, launches, limit))
            for module in modules
            for name, value in vars(module).items()
            if isinstance(value, JITFunction) and name.endswith("_kernel")
        ]
        for each in patches:
            each.start()
        try:
            with suppress(_Enough):
                yield launches
        finally:
            for each in patches:
                each.stop()


def compiled(launch: Launch, capability: int) -> Code:
    """Compile a launch's kernel for sm_<capability>, specialised as Triton does for such arguments."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, signature, constants, attributes = launch.kernel, {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        name = parameter.name
        value = launch.arguments.get(name, parameter.default if parameter.has_default else None)
        plain = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (plain and isinstance(value, int) and value == 1):
            signature[name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = f"*{_TYPES[value.dtype]}"
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif hasattr(value, "block_shape"):
            signature[name] = f"tensordesc<{_TYPES[value.base.dtype]}{list(value.block_shape)}>"
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if plain and value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(launch.options))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary.asm["cubin"])
        [code] = machine_code.of_cubin(path, str(capability))
    return Code(code.function, code.registers, binary.metadata.shared, 32 * binary.metadata.num_warps)
