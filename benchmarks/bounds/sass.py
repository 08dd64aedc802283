"""Machine code of NVIDIA GPUs, parsed from nvdisasm's listing: instructions, basic blocks and loops."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

# An instruction, its guard and, in listings with -hex, the second half of its encoding in the next line.
_INSTRUCTION = re.compile(
    r"/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:@(?P<guard>!?U?P\w+)\s+)?(?P<opcode>[A-Z][A-Z0-9_.]*)(?P<operands>[^;]*);"
    r"(?:\s*/\* 0x[0-9a-f]{16} \*/\s*/\* 0x(?P<control>[0-9a-f]{16}) \*/)?"
)
_SHAPE = re.compile(r"x\d+x\d+[.\w]*")
_LABEL = re.compile(r"^(?P<label>[.$\w]+):", re.MULTILINE)
_TARGET = re.compile(r"`\(([.$\w]+)\)")
_CONDITION = re.compile(r"(BRA|JMP)\b.*?\s!?U?P\d|.*\bUR|.*~")
_JUMPS = "BRA", "BRX", "JMP", "JMX"
_SECTION = re.compile(r"^\s*\.section\s+\.text\.(\S+?),", re.MULTILINE)


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    guard: its predicate, such as "P0" or "!P0", or "" if it always runs.
    opcode: name with all modifiers, such as "HMMA.16816.F32".
    stall: least number of cycles until the warp issues its next instruction. 0 if the listing has no encodings.
    """

    address: int
    guard: str
    opcode: str
    operands: str
    stall: int = 0

    @property
    def name(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.partition(".")[0]


@dataclass(frozen=True)
class Block:
    """A basic block. `successors` are indices of blocks. A block without successors ends the kernel."""

    instructions: tuple[Instruction, ...]
    successors: tuple[int, ...]


@dataclass(frozen=True)
class Loop:
    """A natural loop: its header, the blocks that jump back, all its blocks, and the loops directly inside."""

    header: int
    latches: frozenset[int]
    blocks: frozenset[int]
    children: tuple[Loop, ...] = field(default=())


@dataclass(frozen=True)
class Function:
    """A kernel. Block 0 is its entry."""

    name: str
    blocks: tuple[Block, ...]

    @cached_property
    def loops(self) -> tuple[Loop, ...]:
        """The outermost loops, in the order of the code. Each holds its inner loops."""
        return _nested(_natural_loops(self.blocks))

    def walk(self) -> Iterator[Loop]:
        """All loops, an outer one before those inside it."""
        pending = list(reversed(self.loops))
        while pending:
            loop = pending.pop()
            yield loop
            pending.extend(reversed(loop.children))


def sections(listing: str) -> dict[str, str]:
    """Split the output of `nvdisasm -c`, with or without -hex, by function. Each section is named `.text.NAME`."""
    parts = _SECTION.split(listing)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def function(name: str, body: str) -> Function:
    """Parse the code of one section, without the subroutines after the kernel's code.

    A call counts as one instruction. The compiler puts rare cases of divisions into subroutines, and a bound may
    leave these out.
    """
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}  # index of the instruction after the label
    subroutine: int | None = None
    tokens = sorted([*_LABEL.finditer(body), *_INSTRUCTION.finditer(body)], key=lambda match: match.start())
    for token in tokens:
        if "label" in token.groupdict():
            labels[token["label"]] = len(instructions)
            if token["label"].startswith("$") and token["label"] != name and instructions and subroutine is None:
                subroutine = len(instructions)
            continue
        # Bits 105 to 108 of the encoding hold the stall count.
        stall = int(token["control"], 16) >> 41 & 15 if token["control"] else 0
        opcode, operands = token["opcode"], token["operands"].strip()
        if shape := _SHAPE.match(operands):
            # nvdisasm writes HGMMA.64 x128x16.F32.
            opcode, operands = opcode + shape[0], operands[shape.end() :].strip()
        instructions.append(Instruction(int(token["address"], 16), token["guard"] or "", opcode, operands, stall))
    # The padding after the last instruction is a jump to itself and NOPs.
    return Function(name, tuple(_blocks(instructions[:subroutine], labels)))


def _blocks(instructions: list[Instruction], labels: dict[str, int]) -> list[Block]:
    count = len(instructions)
    targets: dict[int, list[int]] = {}
    converge: dict[str, int] = {}  # by barrier register: where BSYNC continues
    for i, instruction in enumerate(instructions):
        places = [labels[label] for label in _TARGET.findall(instruction.operands) if labels.get(label, count) < count]
        if instruction.name == "BSSY":
            converge[instruction.operands.partition(",")[0]] = places[0] if places else count
        elif instruction.name == "BSYNC":
            place = converge.get(instruction.operands.split(",")[0], count)
            if place < count and place != i:
                targets[i] = [place]
        elif places and (instruction.name in _JUMPS or instruction.name == "CALL"):
            # On sm_80 a loop's end may be a call of a label in the same code, which never returns.
            targets[i] = places
    ends = {i for i, each in enumerate(instructions) if each.name in (*_JUMPS, "EXIT", "RET")}
    ends |= targets.keys()
    starts = sorted(
        {0, *(i + 1 for i in ends if i + 1 < count), *(place for each in targets.values() for place in each)}
    )
    index_of = {start: index for index, start in enumerate(starts)}
    blocks = []
    for start, stop in zip(starts, [*starts[1:], count], strict=True):
        last = stop - 1
        following = [index_of[place] for place in targets.get(last, ())]
        final = instructions[last]
        leaves = final.name in ("EXIT", "RET") or (last in targets and final.name != "BSYNC")
        # A branch may have its condition as an operand, such as BRA.DIV or BRA.U !UP0.
        conditional = final.guard not in ("", "PT") or bool(
            re.match(r"(BRA|JMP)\b.*?\s!?U?P\d|.*\bUR|.*~", _text(final))
        )
        if (not leaves or conditional) and stop < count:
            following.append(index_of[stop])
        blocks.append(Block(tuple(instructions[start:stop]), tuple(dict.fromkeys(following))))
    return blocks


def _text(instruction: Instruction) -> str:
    return f"{instruction.opcode} {instruction.operands.partition('`')[0]}"


def _natural_loops(blocks: tuple[Block, ...]) -> list[Loop]:
    dominators = _dominators(blocks)
    predecessors: dict[int, list[int]] = {i: [] for i in range(len(blocks))}
    latches: dict[int, set[int]] = {}
    for i in dominators:
        for successor in blocks[i].successors:
            predecessors[successor].append(i)
            # A jump to itself without other instructions is padding.
            if successor in dominators[i] and not (i == successor and len(blocks[i].instructions) == 1):
                latches.setdefault(successor, set()).add(i)
    loops = []
    for header, sources in latches.items():
        members, pending = {header}, [source for source in sources if source != header]
        while pending:
            block = pending.pop()
            if block not in members:
                members.add(block)
                pending.extend(predecessors[block])
        loops.append(Loop(header, frozenset(sources), frozenset(members)))
    return loops


def _dominators(blocks: tuple[Block, ...]) -> dict[int, set[int]]:
    """For each block that the entry reaches, that block and the blocks that every path to it passes."""
    order: list[int] = []
    seen, pending = {0}, [(0, iter(blocks[0].successors))]
    while pending:
        block, following = pending[-1]
        successor = next((each for each in following if each not in seen), None)
        if successor is None:
            order.append(block)
            pending.pop()
        else:
            seen.add(successor)
            pending.append((successor, iter(blocks[successor].successors)))
    order.reverse()
    predecessors: dict[int, list[int]] = {block: [] for block in order}
    for block in order:
        for successor in blocks[block].successors:
            predecessors[successor].append(block)
    dominators: dict[int, set[int]] = {0: {0}}
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            sets = [dominators[each] for each in predecessors[block] if each in dominators]
            new = set.intersection(*sets) | {block}
            if dominators.get(block) != new:
                dominators[block], changed = new, True
    return dominators


def _nested(loops: list[Loop]) -> tuple[Loop, ...]:
    """The outermost loops with the others inside them."""

    def inside(candidates: list[Loop]) -> tuple[Loop, ...]:
        outer = [loop for loop in candidates if not any(loop.blocks < other.blocks for other in candidates)]
        return tuple(
            Loop(loop.header, loop.latches, loop.blocks, inside([x for x in candidates if x.blocks < loop.blocks]))
            for loop in sorted(outer, key=lambda loop: loop.header)
        )

    return inside(loops)
