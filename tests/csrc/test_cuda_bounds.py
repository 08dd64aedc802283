"""Tests of the bounds of the built CUDA kernels: no main loop may become slower."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest

from bclip_fast.benchmarks.bounds import cuda_code, machine_code, mix, report, store
from bclip_fast.benchmarks.bounds.model import loop_cycles, pipes
from bclip_fast.benchmarks.bounds.rates import GPUS
from bclip_fast.ops.dispatch import MISSING

pytestmark = [
    pytest.mark.skipif("cuda" in MISSING, reason=MISSING.get("cuda", "")),
    pytest.mark.skipif(
        not machine_code.has_tools(), reason="cuobjdump or nvdisasm is missing: install the CUDA toolkit or Triton"
    ),
]


@pytest.fixture(scope="module")
def works(machine_codes):
    return list(cuda_code.works(machine_codes))


def slower(built, stored):
    """Return the main loops of `built` whose bound or issue slots are 5 % above those in `stored`."""
    worse = []
    for gpu in ("a100", "h100"):
        before = {(work.kernel, work.shape): work for work in report.main_loops(stored, GPUS[gpu])}
        for work in report.main_loops(built, GPUS[gpu]):
            old = loop_cycles(before[work.kernel, work.shape], GPUS[gpu])
            new = loop_cycles(work, GPUS[gpu])
            if max(new.values()) > 1.05 * max(old.values()) or new["issue"] > 1.05 * old["issue"]:
                worse.append((gpu, work.kernel, work.shape))
    return worse


def of_cuda(works):
    return [work for work in works if work.backend == "cuda"]


def test_main_loops_are_as_fast_as_in_the_report(works):
    """A compiler may change the code too. Then `python -m benchmarks.bounds` writes new bounds."""
    stored = of_cuda(store.load().works)
    assert len(report.main_loops(works, GPUS["a100"])) == len(report.main_loops(stored, GPUS["a100"])) > 10
    assert slower(works, stored) == []


@pytest.mark.parametrize(("kind", "number"), [("LDSM.4", 60), ("OTHER", 200)])
def test_slower_main_loop_is_found(kind, number):
    """A loop with more of either kind in its 1024 products is named, and no other loop."""
    stored = of_cuda(store.load().works)

    def changed(work):
        before, loop, after = work.phases
        more = Counter({kind: number if kind == "OTHER" else 10 * number})
        return dataclasses.replace(work, phases=(before, loop + more, after))

    built = [changed(work) if work.kernel == "contrastive_softmax" else work for work in stored]
    assert {kernel for _, kernel, _ in slower(built, stored)} == {"contrastive_softmax"}


def test_loss_reads_each_matrix_of_shared_memory_for_four_products(works):
    for work in works:
        if work.operator in ("clip_loss", "siglip_loss"):
            loop = work.phases[1]
            assert mix.count(loop, "LDSM") <= 0.25 * mix.matrix(loop), work.kernel


def test_epilogues_take_few_issue_slots(works):
    """They evaluate a tile with one path for all threads, a fast reciprocal and a polynomial for log1p."""
    losses = [work for work in works if work.operator in ("clip_loss", "siglip_loss")]
    assert {work.architecture for work in losses} >= {"80", "90"}
    for work in losses:
        if work.kernel.endswith("sigmoid"):
            assert work.epilogue_slots <= 20, work.architecture
        else:
            # The exponential, its factors and sums, and for the gradient rounding and staging. In the kernels for
            # Hopper, a thread's elements lie in two rows, so it adds up more columns.
            most = 9 if work.kernel.startswith("hopper") else 8
            # The report's precision, because a thread for Hopper has 85 1/3 elements on average.
            assert round(work.element_slots, 1) <= most, (work.kernel, work.architecture)


def test_loss_can_reach_four_fifths_of_the_a100s_peak_in_every_resource(works):
    """At B = 65536, of which the products alone take 14.1 ms."""
    losses = [work for work in works if work.architecture == "80" and work.shape == "B=65536, D=512"]
    assert len(losses) == 3
    for work in losses:
        gpu = GPUS["a100"]
        cycles = pipes(work.phases[1], work.threads // 32, gpu, work.conflicts)
        least = cycles["tensor"]
        assert max(cycles.values()) == least
        # One warp alone on its sub-core, without help of the other block.
        cycles["stall counts"] = work.phases[1][mix.STALL]
        tiles = work.blocks * work.launches
        cycles["L2"] = work.l2_bytes / tiles / gpu.l2_bytes * gpu.multiprocessors
        cycles["HBM"] = work.hbm_bytes / tiles / gpu.hbm_bytes * gpu.clock_hz * gpu.multiprocessors
        assert {name: number for name, number in cycles.items() if number > least / 0.8} == {}, work.kernel


def test_attention_scores_and_results_take_few_slots_a_product(works):
    """The forward kernel's whole code for 197 tokens, with copies, exponentials and the softmax's sums."""
    named = [work for work in works if (work.kernel, work.shape) == ("attention_forward", "256 x 197, 12 x 64")]
    assert {work.architecture for work in named} >= {"80", "90"}
    for work in named:
        assert mix.slots(work.total) <= 7 * mix.matrix(work.total), work.architecture
        # K and V take 2 x 197 x 64 x 2 bytes of 16 bytes an access, and 13 strips of queries share their 4 warps.
        assert mix.count(work.total, "LDGSTS") <= 2 * 197 * 8 / 128 + 13 / 4 * 4
