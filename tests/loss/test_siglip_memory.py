"""The sigmoid loss needs on each rank a memory that doesn't grow with the number of ranks."""

from __future__ import annotations

from typing import Any

from ranks import on_ranks

from bclip_fast.benchmarks.siglip_memory import peak_of_rank

GLOBAL_BATCH, WIDTH = 2048, 64


def peaks(rank: int, num_ranks: int) -> int:
    return peak_of_rank(rank, num_ranks, GLOBAL_BATCH // num_ranks, WIDTH)


def peak(num_ranks: int) -> Any:
    return max(on_ranks(num_ranks, peaks, num_ranks))


def test_siglip_memory_is_flat_in_ranks():
    """At a fixed global batch, a rank of four takes no more bytes than a single process, and no similarity matrix.

    The count is exact: it holds every storage that torch's operators allocate, and not the process's other memory.
    """
    one, four = peak(1), peak(4)
    assert four <= one
    assert four < GLOBAL_BATCH * GLOBAL_BATCH // 4 * 4
