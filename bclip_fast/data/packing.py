"""Micro-batches of bounded cost: a bin packing of the samples of a global batch."""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Sequence


def pack(costs: Sequence[int], budget: int, multiple: int) -> list[list[int]]:
    """Divide samples into as few bins as the method finds, so that the costs of no bin exceed `budget`.

    For each number of bins, the samples go by descending cost to the bin with the lowest sum (LPT: Graham 1969,
    doi 10.1137/0117039). The bins therefore also cost nearly the same. The result depends only on the arguments.

    Args:
        costs: cost of each sample, from 1 to `budget`.
        budget: largest sum of the costs of a bin.
        multiple: divisor of the number of bins, and of the number of samples. It is the number of ranks.

    Returns:
        The numbers of the samples in each bin, ascending. No bin is empty.
    """
    order = sorted(range(len(costs)), key=lambda i: (-costs[i], i))
    fewest, most = -(-sum(costs) // (budget * multiple)), len(costs) // multiple
    # The fewest bins, or one more for each rank, nearly always suffice.
    for factor in range(fewest, min(fewest + 2, most)):
        if (bins := _spread(costs, order, budget, factor * multiple)) is not None:
            return bins
    # With as many bins as samples, each bin has one.
    enough = bisect.bisect_left(
        range(most), True, lo=fewest, key=lambda factor: _spread(costs, order, budget, factor * multiple) is not None
    )
    bins = _spread(costs, order, budget, enough * multiple)
    assert bins is not None
    return bins


def _spread(costs: Sequence[int], order: Sequence[int], budget: int, num_bins: int) -> list[list[int]] | None:
    """Give each sample of `order` to the bin with the lowest sum. None if a bin exceeds the budget."""
    sums = [(0, number) for number in range(num_bins)]
    bins: list[list[int]] = [[] for _ in sums]
    for sample in order:
        total, number = sums[0]
        if total + costs[sample] > budget:
            return None
        heapq.heapreplace(sums, (total + costs[sample], number))
        bins[number].append(sample)
    return [sorted(samples) for samples in bins]
