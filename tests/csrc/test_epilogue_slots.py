"""The issue slots that the epilogues of the contrastive kernels take for an element of a complete tile."""

from __future__ import annotations

import pytest

from bclip_fast.benchmarks import cuda_resources
from bclip_fast.benchmarks.bounds import machine_code
from bclip_fast.ops.dispatch import MISSING

pytestmark = [
    pytest.mark.skipif("cuda" in MISSING, reason=MISSING.get("cuda", "")),
    pytest.mark.skipif(
        not machine_code.has_tools(), reason="cuobjdump or nvdisasm is missing: install the CUDA toolkit or Triton"
    ),
]
# A thread holds this many elements of a tile, and each takes an exponential.
ELEMENTS = 128


@pytest.fixture(scope="module")
def blocks(machine_codes):
    """By kernel: the opcodes of each stretch of straight code, for each type and for the architectures of the bounds.

    Other architectures have other instructions.
    """
    found = {"forward": [], "softmax": [], "sigmoid": []}
    for code in machine_codes:
        family, _, name = cuda_resources.kernel_name(code.symbol).partition("<")[0].partition("_")
        if family == "contrastive" and code.architecture in ("80", "90", "90a"):
            found[name].append([[one.opcode for one in block.instructions] for block in code.function.blocks])
    return found


# The softmax's stretch also stores its results. That of the forward pass includes the sums over rows and columns.
@pytest.mark.parametrize(("kernel", "most"), [("forward", 6.5), ("softmax", 8), ("sigmoid", 14)])
def test_complete_tile_takes_few_issue_slots_an_element(blocks, kernel, most):
    assert blocks[kernel]
    for code in blocks[kernel]:
        lengths = [len(block) for block in code if block.count("MUFU.EX2") == ELEMENTS]
        assert lengths and min(lengths) <= most * ELEMENTS, lengths


@pytest.mark.parametrize("kernel", ["softmax", "sigmoid"])
def test_gradient_tiles_are_stored_in_whole_vectors(blocks, kernel):
    """A thread stores 16 vectors of 16 bytes, in complete tiles and in others, and three sums at most."""
    assert blocks[kernel]
    for code in blocks[kernel]:
        opcodes = [opcode for block in code for opcode in block]
        assert opcodes.count("STG.E.128") == 32
        assert opcodes.count("STG.E") <= 3
