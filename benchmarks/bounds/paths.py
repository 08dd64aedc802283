"""The cheapest path through a kernel, from its control flow and the number of turns of each loop.

A bound may only count work that every run does. So each branch takes the cheaper side. A plan can require the
instructions of the other side, for a tile that is in use or a copy that a loop needs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from . import mix as mixes
from .mix import Mix
from .sass import Function, Instruction, Loop

# By role of a loop: a number of iterations, or a number of instructions of a kind that the iterations run in all.
Turns = Mapping[str, "float | tuple[str, float]"]
# By role, or "" for code outside of loops: the instructions of each pass, by kind.
Requires = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class LoopCode:
    """The features of a loop: the role of the loop around it, its depth, and the mixes of its code.

    own: mix of the loop without its inner loops. total: mix with them.
    """

    parent: str
    depth: int
    own: Mix
    total: Mix


@dataclass(frozen=True)
class Variation:
    """A share of a loop's iterations, in which other turns and requirements apply to the loop and those inside it."""

    share: float
    turns: Turns = field(default_factory=dict)
    requires: Requires = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """The number of times that the parts of a kernel run, on average over the warps of a block.

    role: names a loop by its features.
    turns: turns of the loops, by role. ("STG", 16) means a loop that stores 16 times in all, however the compiler
        unrolls it. Loops of other roles don't run.
    copies: number of loops of a role that run, by default 1. The cheapest ones run. The compiler makes several loops
        of one, for remainders or for branches.
    requires: number of instructions of a pass. math.inf stands for as many as a path can have. It is the default for
        the instruction that counts a loop's turns.
    variations: iterations that differ, by role. Their shares add up to 1.
    optional: roles of loops that a path may leave out, because straight code can do their work.
    """

    role: Callable[[LoopCode], str]
    turns: Turns
    copies: Mapping[str, int] = field(default_factory=dict)
    requires: Requires = field(default_factory=dict)
    variations: Mapping[str, Sequence[Variation]] = field(default_factory=dict)
    optional: frozenset[str] = frozenset()


@dataclass
class Execution:
    """The instructions that an average warp executes.

    phases: mixes before the first matrix instruction, from there to the last one, and after it. Without matrix
        instructions, the first phase is the whole kernel.
    sections: the last phase, divided at the block's barriers.
    bodies: by role, the mix of one iteration.
    """

    phases: tuple[Mix, Mix, Mix]
    sections: list[Mix]
    bodies: dict[str, Mix]

    @property
    def total(self) -> Mix:
        """The mix of the whole kernel."""
        return mixes.total(self.phases)

    @property
    def longest_section(self) -> float:
        """The issue slots of the section with the most exponentials."""
        return mixes.slots(max(self.sections, key=lambda section: section["MUFU.EX2"]))


def execute(function: Function, plan: Plan, inside: str = "") -> Execution:
    """Return the least that an average warp executes.

    inside: role of a loop, of which only one iteration is analysed. "" analyses the whole kernel.

    Raises:
        ValueError: a loop lacks the instruction that counts its turns, so the plan doesn't fit the code, or no loop has
            the role `inside`.
    """
    walker = _Walker(function, plan)
    loop = next((loop for loop in function.walk() if inside and walker.roles[loop.header] == inside), None)
    if inside and loop is None:
        raise ValueError(f"{function.name} has no loop {inside!r}: the plan doesn't fit the code")
    parts = [part for step in walker.region(loop, plan.turns, plan.requires) for part in step.parts()]
    places = [i for i, (_, part) in enumerate(parts) if mixes.matrix(part)] or [len(parts)]
    first, last = places[0], places[-1] + 1
    sections: list[Mix] = [Counter()]
    for begins, part in parts[last:]:
        if begins:
            sections.append(Counter())
        mixes.add(sections[-1], part)
    before, within = (mixes.total(part for _, part in each) for each in (parts[:first], parts[first:last]))
    return Execution((before, within, mixes.total(sections)), sections, walker.bodies)


@dataclass(frozen=True)
class _Step:
    """All turns of a loop, or the code of a block, in which case `loop` is ""."""

    loop: str
    mix: Mix
    code: tuple[Instruction, ...] = ()

    def parts(self) -> list[tuple[bool, Mix]]:
        """The mixes of the parts, and whether each begins with a barrier of the block.

        The code is divided before each barrier, and around its matrix instructions.
        """
        if not self.code:
            return [(False, self.mix)]
        places = [i for i, instruction in enumerate(self.code) if instruction.name in ("HMMA", "HGMMA")]
        barriers = [i for i, instruction in enumerate(self.code) if instruction.name == "BAR"]
        edges = [places[0], places[-1] + 1] if places else []
        cuts = sorted({0, *edges, *(i for i in barriers if not places or not places[0] < i <= places[-1])})
        return [
            (start in barriers, mixes.mix_of(self.code[start:stop]))
            for start, stop in zip(cuts, [*cuts[1:], len(self.code)], strict=True)
        ]


# Numbers of visited loops, by role, and of executed instructions, by required kind.
_State = tuple[tuple[int, ...], tuple[float, ...]]


class _Walker:
    def __init__(self, function: Function, plan: Plan) -> None:
        self.function, self.plan = function, plan
        self.mixes = [mixes.mix_of(block.instructions) for block in function.blocks]
        self.bodies: dict[str, Mix] = {}
        self.roles: dict[int, str] = {}
        self._name(function.loops, "", 0)

    def _name(self, loops: Sequence[Loop], parent: str, depth: int) -> None:
        for loop in loops:
            total = self._sum(loop.blocks)
            own = self._sum(loop.blocks - frozenset().union(*(child.blocks for child in loop.children)))
            role = self.roles[loop.header] = self.plan.role(LoopCode(parent, depth, own, total))
            self._name(loop.children, role, depth + 1)

    def _sum(self, blocks: Iterable[int]) -> Mix:
        total: Mix = Counter()
        for block in blocks:
            mixes.add(total, self.mixes[block])
        return total

    def region(self, loop: Loop | None, turns: Turns, requires: Requires) -> list[_Step]:
        """Return the steps of the cheapest pass through the kernel or through one iteration of a loop."""
        blocks, children = self.function.blocks, self.function.loops if loop is None else loop.children
        child_of = {block: child for child in children for block in child.blocks}
        inside = set(range(len(blocks))) if loop is None else set(loop.blocks)
        entry = 0 if loop is None else loop.header
        node_of = {block: child_of[block].header if block in child_of else block for block in inside}
        costs = {child.header: self._turned(child, turns, requires) for child in children}
        step_of = {node: costs.get(node, self.mixes[node]) for node in node_of.values()}
        following: dict[int, list[int]] = {}
        for block in inside:
            after = {
                node_of[each] for each in blocks[block].successors if each in inside and (not loop or each != entry)
            }
            node = node_of[block]
            following[node] = sorted({*following.get(node, ()), *after} - {node})

        running = [self.roles[child.header] for child in children if mixes.slots(costs[child.header])]
        running = [role for role in running if role not in self.plan.optional]
        wanted = {role: min(self.plan.copies.get(role, 1), running.count(role)) for role in running}
        role = "" if loop is None else self.roles[loop.header]
        needs = requires.get(role, {})

        def gain(node: int) -> _State:
            visited = self.roles[node] if node in costs and mixes.slots(costs[node]) else None
            counts = tuple(mixes.count(step_of[node], kind) for kind in needs)
            return tuple(int(visited == name) for name in wanted), counts

        best: dict[int, dict[_State, tuple[float, tuple[int, _State] | None]]] = {
            entry: {gain(entry): (mixes.slots(step_of[entry]), None)}
        }
        order = _topological(entry, following)
        for node in order:
            for after_node in following[node]:
                cost, (loops, counts) = mixes.slots(step_of[after_node]), gain(after_node)
                states = best.setdefault(after_node, {})
                for state, (slots, _) in best[node].items():
                    reached = (
                        tuple(min(a + b, most) for a, b, most in zip(state[0], loops, wanted.values(), strict=True)),
                        tuple(a + b for a, b in zip(state[1], counts, strict=True)),
                    )
                    if reached not in states or slots + cost < states[reached][0]:
                        states[reached] = slots + cost, (node, state)

        latches = set() if loop is None else {node_of[latch] for latch in loop.latches}
        # The kernel may end inside a loop.
        ends = {node_of[block] for block in inside if self._ends(block)}
        last = [node for node in order if node in (latches if loop else ends)]

        def missing(end: tuple[int, _State]) -> tuple[float, ...]:
            loops, counts = end[1]
            distances = (
                -number if math.isinf(target) else abs(target - number)
                for target, number in zip(needs.values(), counts, strict=True)
            )
            return sum(wanted.values()) - sum(loops), *distances, best[end[0]][end[1]][0]

        place: tuple[int, _State] | None = min(((node, state) for node in last for state in best[node]), key=missing)
        steps: list[_Step] = []
        while place is not None:
            node, state = place
            code = () if node in costs else blocks[node].instructions
            steps.append(_Step(self.roles[node] if node in costs else "", step_of[node], code))
            place = best[node][state][1]
        return steps[::-1]

    def _ends(self, block: int) -> bool:
        code = self.function.blocks[block]
        return not code.successors or code.instructions[-1].name == "EXIT"

    def _turned(self, loop: Loop, turns: Turns, requires: Requires) -> Mix:
        """Return the mix of all turns of a loop. It is empty for a loop that doesn't run."""
        role = self.roles[loop.header]
        number = turns.get(role, 0)
        kind, needed = number if isinstance(number, tuple) else ("", number)
        total: Mix = Counter()
        if not needed:
            return total
        for variation in self.plan.variations.get(role) or [Variation(1.0)]:
            body: Mix = Counter()
            needs = {**requires, **variation.requires}
            changed = {**needs, role: {kind: math.inf, **needs.get(role, {})}} if kind else needs
            for step in self.region(loop, {**turns, **variation.turns}, changed):
                mixes.add(body, step.mix)
            carried = mixes.count(body, kind) if kind else 1
            if not carried:
                raise ValueError(
                    f"loop {role!r} of {self.function.name} has no {kind!r}: the plan doesn't fit the code"
                )
            if role not in self.bodies or mixes.matrix(body) > mixes.matrix(self.bodies[role]):
                self.bodies[role] = body
            mixes.add(total, body, variation.share * needed / carried)
        return total


def _topological(entry: int, following: Mapping[int, Sequence[int]]) -> list[int]:
    order, seen = [], {entry}
    pending = [(entry, iter(following[entry]))]
    while pending:
        node, rest = pending[-1]
        each = next(rest, None)
        if each is None:
            order.append(node)
            pending.pop()
        elif each not in seen:
            seen.add(each)
            pending.append((each, iter(following[each])))
    return order[::-1]
