"""Tests of the parser of machine code, and of the cheapest path through it, on listings made by hand."""

from __future__ import annotations

import math

import pytest

from bclip_fast.benchmarks.bounds import mix, sass
from bclip_fast.benchmarks.bounds.paths import LoopCode, Plan, Variation, execute


def listing(*lines: str) -> str:
    """Return code as nvdisasm lists it, from labels that end with a colon and instructions."""
    text, address = [], 0
    for line in lines:
        if line.endswith(":"):
            text.append(line)
        else:
            text.append(f"        /*{address:04x}*/                   {line} ;")
            address += 16
    return "\n".join(text)


def parse(*lines: str) -> sass.Function:
    return sass.function("kernel", listing(*lines))


def test_section_of_each_kernel_is_found():
    text = '\t.section\t.text.one,"ax",@progbits\n' + listing("EXIT")
    text += '\n\t.section\t.text.two,"ax",@progbits\n' + listing("NOP", "EXIT")
    sections = sass.sections(text)
    assert list(sections) == ["one", "two"]
    assert len(sass.function("two", sections["two"]).blocks[0].instructions) == 2


def test_instruction_with_encoding_has_guard_and_stall():
    text = (
        "        /*0120*/              @!P0 IADD3 R2, R4, 0x1, RZ ;            /* 0x00000008040078a5 */\n"
        "                                                                      /* 0x000fc80008011404 */\n"
        "        /*0130*/                   EXIT ;                             /* 0x000000000000794d */\n"
        "                                                                      /* 0x000fea0003800000 */\n"
    )
    first, last = sass.function("kernel", text).blocks[0].instructions
    assert (first.address, first.guard, first.opcode, first.stall) == (0x120, "!P0", "IADD3", 4)
    assert (last.name, last.stall) == ("EXIT", 5)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("HMMA.16816.F32.BF16 R4, R8, R12, R4", "HMMA.16816"),
        ("HGMMA.64 x128x16.F32 R24, gdesc[UR8], R24, gsb0", "HGMMA.64x128x16"),
        ("HGMMA.64 x64x16.F32 R24, R4, gdesc[UR8], R24", "HGMMA.64x64x16.R"),
        ("LDSM.16.MT88.4 R4, [R2]", "LDSM.4"),
        ("LDGSTS.E.BYPASS.LTC128B.128 [R2], [R4.64], P1", "LDGSTS.128"),
        ("LDG.E.U16.CONSTANT R2, [R4.64]", "LDG.16"),
        ("LDG.E.128 R4, desc[UR4][R2.64]", "LDG.128"),
        ("STS [R2+0x10], R4", "STS.32"),
        ("MUFU.EX2 R2, R2", "MUFU.EX2"),
        ("FFMA.FTZ R2, R2, R3, R4", "FP32"),
        ("FMNMX R2, R2, R3, PT", "INT"),
        ("@!PT LDS RZ, [RZ]", "OTHER"),
        ("BAR.SYNC.DEFER_BLOCKING 0x0", "BAR"),
    ],
)
def test_kind_names_unit_and_width(code, kind):
    [instruction, _] = parse(code, "EXIT").blocks[0].instructions
    assert mix.kind_of(instruction) == kind


def test_nested_loops_are_found():
    function = parse(
        "MOV R1, R2",
        ".L_outer:",
        "FADD R1, R1, R2",
        ".L_inner:",
        "FFMA R1, R1, R2, R3",
        "@P0 BRA `(.L_inner)",
        "IADD3 R4, R4, 0x1, RZ",
        "@P1 BRA `(.L_outer)",
        "EXIT",
        ".L_end:",
        "BRA `(.L_end)",
    )
    [outer] = function.loops
    [inner] = outer.children
    assert (outer.header, inner.header) == (1, 2)
    assert inner.blocks < outer.blocks
    # The padding after the kernel is no loop.
    assert list(function.walk()) == [outer, inner]


def test_call_of_label_in_same_code_is_a_jump():
    """On sm_80, nvcc leaves loops this way."""
    function = parse(
        ".L_loop:",
        "FADD R1, R1, R2",
        "@P1 CALL.REL.NOINC `(.L_after)",
        "BRA `(.L_loop)",
        ".L_after:",
        "EXIT",
        "$sub:",
        "FMUL R1, R1, R1",
        "RET.REL.NODEC R2 `(kernel)",
    )
    assert [block.successors for block in function.blocks] == [(2, 1), (0,), ()]
    assert len(function.loops) == 1


def test_bsync_continues_at_its_label():
    function = parse(
        "BSSY B0, `(.L_joined)",
        "@P0 BRA `(.L_other)",
        "FADD R1, R1, R1",
        "BSYNC B0",
        ".L_other:",
        "FMUL R1, R1, R1",
        ".L_joined:",
        "EXIT",
    )
    # From the first side, 2 instructions of the other side are left out.
    assert function.blocks[1].successors == (3, 2)


LOOP = (
    "MOV R1, R2",
    ".L_main:",
    "@!P2 BRA `(.L_products)",
    "LDGSTS.E.BYPASS.128 [R2], [R4.64]",
    ".L_products:",
    "HMMA.16816.F32 R4, R8, R12, R4",
    "HMMA.16816.F32 R4, R8, R12, R4",
    "@P0 BRA `(.L_main)",
    "BAR.SYNC.DEFER_BLOCKING 0x0",
    "MUFU.EX2 R1, R1",
    "@P1 BRA `(.L_slow)",
    "FADD R1, R1, R1",
    "BRA `(.L_store)",
    ".L_slow:",
    "FADD R1, R1, R1",
    "FADD R1, R1, R1",
    "FADD R1, R1, R1",
    "FADD R1, R1, R1",
    ".L_store:",
    "BAR.SYNC.DEFER_BLOCKING 0x0",
    "STG.E.128 [R2.64], R4",
    "EXIT",
)


def main_of(loop: LoopCode) -> str:
    return "main" if mix.matrix(loop.own) else "other"


def test_path_takes_cheaper_side_and_counts_turns():
    execution = execute(parse(*LOOP), Plan(main_of, {"main": ("HMMA", 8)}))
    # 4 turns of a branch, two products and a branch: the copy is not required.
    assert mix.matrix(execution.total) == 8 and mix.count(execution.total, "LDGSTS") == 0
    assert [mix.slots(phase) for phase in execution.phases] == [1, 16, 8]
    assert execution.phases[2]["FP32"] == 1
    assert execution.longest_section == 5 and [mix.slots(each) for each in execution.sections] == [0, 5, 3]


PERSISTENT = (
    "@P0 BRA `(.L_copies)",
    ".L_tile:",
    "FADD R1, R1, R1",
    "HGMMA.64 x256x16.F32 R24, gdesc[UR8], RZ, !UPT, gsb0",
    ".L_main:",
    "HGMMA.64 x256x16.F32 R24, gdesc[UR8], R24, gsb0",
    "@P1 BRA `(.L_main)",
    "MUFU.EX2 R1, R1",
    "STG.E.128 [R2.64], R4",
    "@P2 BRA `(.L_tile)",
    "EXIT",
    ".L_copies:",
    "UTMALDG.3D.MULTICAST [UR8], [UR24], UR26, desc[UR6]",
    "@P1 BRA `(.L_copies)",
    "EXIT",
)


def test_iteration_over_tiles_has_its_own_phases():
    """A block loops over tiles, and its warps have different loops."""

    def role(loop: LoopCode) -> str:
        if mix.count(loop.total, "UTMALDG"):
            return "copies"
        return "tile" if loop.depth == 0 else "main"

    function, turns = parse(*PERSISTENT), {"tile": 1.0, "main": ("HGMMA", 7.0), "copies": 1.0}
    tile = execute(function, Plan(role, turns), inside="tile")
    # 7 turns of 2 instructions, and the first product.
    assert [mix.slots(phase) for phase in tile.phases] == [1, 15, 3] and tile.phases[1]["HGMMA.64x256x16"] == 8
    copies = execute(function, Plan(role, turns), inside="copies")
    assert copies.total["UTMALDG"] == 1 and mix.matrix(copies.total) == 0
    with pytest.raises(ValueError, match="kernel has no loop 'other'"):
        execute(function, Plan(role, turns), inside="other")


def test_path_runs_required_instructions():
    plan = Plan(main_of, {"main": ("HMMA", 8)}, requires={"main": {"LDGSTS": math.inf}, "": {"FP32": 4}})
    execution = execute(parse(*LOOP), plan)
    assert mix.count(execution.total, "LDGSTS") == 4
    assert execution.phases[2]["FP32"] == 4


def test_variations_share_turns():
    without = Variation(0.75)
    copying = Variation(0.25, requires={"main": {"LDGSTS": math.inf}})
    plan = Plan(main_of, {"main": ("HMMA", 8)}, variations={"main": (copying, without)})
    assert mix.count(execute(parse(*LOOP), plan).total, "LDGSTS") == 1


def test_loop_that_ends_the_kernel_runs():
    code = parse(".L_main:", "HMMA.16816.F32 R4, R8, R12, R4", "@P0 EXIT", "BRA `(.L_main)")
    assert mix.matrix(execute(code, Plan(main_of, {"main": 3.0})).total) == 3


def test_plan_for_other_code_raises_an_error():
    with pytest.raises(ValueError, match="loop 'main' of kernel has no 'STG'"):
        execute(parse(*LOOP), Plan(main_of, {"main": ("STG", 8)}))
