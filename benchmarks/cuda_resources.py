"""What the kernels of `bclip_fast._cuda` take of a GPU, read from the module itself: no GPU is needed.

`python -m benchmarks.cuda_resources` writes results/cuda_resources.md, which a test compares with what is built.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

REPORT = Path(__file__).parent / "results" / "cuda_resources.md"
# Registers of a multiprocessor; its shared memory in KiB, of which each block takes one for itself, and the threads it
# holds (CUDA C++ programming guide, technical specifications per compute capability).
REGISTERS = 65536
MULTIPROCESSORS = {"80": (164, 2048), "86": (100, 1536), "87": (164, 1536), "89": (100, 1536), "90": (228, 2048)}
MULTIPROCESSORS |= {"100": (228, 2048), "103": (228, 2048), "120": (100, 1536), "121": (100, 1536)}


class Kernel(NamedTuple):
    name: str  # with its template's arguments
    architecture: str
    registers: int  # of a thread
    spilled: int  # bytes of a thread's stack, where registers that don't fit go
    shared: int  # bytes of a block
    threads: int  # of a block
    matrix_instructions: int  # HMMA in its code

    @property
    def blocks(self) -> int:
        """How many fit on a multiprocessor; registers come to a warp in units of 256."""
        registers = -(-self.registers * 32 // 256) * 256 * (self.threads // 32)
        kibibytes, threads = MULTIPROCESSORS[self.architecture.rstrip("af")]
        return min(REGISTERS // registers, kibibytes * 1024 // (self.shared + 1024), threads // self.threads)


def cuobjdump() -> str | None:
    """The toolkit's, or the one that Triton brings."""
    triton = find_spec("triton")
    places = (
        [Path(place) / "backends/nvidia/bin" for place in (triton.submodule_search_locations or ())] if triton else []
    )
    return shutil.which("cuobjdump") or next((str(place / "cuobjdump") for place in places if place.exists()), None)


def kernels() -> list[Kernel]:
    """All kernels of the built module but its probe."""
    from bclip_fast import _cuda  # type: ignore[attr-defined]

    # Disassembling takes most of a minute, in a process of its own each.
    with ThreadPoolExecutor() as pool:
        return sorted(sum(pool.map(_kernels_for, _cuda.architectures.split(";")), []))


def _kernels_for(architecture: str) -> list[Kernel]:
    from bclip_fast import _cuda  # type: ignore[attr-defined]

    usage = _dump("--dump-resource-usage", "-arch", f"sm_{architecture}")
    code = _matrix_instructions(_dump("-sass", "-arch", f"sm_{architecture}"))
    found = []
    for mangled, registers, stack, local in re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", usage):
        name = _name_of(mangled)
        if name != "probe":
            shared, threads = _launch_of(name, _cuda)
            spilled = int(stack) + int(local)
            found.append(Kernel(name, architecture, int(registers), spilled, shared, threads, code[mangled]))
    return found


def _dump(*options: str) -> str:
    from bclip_fast import _cuda  # type: ignore[attr-defined]

    program = cuobjdump()
    assert program is not None, "cuobjdump is neither on the PATH nor in a Triton that is installed"
    return subprocess.run([program, *options, _cuda.__file__], capture_output=True, text=True, check=True).stdout


def _matrix_instructions(sass: str) -> dict[str, int]:
    parts = re.split(r"\s+Function : (\S+)\n", sass)[1:]
    return {name: len(re.findall(r"\bHMMA\.", code)) for name, code in zip(parts[::2], parts[1::2], strict=True)}


def _name_of(mangled: str) -> str:
    """attention_forward<Half, 64, 256, true>: the file, and the arguments of an Itanium-mangled template."""
    file = re.search(r"_\d+_((?:attention|contrastive)_\w+?|image)_cu_", mangled)
    if file is None:
        return "probe"
    if file[1] == "image":
        # By types: h is uint8_t, f float.
        kind = re.search(r"resizeI(?:NS0_\d+(Half|Bfloat16)E|([hf]))EE", mangled)
        return "image_weigh<>" if kind is None else f"image_resize<{kind[1] or {'h': 'uint8', 'f': 'float'}[kind[2]]}>"
    function = re.search(r"(softmax|sigmoid|forward|backward)I(.*?)EEv", mangled)
    assert function is not None, mangled
    types = re.findall(r"NS0_\d+(Half|Bfloat16)E|Li(\d+)E|Lb([01])E", function[2] + "E")
    arguments = [kind or number or ("true" if flag == "1" else "false") for kind, number, flag in types]
    operator = file[1].replace("gradient", function[1])
    return f"{operator}<{', '.join(arguments)}>"


def _launch_of(name: str, module: object) -> tuple[int, int]:
    """(bytes of shared memory, threads) of a block."""
    if name.startswith("image"):
        return module.IMAGE_SHARED_BYTES if "resize" in name else 0, module.IMAGE_THREADS  # type: ignore[attr-defined]
    arguments = name[name.index("<") + 1 : -1].split(", ")
    if name.startswith("contrastive"):
        return module.CONTRASTIVE_SHARED_BYTES, 128  # type: ignore[attr-defined]
    dim, size = int(arguments[1]), int(arguments[2])
    if name.startswith("attention_forward"):
        return module.attention_forward_shared_bytes(dim, size), 128  # type: ignore[attr-defined]
    # By its warps: 4 for rows of up to 128.
    longest = 128 if size == 4 else 256
    return module.attention_backward_shared_bytes(dim, longest, 2**20), 32 * size  # type: ignore[attr-defined]


def report(found: list[Kernel]) -> str:
    lines = [
        "# What the CUDA kernels take of a GPU",
        "",
        "Written by `python -m benchmarks.cuda_resources` from the built module; nothing here was timed.",
        "Blocks: how many fit on a multiprocessor by registers, shared memory and threads.",
        "",
        "| kernel | sm | registers | spilled bytes | shared KiB | threads | blocks | HMMA |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kernel in found:
        lines.append(
            f"| {kernel.name} | {kernel.architecture} | {kernel.registers} | {kernel.spilled} | "
            f"{kernel.shared / 1024:.1f} | {kernel.threads} | {kernel.blocks} | {kernel.matrix_instructions} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    REPORT.write_text(report(kernels()))
