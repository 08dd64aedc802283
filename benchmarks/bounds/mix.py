"""Instruction mixes: the number of warp instructions of each kind in a piece of code."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from .sass import Instruction

# Counts by kind, and under STALL the sum of the stall counts in cycles.
Mix = Counter[str]

STALL = "STALL"

_FP32 = {"FFMA", "FADD", "FMUL", "FFMA2", "FADD2", "FMUL2"}
_FP64 = {"DFMA", "DADD", "DMUL", "DSETP"}
# Instructions of the integer pipe, which also compares, selects, shifts, packs and takes maxima.
_INTEGER = {
    "IADD3",
    "IADD",
    "VIADD",
    "IABS",
    "LEA",
    "LOP3",
    "LOP",
    "PLOP3",
    "SHF",
    "SHL",
    "SHR",
    "BMSK",
    "SGXT",
    "PRMT",
}
_INTEGER |= {"ISETP", "FSETP", "FSET", "FCHK", "SEL", "FSEL", "FMNMX", "FMNMX3", "IMNMX", "VIMNMX", "F2FP"}
_MEMORY = {"LDG", "STG", "LDS", "STS", "LDGSTS", "LDL", "STL", "LD", "ST"}


def kind_of(instruction: Instruction) -> str:
    """Return the kind of an instruction: its unit, with the width in bits or the shape where the time depends on it."""
    name, opcode = instruction.name, instruction.opcode
    if instruction.guard == "!PT":
        return "OTHER"  # it never runs, but takes an issue slot
    if name == "HMMA":
        return "HMMA." + opcode.split(".")[1]
    if name == "HGMMA":
        # The left operand comes from registers if the first operand after the sums is a register.
        operands = instruction.operands.split(",")
        return opcode.split(".")[0] + "." + opcode.split(".")[1] + (".R" if re.match(r"\s*R\d", operands[1]) else "")
    if name == "LDSM":
        return "LDSM." + opcode.rpartition(".")[2].removesuffix("x4").removeprefix("x")
    if name in _MEMORY:
        return f"{name}.{_width(opcode)}"
    if name == "MUFU":
        return "MUFU." + opcode.split(".")[1]
    if name in ("SHFL", "REDUX", "BAR", "MOVM", "STSM", "UTMALDG", "IMAD"):
        return name
    for kind, names in (("FP32", _FP32), ("FP64", _FP64), ("INT", _INTEGER)):
        if name in names:
            return kind
    return "OTHER"


def _width(opcode: str) -> int:
    """Return the bits that a lane moves."""
    parts = opcode.split(".")[1:]
    for part in parts:
        if part in ("64", "128"):
            return int(part)
        if part in ("U8", "S8"):
            return 8
        if part in ("U16", "S16"):
            return 16
    return 32


def mix_of(instructions: Iterable[Instruction]) -> Mix:
    """Return the mix of straight code."""
    mix: Mix = Counter()
    for instruction in instructions:
        mix[kind_of(instruction)] += 1
        mix[STALL] += instruction.stall
    return mix


def slots(mix: Mix) -> float:
    """Return the number of issue slots."""
    return sum(count for kind, count in mix.items() if kind != STALL)


def count(mix: Mix, prefix: str) -> float:
    """Return the number of instructions whose kind is `prefix`, with or without a width or shape."""
    return sum(number for kind, number in mix.items() if kind == prefix or kind.startswith(prefix + "."))


def matrix(mix: Mix) -> float:
    """Return the number of matrix instructions."""
    return count(mix, "HMMA") + count(mix, "HGMMA")


def add(mix: Mix, other: Mix, times: float = 1) -> None:
    """Add `times` the other mix to `mix`."""
    for kind, number in other.items():
        mix[kind] += number * times  # type: ignore[assignment]


def total(parts: Iterable[Mix]) -> Mix:
    """Return the sum of mixes."""
    result: Mix = Counter()
    for part in parts:
        add(result, part)
    return result
