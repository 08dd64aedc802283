"""The machine code of the built module `bclip_fast._cuda` and of cubins, through cuobjdump and nvdisasm."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

from . import sass

_USAGE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)")


@dataclass(frozen=True)
class MachineCode:
    """A compiled kernel.

    symbol: mangled name.
    registers: registers per thread.
    spilled: bytes of a thread's stack, which takes the registers that don't fit.
    listing: output of nvdisasm for the kernel.
    """

    architecture: str
    symbol: str
    registers: int
    spilled: int
    listing: str

    @cached_property
    def function(self) -> sass.Function:
        """The instructions in basic blocks."""
        return sass.function(self.symbol, self.listing)


def tool(name: str) -> str | None:
    """Return the path of cuobjdump or nvdisasm, of the CUDA toolkit or of Triton's wheel, or None."""
    spec = find_spec("triton")
    packages = (spec.submodule_search_locations or ()) if spec else ()
    inside = (Path(package) / "backends" / "nvidia" / "bin" / name for package in packages)
    return shutil.which(name) or next((str(path) for path in inside if path.exists()), None)


def has_tools() -> bool:
    """Return whether both programs are installed."""
    return all(tool(name) for name in ("cuobjdump", "nvdisasm"))


def run(name: str, *arguments: str | Path, folder: Path | None = None) -> str:
    """Return the output of cuobjdump or nvdisasm, run in a folder."""
    program = tool(name)
    assert program is not None, f"{name} is missing: install the CUDA toolkit or Triton"
    command = [program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder).stdout


def of_cubin(path: Path, architecture: str) -> list[MachineCode]:
    """Disassemble all kernels of a cubin."""
    usage = _USAGE.findall(run("cuobjdump", "--dump-resource-usage", path))
    # nvdisasm fills its columns with spaces, which are most of its output.
    listings = sass.sections(run("nvdisasm", "-c", "-hex", path).replace(" " * 32, ""))
    return [
        MachineCode(architecture, symbol, int(registers), int(stack) + int(local), listings[symbol])
        for symbol, registers, stack, local in usage
    ]


def architectures() -> list[str]:
    """Return the architectures of the built module, such as "90a". It is empty without the module."""
    try:
        from bclip_fast import _cuda  # type: ignore[attr-defined]
    except ImportError:
        return []
    return str(_cuda.architectures).split(";")


def of_module(architectures: Sequence[str] = ()) -> list[MachineCode]:
    """Disassemble the built module, by default for all of its architectures. This takes seconds."""
    from bclip_fast import _cuda  # type: ignore[attr-defined]

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # cuobjdump writes to its working directory.
        run("cuobjdump", "-xelf", "all", Path(_cuda.__file__).resolve(), folder=folder)
        cubins = [
            (path, architecture)
            for architecture in architectures or _cuda.architectures.split(";")
            for path in sorted(folder.glob(f"*.sm_{architecture}.cubin"))
        ]
        with ThreadPoolExecutor() as pool:
            return [code for codes in pool.map(of_cubin, *zip(*cubins, strict=True)) for code in codes]
