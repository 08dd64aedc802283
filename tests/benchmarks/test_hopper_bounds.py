"""Tests of the bounds of the Hopper kernels: warp groups, TMA, multicast, and the goals for a step."""

from __future__ import annotations

import pytest
from kernel_works import work

from bclip_fast.benchmarks.bounds import goals, orders, shapes, store
from bclip_fast.benchmarks.bounds.model import bound
from bclip_fast.benchmarks.bounds.rates import GPUS

A100, H100 = GPUS["a100"], GPUS["h100"]


@pytest.mark.parametrize(
    ("ahead", "cycles"),
    [
        # Two groups of warps wait for one another after the products of both: 2 * 6400 clocks, and then 6400.
        (0.0, 19200),
        # A group starts its epilogue while the other still has a quarter of a main loop: half of the epilogues hide.
        (0.25, 16000),
        # The tensor cores never wait.
        (0.5, 12800),
        (1.0, 12800),
    ],
)
def test_group_of_warps_that_is_ahead_hides_its_epilogue(ahead, cycles):
    phases = [{}, {"HGMMA.64x256x16": 50}, {"MUFU.EX2": 400}]
    each = bound(work(phases, 132, threads=256, registers=168, shared=200 * 1024, ahead=ahead), H100)
    assert each.resident == 1
    assert each.seconds == pytest.approx(cycles / 1.83e9)
    assert each.limiter == ("tensor" if ahead >= 0.5 else "tensor (1 block)")


def test_copies_of_the_tma_bound_a_block():
    each = bound(work([{}, {"HGMMA.64x64x16": 1}, {}], 132, threads=256, tma_bytes=128 * 1000.0), H100)
    assert each.limiter == "TMA" and each.seconds == pytest.approx(1000 / 1.83e9)


def test_multicast_reads_features_of_columns_once_for_a_cluster():
    alone, shared = (shapes.Loss(4096, 512).work("forward", 128, 256, 85, None, 0, multicast) for multicast in (1, 2))
    tiles = 4096 // 128 * (4096 // 256)
    assert alone["l2_bytes"] - shared["l2_bytes"] == tiles * 128 * 512 * 2
    # The second block of the only cluster has no rows.
    assert shapes.Loss(128, 512).work("forward", 128, 256, 85, None, 0, 2)["blocks"] == 2


def test_wide_tiles_with_multicast_read_less_than_l2_gives_at_the_goal():
    """Half of the passes' 29.7 ms, without the products, needs 128 FLOP a byte of L2."""
    wide, square = (
        shapes.Loss(65536, 512).work("forward", 128, *sizes) for sizes in ((256, 85, None, 0, 2), (128, 128, None, 0))
    )
    assert wide["flops"] / wide["l2_bytes"] > 120 and square["flops"] / square["l2_bytes"] < 64


def test_order_of_hopper_counts_kernels_of_one_set():
    """A module has both sets, and a call takes one of them."""
    works = store.load().works
    record, general = (orders.record_of(works, architecture) for architecture in ("90a", "90"))
    key = "clip_loss", "float16", "B > 1024"
    own = sum(
        1e3 * each.seconds
        for work, each in store.bounds(works, "h100")
        if work.kernel in ("hopper_forward", "hopper_softmax") and work.shape == "B=65536, D=512"
    )
    assert record.entries[key].bound_ms["cuda"] == pytest.approx(own, abs=1e-3)
    assert own < 0.7 * general.entries[key].bound_ms["cuda"]
    gelu = "gelu", "float16", "large"
    assert record.entries[gelu] == general.entries[gelu]


def test_goals_compare_sums_of_bounds_and_products():
    rows = {tuple(row[:2]): row for row in goals.rows(store.load().works)}
    assert {("A100 SXM 40 GB", "CUDA, for all GPUs"), ("H100 SXM", "CUDA, for Hopper"), ("H200", "Triton")} <= set(rows)
    forward, _, gradient, _, products, total, goal = map(float, rows["H100 SXM", "CUDA, for Hopper"][2:9])
    # Two products of 4.4 TFLOP each.
    assert products == pytest.approx(2 * 2 * 65536**2 * 512 / 790e12 * 1e3, abs=0.05) and goal == 29.7
    assert total == pytest.approx(forward + gradient + products, abs=0.15) and total < goal
    assert rows["H100 SXM", "CUDA, for Hopper"][9].startswith("reached if the kernels run at")
