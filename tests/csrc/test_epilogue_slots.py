"""The issue slots that the epilogues of the contrastive kernels take for an element of a complete tile."""

from __future__ import annotations

import re
import subprocess

import pytest

from bclip_fast.benchmarks import cuda_resources
from bclip_fast.ops.dispatch import MISSING

pytestmark = [
    pytest.mark.skipif("cuda" in MISSING, reason=MISSING.get("cuda", "")),
    pytest.mark.skipif(
        cuda_resources.cuobjdump() is None, reason="cuobjdump is missing: install the CUDA toolkit or Triton"
    ),
]
# A thread holds this many elements of a tile, and each takes an exponential.
ELEMENTS = 128
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")


@pytest.fixture(scope="module")
def code(tmp_path_factory):
    """By architecture, kernel and type: the instructions (address, opcode, operands) of the contrastive kernels."""
    from bclip_fast import _cuda

    folder, program = tmp_path_factory.mktemp("cubins"), cuda_resources.cuobjdump()
    subprocess.run([program, "-xelf", "all", _cuda.__file__], cwd=folder, capture_output=True, check=True)
    found = {}
    for path in folder.glob("*.cubin"):
        # The names of its symbols, not of the file, say what it holds.
        if b"_contrastive_" not in path.read_bytes():
            continue
        architecture = re.search(r"sm_(\w+)\.cubin", path.name)[1]
        text = subprocess.run([program, "-sass", str(path)], capture_output=True, text=True, check=True).stdout
        parts = re.split(r"\s+Function : (\S+)\n", text)[1:]
        for mangled, listing in zip(parts[::2], parts[1::2], strict=True):
            kernel = re.search(r"(forward|softmax|sigmoid)INS0_\d+(Half|Bfloat16)E", mangled).groups()
            found[(architecture, *kernel)] = [(int(a, 16), op, rest) for a, op, rest in INSTRUCTION.findall(listing)]
    assert len(found) == 3 * 2 * len(_cuda.architectures.split(";")), "three kernels of two types"
    # Other architectures have other instructions.
    return {key: instructions for key, instructions in found.items() if key[0] in ("80", "90", "90a")}


def straight_blocks(instructions):
    """The opcodes of each stretch of code that no branch enters or leaves."""
    targets = {int(place, 16) for _, _, rest in instructions for place in re.findall(r"\b0x([0-9a-f]+)\s*$", rest)}
    blocks, block = [], []
    for address, opcode, _ in instructions:
        if address in targets:
            blocks.append(block)
            block = []
        block.append(opcode)
        if opcode.partition(".")[0] in ("BRA", "BSYNC", "EXIT", "RET", "CALL"):
            blocks.append(block)
            block = []
    return [*blocks, block]


# The softmax's stretch also stores its results, and the forward pass's begins with the exponentials and sums over rows
# and columns.
@pytest.mark.parametrize(("kernel", "most"), [("forward", 6.5), ("softmax", 8), ("sigmoid", 14)])
def test_complete_tile_takes_few_issue_slots_an_element(code, kernel, most):
    for (architecture, name, kind), instructions in code.items():
        if name == kernel:
            blocks = [block for block in straight_blocks(instructions) if block.count("MUFU.EX2") == ELEMENTS]
            assert blocks, (architecture, name, kind)
            slots = min(map(len, blocks)) / ELEMENTS
            assert slots <= most, (architecture, name, kind, slots)


@pytest.mark.parametrize("kernel", ["softmax", "sigmoid"])
def test_gradient_tiles_are_stored_in_whole_vectors(code, kernel):
    """Each thread of a complete tile stores 16 vectors of 16 bytes, and so does one of another tile."""
    for (architecture, name, kind), instructions in code.items():
        if name == kernel:
            opcodes = [opcode for _, opcode, _ in instructions]
            assert opcodes.count("STG.E.128") == 32, (architecture, name, kind)
            assert opcodes.count("STG.E") <= 3, (architecture, name, kind)
