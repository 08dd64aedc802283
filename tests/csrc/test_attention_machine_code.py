"""The machine code of the attention kernels: reads of shared memory for each product, barriers, and no atomics."""

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
# The most ldmatrix instructions for a product, in the loops over queries and over the keys of dQ, by head dimension.
LDMATRIX = {32: (0.375, 1.0), 64: (0.375, 0.5), 96: (0.625, 5 / 12), 128: (0.625, 0.625)}


def kernels(machine_codes, prefix):
    """(name, architecture, function) of each kernel whose name starts with `prefix`."""
    for code in machine_codes:
        name = cuda_resources.kernel_name(code.symbol)
        if name.startswith(prefix):
            yield name, code.architecture, code.function


def innermost_loops(loops):
    for loop in loops:
        yield from innermost_loops(loop.children) if loop.children else [loop]


def counts(function, loop):
    """Numbers of matrix products, ldmatrix and exponentials in a loop."""
    names = [one.name for block in loop.blocks for one in function.blocks[block].instructions]
    return [names.count(name) for name in ("HMMA", "LDSM", "MUFU")]


def test_backward_reads_each_tile_of_shared_memory_for_two_others(machine_codes):
    """A warp takes 32 queries at once, and 32 keys if d <= 64. Dropout leaves registers for 16 queries only."""
    checked = 0
    for name, architecture, function in kernels(machine_codes, "attention_backward"):
        dim, dropout = int(name.split(", ")[1]), name.endswith("true>")
        loops = [counts(function, loop) for loop in innermost_loops(function.loops)]
        products = max(loop for loop in loops if loop[0] and loop[2])
        query_grad = max(loop for loop in loops if loop[0] and not loop[2])
        if not dropout:
            assert products[1] <= LDMATRIX[dim][0] * products[0], (name, architecture, products)
        assert query_grad[1] <= LDMATRIX[dim][1] * query_grad[0], (name, architecture, query_grad)
        checked += 1
    assert checked


def test_backward_has_two_barriers_for_each_strip_of_queries(machine_codes):
    """Two more stand before a later chunk of keys and after the last strip."""
    for name, architecture, function in kernels(machine_codes, "attention_backward"):
        barriers = sum(one.name == "BAR" for block in function.blocks for one in block.instructions)
        assert barriers == 4, (name, architecture)
