"""The compiled CPU kernels keep their vectors in registers.

GCC 12 keeps a vector that is wider than the target's registers in memory. It copies the vector through general
registers, eight bytes at a time (vmovq, vpinsrq). Such kernels gave right results at a tenth of the speed.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from collections import defaultdict

import pytest

from bclip_fast import _cpu

KERNELS = "attention", "contrastive", "pointwise"
_LINE = re.compile(r"^\s*([0-9a-f]+):\s+(\S+)\s*(.*)$")
_JUMP = re.compile(r"^j\w+$")
_ARITHMETIC = re.compile(r"^v?(fn?m(add|sub)\d*|mul|add|sub)ps$")
# Instructions that assemble a vector from general registers. SSE2 has no vpinsrq and joins two halves instead. A single
# move of eight bytes (vmovq) is not evidence, because GCC also keeps integers in vector registers.
_INSERT = re.compile(r"^v?pinsrq$")
_FROM_GENERAL = re.compile(r"^%r\w+,%xmm\d+$")

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or not shutil.which("objdump") or not shutil.which("readelf"),
    reason="needs x86-64 and binutils (objdump, readelf)",
)


def functions_by_source():
    """Source file -> (name, start, end) of each of its functions with internal linkage, from the symbol table."""
    table = subprocess.run(["readelf", "-sW", _cpu.__file__], capture_output=True, text=True, check=True).stdout
    spans, source = defaultdict(list), ""
    for line in table.splitlines():
        fields = line.split()
        if len(fields) < 8 or not fields[0].rstrip(":").isdigit():
            continue
        if fields[3] == "FILE":
            source = fields[7]
        elif fields[3] == "FUNC" and fields[4] == "LOCAL" and int(fields[2], 0):
            start = int(fields[1], 16)
            spans[source].append((fields[7], start, start + int(fields[2], 0)))
    return spans


def instructions(start, end):
    command = [
        "objdump",
        "-d",
        "--no-show-raw-insn",
        f"--start-address={start}",
        f"--stop-address={end}",
        _cpu.__file__,
    ]
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
        match = _LINE.match(line)
        if match:
            yield int(match[1], 16), match[2], match[3]


def innermost_loops(code):
    """The instructions between each backward jump and its target, unless they contain another such loop."""
    first = code[0][0]
    spans = []
    for address, name, operands in code:
        target = re.match(r"([0-9a-f]+)\b", operands)
        if _JUMP.match(name) and target and first <= int(target[1], 16) <= address:
            spans.append((int(target[1], 16), address))
    for start, end in spans:
        if not any((start, end) != other and start <= other[0] and other[1] <= end for other in spans):
            yield [line for line in code if start <= line[0] <= end]


def copies_in_pieces(loop):
    """The instructions of a loop that assemble vectors from general registers."""
    moved = [line for line in loop if line[1] == "movq" and _FROM_GENERAL.match(line[2])]
    joined = [line for line in loop if line[1] == "punpcklqdq"]
    copies = [line for line in loop if _INSERT.match(line[1])] + (moved if len(moved) > 1 and joined else [])
    return [f"{address:x}: {name} {operands}" for address, name, operands in copies]


@pytest.mark.parametrize("instruction_set", ["plain", "avx2", "avx512"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_inner_loops_copy_no_vector_through_general_registers(kernel, instruction_set):
    # The functions of an instruction set are in this namespace, whose name is mangled.
    namespace = {"plain": "8portable", "avx2": "4avx2", "avx512": "6avx512"}[instruction_set]
    functions = functions_by_source()[f"{kernel}_isa.cpp"]
    functions = [(start, end) for name, start, end in functions if name.startswith(f"_ZN5bclip3cpu{namespace}")]
    if not functions:
        pytest.skip("the module was stripped or built without this instruction set")
    num_loops = 0
    for start, end in functions:
        code = list(instructions(start, end))
        for loop in innermost_loops(code):
            if not any(_ARITHMETIC.match(name) for _, name, _ in loop):
                continue
            num_loops += 1
            copies = copies_in_pieces(loop)
            assert not copies, f"the loop at {loop[0][0]:x} copies vectors in pieces: {copies[:4]}"
    assert num_loops >= 4, "no loops were found: does the test still read the machine code?"
