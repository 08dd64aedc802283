"""The GPU resources of the kernels in `bclip_fast._cuda`, read from the compiled module without a GPU.

`python -m benchmarks.cuda_resources` writes results/cuda_resources.md. A test compares that file with the built module.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from .bounds import machine_code
from .bounds.machine_code import MachineCode

REPORT = Path(__file__).parent / "results" / "cuda_resources.md"
# CUDA C++ programming guide, technical specifications per compute capability.
REGISTERS = 65536  # of a multiprocessor
# Shared memory of a multiprocessor in KiB, and its number of threads. The system uses 1 KiB for each block.
MULTIPROCESSORS = {"80": (164, 2048), "86": (100, 1536), "87": (164, 1536), "89": (100, 1536), "90": (228, 2048)}
MULTIPROCESSORS |= {"100": (228, 2048), "103": (228, 2048), "120": (100, 1536), "121": (100, 1536)}


class Kernel(NamedTuple):
    """A kernel and its resources.

    name: name with the template's arguments.
    registers: registers per thread.
    spilled: bytes of a thread's stack, which takes the registers that do not fit.
    shared: bytes of shared memory per block.
    threads: threads per block.
    matrix_instructions: number of HMMA and HGMMA instructions in the code.
    groups: registers per thread that each group of 4 warps takes after the start, or () if all keep `registers`.
    copies: number of copies by the tensor memory accelerator (TMA) in the code, and those for a cluster (multicast).
    """

    name: str
    architecture: str
    registers: int
    spilled: int
    shared: int
    threads: int
    matrix_instructions: int
    groups: tuple[int, ...] = ()
    copies: tuple[int, int] = (0, 0)

    @property
    def blocks(self) -> int:
        """Number of blocks that fit on a multiprocessor."""
        # The hardware allocates registers to a warp in units of 256.
        registers = -(-self.registers * 32 // 256) * 256 * (self.threads // 32)
        kibibytes, threads = MULTIPROCESSORS[self.architecture.rstrip("af")]
        return min(REGISTERS // registers, kibibytes * 1024 // (self.shared + 1024), threads // self.threads)


def kernels(codes: Sequence[MachineCode] = ()) -> list[Kernel]:
    """Return all kernels of the built module except its probe.

    codes: the module's machine code, by default read here.
    """
    resources = []
    for code in codes or machine_code.of_module():
        name = kernel_name(code.symbol)
        if name != "probe":
            shared, threads = launch_of(name)
            matrix = len(re.findall(r" HG?MMA\.", code.listing))
            sizes = re.findall(r" USETMAXREG\.\w+[^;]* 0x([0-9a-f]+)\s*;", code.listing)
            copies = re.findall(r" UTMALDG\.\dD(\.MULTICAST)?", code.listing)
            resources.append(
                Kernel(
                    name,
                    code.architecture,
                    code.registers,
                    code.spilled,
                    shared,
                    threads,
                    matrix,
                    tuple(sorted({int(size, 16) for size in sizes})),
                    (len(copies), copies.count(".MULTICAST")),
                )
            )
    return sorted(resources)


def kernel_name(mangled: str) -> str:
    """Return a name such as attention_forward<Half, 64, 256, true>: the file and the template's arguments.

    mangled: the name in the Itanium ABI's mangling.
    """
    if tag := re.search(r"\d+Hopper(Forward|Softmax|Sigmoid)E", mangled):
        # CUTLASS's kernel, of which our epilogue and the type of the features are template arguments.
        return f"hopper_{tag[1].lower()}<{'Bfloat16' if 'bfloat16_t' in mangled else 'Half'}>"
    file = re.search(r"_\d+_((?:attention|contrastive)_\w+?|image)_cu_", mangled)
    if file is None:
        return "probe"
    if file[1] == "image":
        # In mangled names, h is uint8_t and f is float.
        kind = re.search(r"resizeI(?:NS0_\d+(Half|Bfloat16)E|([hf]))EE", mangled)
        return "image_weigh<>" if kind is None else f"image_resize<{kind[1] or {'h': 'uint8', 'f': 'float'}[kind[2]]}>"
    function = re.search(r"(softmax|sigmoid|forward|backward)I(.*?)EEv", mangled)
    assert function is not None, mangled
    types = re.findall(r"NS0_\d+(Half|Bfloat16)E|Li(\d+)E|Lb([01])E", function[2] + "E")
    arguments = [kind or number or ("true" if flag == "1" else "false") for kind, number, flag in types]
    operator = file[1].replace("gradient", function[1])
    return f"{operator}<{', '.join(arguments)}>"


def launch_of(name: str) -> tuple[int, int]:
    """Return the bytes of shared memory and the number of threads of a block."""
    from bclip_fast import _cuda as module  # type: ignore[attr-defined]

    if name.startswith("image"):
        return module.IMAGE_SHARED_BYTES if "resize" in name else 0, module.IMAGE_THREADS
    arguments = name[name.index("<") + 1 : -1].split(", ")
    if name.startswith("hopper"):
        forward = name.startswith("hopper_forward")
        return module.HOPPER_FORWARD_BYTES if forward else module.HOPPER_GRADIENT_BYTES, module.HOPPER_THREADS
    if name.startswith("contrastive"):
        return module.CONTRASTIVE_SHARED_BYTES, 128  # type: ignore[attr-defined]
    dim, size = int(arguments[1]), int(arguments[2])
    if name.startswith("attention_forward"):
        return module.attention_forward_shared_bytes(dim, size), 128  # type: ignore[attr-defined]
    # A block of the backward kernel has 4 warps for rows of up to 128 tokens, and 8 for longer ones.
    longest = 128 if size == 4 else 256
    return module.attention_backward_shared_bytes(dim, longest, 2**20), 32 * size  # type: ignore[attr-defined]


def report(kernels: list[Kernel]) -> str:
    """Return the Markdown table of the kernels."""
    lines = [
        "# GPU resources of the CUDA kernels",
        "",
        "`python -m benchmarks.cuda_resources` read these from the built module, without a GPU or a clock.",
        "Blocks is the number that fit on a multiprocessor, limited by registers, shared memory and threads.",
        "",
        "The kernels for Hopper start with equal registers for all threads. Then the warps that copy give theirs to",
        "the warps that multiply: `40, 232` are the registers of both. The last column has the number of copies by",
        "TMA, and of those that a cluster of two blocks shares (multicast).",
        "",
        "| kernel | sm | registers | spilled bytes | shared KiB | threads | blocks | HMMA, HGMMA | TMA |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {kernel.name} | {kernel.architecture} | {_registers(kernel)} | {kernel.spilled} | "
        f"{kernel.shared / 1024:.1f} | {kernel.threads} | {kernel.blocks} | {kernel.matrix_instructions} | "
        f"{'{}, {}'.format(*kernel.copies) if kernel.copies[0] else ''} |"
        for kernel in kernels
    ]
    return "\n".join(lines) + "\n"


def _registers(kernel: Kernel) -> str:
    """The registers of a thread: at the start, and of the groups after it."""
    return f"{kernel.registers}" + (f" → {', '.join(map(str, kernel.groups))}" if kernel.groups else "")


if __name__ == "__main__":
    REPORT.write_text(report(kernels()))
