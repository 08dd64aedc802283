"""The order of the samples of one dataset, and the interleaving of several.

The shards of a dataset come in a random order, which is new in each pass. Their samples, one shard after another, are
shuffled within blocks of `shuffle_block`. A block touches few shards, so reads stay mostly sequential, and a rank only
needs the order of one block.

A mixture has members with whole-number shares s_1 ... s_M of sum S. A binary tree divides the members. Let l and r be
the shares of a node's halves. Then floor(P * r / (l + r)) of the first P positions at the node go to its right half.
So any S positions in a row have exactly s_m samples of member m. A formula gives the number of samples of a member
before any position. Sample k of member m is number k mod N_m of pass k // N_m, where N_m is the member's size.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def _mix(values: np.ndarray) -> np.ndarray:
    """Apply the finaliser of SplitMix64 (Steele, Lea, Flood 2014) to uint64 values. It is a bijection."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def permutation(length: int, *key: int) -> np.ndarray:
    """Return a random permutation of range(length), int64. It depends on `key`, but not on machine or numpy version."""
    return np.argsort(draws(length, *key), kind="stable")


def draws(count: int, *key: int) -> np.ndarray:
    """Return (count,) random uint64 that depend only on `key`."""
    state = np.zeros(1, np.uint64)
    for number in key:
        state = _mix(state ^ np.array([(number + 1) * _GOLDEN & _MASK], np.uint64))
    counters = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    return _mix(counters + state)


class ShuffledShards:
    """The order of one dataset's samples in each pass.

    Args:
        shard_sizes: number of samples in each shard.
        first: index of the dataset's first sample.
        shuffle_block: number of samples that are shuffled together. 1: keep the order within a shard.
        key: numbers that decide the order. Two datasets with different keys have independent orders.
    """

    def __init__(self, shard_sizes: Sequence[int], first: int, shuffle_block: int, *key: int) -> None:
        self.num_samples = sum(shard_sizes)
        self.first = first
        self._key, self._shuffle_block = key, shuffle_block
        self._sizes = np.asarray(shard_sizes, dtype=np.int64)
        self._starts = first + np.concatenate([[0], np.cumsum(self._sizes)])
        # Prefetching crosses the borders of blocks and passes, so cache a few of each.
        self._shards = functools.lru_cache(4)(self._shuffle_shards)
        self._block = functools.lru_cache(16)(self._shuffle_block_of)

    def _shuffle_shards(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the shards in the order of a pass, and the position where each ends."""
        order = permutation(len(self._sizes), *self._key, number, 0)
        return order, np.cumsum(self._sizes[order])

    def _shuffle_block_of(self, number: int, block: int) -> np.ndarray:
        """Return the indices at positions [block * shuffle_block, (block + 1) * shuffle_block) of a pass."""
        start = block * self._shuffle_block
        length = min(self._shuffle_block, self.num_samples - start)
        positions = start + permutation(length, *self._key, number, 1, block)
        order, ends = self._shards(number)
        shard = np.searchsorted(ends, positions, side="right")
        return positions - (ends - self._sizes[order])[shard] + self._starts[order[shard]]

    def sample(self, number: int, position: int) -> int:
        """Return the index at a position of pass `number`, 0 <= position < num_samples."""
        block, offset = divmod(position, self._shuffle_block)
        return int(self._block(number, block)[offset])


@dataclass(frozen=True)
class Member:
    """A dataset of a mixture.

    name: name for messages and metrics.
    num_shards: number of its shards.
    share: its number of samples among as many samples as all shares together. 0: none.
    fingerprint: hash of its content.
    """

    name: str
    num_shards: int
    share: int
    fingerprint: str = ""


@dataclass(frozen=True)
class Mixture:
    """Several datasets that are read as one. Their shards, and so their indices, follow one another.

    epoch_samples: number of samples in an epoch, before its incomplete last batch is left out.
    """

    members: tuple[Member, ...]
    epoch_samples: int


class Interleaving:
    """The division of an endless sequence of positions among members.

    Args:
        shares: whole numbers, at least 0, of which one is positive.
    """

    def __init__(self, shares: Sequence[int]) -> None:
        divisor = math.gcd(*shares)
        self._ends = [0, *itertools.accumulate(share // divisor for share in shares)]

    def _share(self, start: int, end: int) -> int:
        """Return the sum of the shares of members [start, end)."""
        return self._ends[end] - self._ends[start]

    def locate(self, position: int) -> tuple[int, int]:
        """Return the member at a position, and the number of its samples before it."""
        start, end = 0, len(self._ends) - 1
        while end - start > 1:
            middle = (start + end) // 2
            right, total = self._share(middle, end), self._share(start, end)
            before = position * right // total
            if (position + 1) * right // total > before:
                start, position = middle, before
            else:
                end, position = middle, position - before
        return start, position

    def counts(self, num_positions: int) -> list[int]:
        """Return the number of samples of each member among the first positions."""
        counts = [0] * (len(self._ends) - 1)

        def divide(start: int, end: int, num: int) -> None:
            if end - start == 1:
                counts[start] = num
            elif num:
                middle = (start + end) // 2
                right = num * self._share(middle, end) // self._share(start, end)
                divide(start, middle, num - right)
                divide(middle, end, right)

        divide(0, len(counts), num_positions)
        return counts

    def largest_count(self, member: int, length: int) -> int:
        """Return a bound on the number of samples of a member among any `length` positions in a row."""
        start, end = 0, len(self._ends) - 1
        while end - start > 1:
            middle = (start + end) // 2
            half = (start, middle) if member < middle else (middle, end)
            length = -(-length * self._share(*half) // max(1, self._share(start, end)))
            start, end = half
        return length
