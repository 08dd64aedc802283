"""The machine code of the loops that multiply matrices: what a warp waits for, and how blocks add their results."""

from __future__ import annotations

import re

import pytest

from bclip_fast.benchmarks import cuda_resources
from bclip_fast.benchmarks.bounds import machine_code
from bclip_fast.benchmarks.bounds.model import resident_blocks
from bclip_fast.benchmarks.bounds.rates import GPUS
from bclip_fast.ops.dispatch import MISSING

pytestmark = [
    pytest.mark.skipif("cuda" in MISSING, reason=MISSING.get("cuda", "")),
    pytest.mark.skipif(
        not machine_code.has_tools(), reason="cuobjdump or nvdisasm is missing: install the CUDA toolkit or Triton"
    ),
]
A100 = GPUS["a100"]
# The products of a step of 32 columns of the features, for the 64 x 64 elements of a warp.
PRODUCTS = 64


def named(codes, pattern):
    """The kernels whose names match, on the architectures of the bounds. Other ones have other instructions."""
    names = {code: cuda_resources.kernel_name(code.symbol) for code in codes}
    found = [code for code in codes if re.match(pattern, names[code]) and code.architecture in ("80", "90", "90a")]
    assert found, pattern
    return found


def main_loop(code):
    """The instructions of the loop that copies and multiplies, which is one stretch of straight code."""
    blocks = code.function.blocks
    loops = [loop for loop in code.function.walk() if len(loop.blocks) == 1]
    bodies = [blocks[loop.header].instructions for loop in loops]
    (body,) = [
        body
        for body in bodies
        if sum(one.name == "HMMA" for one in body) == PRODUCTS and any(one.name == "LDGSTS" for one in body)
    ]
    return body


def registers(operand, count):
    match = re.match(r"\s*R(\d+)", operand)
    return set(range(int(match[1]), int(match[1]) + count)) if match else set()


def products_before_use(body):
    """For each ldmatrix of a loop: the products that the warp issues before the first one that reads the result."""
    distances = []
    for place, load in enumerate(body):
        if load.name != "LDSM":
            continue
        loaded, distance = registers(load.operands, 4), 0
        # The loop starts again after its end.
        for one in (*body[place + 1 :], *body[:place]):
            if one.name == "HMMA":
                operands = one.operands.split(",")
                if loaded & (registers(operands[1], 4) | registers(operands[2], 2)):
                    break
                distance += 1
        distances.append(distance)
    return distances


def test_loss_loads_fragments_while_it_multiplies_earlier_ones(machine_codes):
    """A load from shared memory takes about 30 clocks, and 8 products take 64 on an A100 and 48 on an H100."""
    for code in named(machine_codes, "contrastive"):
        distances = products_before_use(main_loop(code))
        assert len(distances) == 16 and min(distances) >= 8, (code.symbol, code.architecture, distances)


def test_distance_to_the_first_product_is_found():
    """Also across the end of the loop, where registers are those of the next turn."""
    lines = ["HMMA R0, R8, R12, R0", "LDSM R12, [R1]", "HMMA R4, R8, R14, R4", "LDSM R8, [R2]", "HMMA R0, R16, R18, R0"]

    class Line:
        def __init__(self, text):
            self.name, self.operands = text.split(" ", 1)

    assert products_before_use([Line(line) for line in lines]) == [0, 1]


def test_loss_loop_issues_little_besides_products(machine_codes):
    """A single warp then keeps the matrix unit of its sub-core busy, if its data are there."""
    for code in named(machine_codes, "contrastive"):
        body = main_loop(code)
        assert len(body) <= 2.2 * PRODUCTS, (code.symbol, code.architecture, len(body))
        if code.architecture == "80":
            assert sum(one.stall for one in body) <= 1.03 * A100.hmma_clocks * PRODUCTS, code.symbol


def test_two_blocks_of_the_loss_fit_on_every_multiprocessor(machine_codes):
    """Also on sm_86, sm_89 and sm_120, which have 100 KiB of shared memory, and 65536 registers as the others."""
    for code in named(machine_codes, "contrastive"):
        shared, threads = cuda_resources.launch_of(cuda_resources.kernel_name(code.symbol))
        for kibibytes in {kibibytes for kibibytes, _ in cuda_resources.MULTIPROCESSORS.values()}:
            gpu = A100._replace(shared_kib=kibibytes)
            assert resident_blocks(code.registers, shared, threads, gpu) >= 2, (code.symbol, kibibytes)


def test_two_blocks_of_the_attention_forward_pass_fit_on_an_a100(machine_codes):
    for code in named(machine_codes, "attention_forward"):
        shared, threads = cuda_resources.launch_of(cuda_resources.kernel_name(code.symbol))
        assert resident_blocks(code.registers, shared, threads, A100) >= 2, code.symbol


def test_no_kernel_adds_with_atomics(machine_codes):
    """The order of atomic sums changes between runs, and so would their last digits. Arrivals at barriers add nothing.

    Those of Hopper are called SYNCS.ARRIVE.RED.
    """
    atomics = {"RED", "REDG", "REDAS", "ATOM", "ATOMG", "ATOMS", "UTMAREDG"}
    for code in machine_codes:
        names = {one.name for block in code.function.blocks for one in block.instructions}
        assert "EXIT" in names and not names & atomics, code.symbol
