"""The GPU resources and the machine code of a Triton kernel, read from its compiled code without a GPU."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
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

    types: types of arguments. An argument without a type is an i32. "i32:16" is a multiple of 16, as in Triton's own
    notation, unless the kernel's `do_not_specialize` hides this from the compiler.
    constants: compile-time constants, and the compiler's options, which are names that the kernel does not have.
    Pointers and strides count as multiples of 16, as in real launches.
    """
    binary = _compiled(kernel, types, constants, capability)
    report = _disassembled("cuobjdump", ["--dump-resource-usage"], binary, folder)
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+).*LOCAL:(\d+)", report).groups()
    return Resources(int(registers), int(stack) + int(local), binary.metadata.shared)


def memory_instructions(
    kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any], capability: int, folder: Path
) -> tuple[Counter[str], Counter[str]]:
    """How often each kind of access to global memory is in the machine code, and in its loops.

    An instruction's name ends with its width, such as LDG.E.128 or STG.E.U16. Arguments as in `compiled_resources`.
    """
    listing = _disassembled("nvdisasm", ["-c"], _compiled(kernel, types, constants, capability), folder)
    instructions: list[tuple[int, str]] = []
    labels: dict[str, int] = {}
    jumps: list[tuple[int, str]] = []
    for line in listing.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)(.*)", line):
            if found[1].startswith("BRA") and (target := re.search(r"`\((\.L_\w+)\)", found[2])):
                jumps.append((len(instructions), target[1]))
            instructions.append((len(instructions), found[1]))
    # The last instruction is a jump to itself.
    loops = [(labels[target], place) for place, target in jumps if labels[target] < place]
    accesses = [(place, name) for place, name in instructions if name.startswith(("LDG", "STG"))]
    assert accesses, "no access to global memory was found: does this still read the machine code?"
    inside = (name for place, name in accesses if any(start <= place <= end for start, end in loops))
    return Counter(name for _, name in accesses), Counter(inside)


def instructions(
    kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any], capability: int, folder: Path
) -> Counter[str]:
    """How often each instruction is in the machine code, by its name with all suffixes. Arguments as above."""
    listing = _disassembled("nvdisasm", ["-c"], _compiled(kernel, types, constants, capability), folder)
    return Counter(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]+)", listing, re.MULTILINE))


def shared_bytes(kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any], capability: int) -> int:
    """Bytes of shared memory per program, as in `compiled_resources`, without the later stages of the compiler."""
    from triton._C.libtriton import ir, nvidia, passes
    from triton.backends.nvidia.compiler import get_ptx_version_from_options
    from triton.compiler.compiler import make_backend

    source, target, options = _source(kernel, types, constants, capability)
    backend = make_backend(target)
    options = backend.parse_options(dict(options))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions = backend.get_codegen_implementation(options), backend.get_module_map()
    module = source.make_ir(target, options, *functions, context)
    stages: dict[str, Any] = {}
    backend.add_stages(stages, options, source.language)
    for name in ("ttir", "ttgir"):
        module = stages[name](module, {})
    # The passes of the next stage up to the one that allocates shared memory.
    manager = ir.pass_manager(module.context)
    passes.ttgpuir.add_combine_tensor_select_and_if(manager)
    passes.convert.add_scf_to_cf(manager)
    passes.gluon.add_inliner(manager)
    version = get_ptx_version_from_options(options, capability)
    nvidia.passes.ttgpuir.add_allocate_shared_memory_nv(manager, capability, version)
    manager.run(module, "shared memory")
    return int(module.get_int_attr("ttg.shared"))


def _source(
    kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any], capability: int
) -> tuple[Any, Any, dict[str, Any]]:
    """Source, target and options for the compiler."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {name: value for name, value in constants.items() if name not in kernel.arg_names and value is not None}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {arg: "constexpr" if arg in constants else types.get(arg, "i32") for arg in kernel.arg_names}
    hidden = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
    aligned = [arg for arg, kind in signature.items() if kind.startswith("*") or "stride" in arg]
    aligned += [arg for arg, kind in signature.items() if kind.endswith(":16") and arg not in hidden]
    signature = {arg: kind.removesuffix(":16") for arg, kind in signature.items()}
    position = kernel.arg_names.index
    source = ASTSource(
        kernel,
        signature,
        {(position(arg),): value for arg, value in constants.items()},
        {(position(arg),): [["tt.divisibility", 16]] for arg in aligned},
    )
    return source, GPUTarget("cuda", capability, 32), options


def _compiled(kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any], capability: int) -> Any:
    import triton

    source, target, options = _source(kernel, types, constants, capability)
    return triton.compile(source, target=target, options=options)


def _disassembled(program: str, options: list[str], binary: Any, folder: Path) -> str:
    """The output of a program of Triton's for a kernel's machine code."""
    import triton

    cubin = folder / "kernel.cubin"
    cubin.write_bytes(binary.asm["cubin"])
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / program
    return subprocess.run([path, *options, cubin], capture_output=True, text=True, check=True).stdout
