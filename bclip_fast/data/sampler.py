"""The order of the training samples, its division among ranks, and the state that resumes it.

The sample at global position p of epoch e depends only on (seed, e, p). The shards come in a random order. Their
samples, one shard after another, are shuffled within blocks of `shuffle_block`. A block touches few shards, so reads
stay mostly sequential, and a rank only needs the order of one block. Global batch n of an epoch has the positions
[n * B, (n + 1) * B). Rank r of R takes the r-th of its R equal slices, whose m equal parts are its micro-batches.
The batches therefore depend neither on the number of ranks nor on threads, and the number of consumed samples is a
sufficient state.

With a cost function, the R * m micro-batches are not slices. They still have equally many samples, but nearly equal
costs. Their content depends only on R * m.

A fallback replaces a damaged sample. It also depends only on (seed, e, p). Ranks therefore need no communication,
every batch keeps its size, and a resumed run on any number of ranks uses the same fallback.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bclip_fast.errors import UserError

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
# Fallbacks are drawn from the whole dataset, where damaged samples are rare. If this many in a row are damaged, the
# storage is at fault.
NUM_FALLBACKS = 16


def _mix(values: np.ndarray) -> np.ndarray:
    """Apply the finaliser of SplitMix64 (Steele, Lea, Flood 2014) to uint64 values. It is a bijection."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def permutation(length: int, *key: int) -> np.ndarray:
    """Return a random permutation of range(length), int64. It depends on `key`, but not on machine or numpy version."""
    return np.argsort(_draws(length, *key), kind="stable")


def _draws(count: int, *key: int) -> np.ndarray:
    """Return (count,) random uint64 that depend only on `key`."""
    state = np.zeros(1, np.uint64)
    for number in key:
        state = _mix(state ^ np.array([(number + 1) * _GOLDEN & _MASK], np.uint64))
    counters = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    return _mix(counters + state)


class _Stage(NamedTuple):
    """Global batches have `batch_size` samples from `epoch` on. `number` batches with `samples` in all come before."""

    epoch: int
    batch_size: int
    number: int
    samples: int


class ShardSampler:
    """The endless sequence of global batches, epoch after epoch, and one rank's part of each.

    An epoch skips the last len(dataset) % batch_size samples of its order, so that all batches have the same size. Each
    epoch skips different samples.

    Args:
        shard_sizes: number of samples in each shard, in the order of the dataset's indices.
        fingerprint: hash of the dataset's content. A state with another fingerprint is refused.
        batch_size: size B of the global batch, over all ranks.
        schedule: (epoch, batch size) pairs. Each sets B from that epoch on, in place of `batch_size`.
        micro_batch_size: number of samples in a rank's micro-batch. 0: all of the rank's part of the global batch.
        shuffle_block: number of samples that are shuffled together. 1: keep the order within a shard.
        cost: cost of a sample, given the epoch and its dataset index. Must agree on every rank. The samples of a global
            batch are sorted by descending cost and assigned to micro-batches in snake order, so that micro-batches cost
            about the same.

    Raises:
        UserError: ranks and micro-batches do not divide the batch, or the batch is larger than the dataset.
    """

    def __init__(
        self,
        shard_sizes: Sequence[int],
        fingerprint: str,
        *,
        batch_size: int,
        schedule: Sequence[tuple[int, int]] = (),
        micro_batch_size: int = 0,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle_block: int = 8192,
        cost: Callable[[int, int], int] | None = None,
    ) -> None:
        if shuffle_block < 1:
            raise UserError(f"shuffle_block={shuffle_block}: must be at least 1")
        self.num_samples = sum(shard_sizes)
        self._world_size = world_size
        self._micro_batch_size = micro_batch_size
        self._stages: list[_Stage] = []
        for epoch, size in [*([(0, batch_size)] if not schedule or schedule[0][0] else []), *schedule]:
            self._begin_stage(epoch, size)
        self.fingerprint = fingerprint
        self.seed = seed
        self.shuffle_block = shuffle_block
        self.num_consumed = 0
        self._rank = rank
        self._cost = cost
        self._sizes = np.asarray(shard_sizes, dtype=np.int64)
        self._starts = np.concatenate([[0], np.cumsum(self._sizes)])
        # Prefetching crosses the borders of blocks and epochs, so cache a few of each.
        self._shards = functools.lru_cache(4)(self._shuffle_shards)
        self._block = functools.lru_cache(16)(self._shuffle_block)
        self._by_cost = functools.lru_cache(2)(self._sort_by_cost)

    def _begin_stage(self, epoch: int, size: int) -> None:
        if size < 1 or size % self._world_size:
            raise UserError(
                f"batch_size={size} must be a positive multiple of the {self._world_size} ranks; it is the global batch"
            )
        if self.num_samples < size:
            raise UserError(
                f"batch_size={size} is larger than the dataset's {self.num_samples} samples; use a smaller batch"
            )
        local_size = size // self._world_size
        if self._micro_batch_size and local_size % self._micro_batch_size:
            raise UserError(
                f"micro_batch_size={self._micro_batch_size} does not divide the {local_size} pairs of a rank"
            )
        number = samples = 0
        if self._stages:
            last = self._stages[-1]
            if epoch <= last.epoch:
                raise UserError(f"batch_schedule: epoch {epoch} follows epoch {last.epoch}; the epochs must increase")
            batches = (epoch - last.epoch) * (self.num_samples // last.batch_size)
            number, samples = last.number + batches, last.samples + batches * last.batch_size
        self._stages.append(_Stage(epoch, size, number, samples))

    @property
    def max_batch_size(self) -> int:
        """Largest number of samples in one of this rank's micro-batches."""
        return self._micro_batch_size or max(stage.batch_size for stage in self._stages) // self._world_size

    def batch_size_of(self, epoch: int) -> int:
        """Return the size of the global batch in an epoch."""
        return next(stage.batch_size for stage in reversed(self._stages) if stage.epoch <= epoch)

    def num_batches_of(self, epochs: int) -> int:
        """Return the number of global batches in the first `epochs` epochs."""
        stage = next(stage for stage in reversed(self._stages) if stage.epoch <= epochs)
        return stage.number + (epochs - stage.epoch) * (self.num_samples // stage.batch_size)

    def samples_before(self, number: int) -> int:
        """Return the number of samples in all global batches before `number`."""
        stage = self._stage_of(number)
        return stage.samples + (number - stage.number) * stage.batch_size

    def locate(self, number: int) -> tuple[int, int]:
        """Return the epoch of global batch `number` (counted over all epochs), and the position of its first sample."""
        stage = self._stage_of(number)
        epoch, number = divmod(number - stage.number, self.num_samples // stage.batch_size)
        return stage.epoch + epoch, number * stage.batch_size

    def _stage_of(self, number: int) -> _Stage:
        return next(stage for stage in reversed(self._stages) if stage.number <= number)

    @property
    def next_batch(self) -> int:
        """Number of the next global batch."""
        stage = next(stage for stage in reversed(self._stages) if stage.samples <= self.num_consumed)
        return stage.number + (self.num_consumed - stage.samples) // stage.batch_size

    def _shuffle_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the shards in the order of an epoch, and the position where each ends."""
        order = permutation(len(self._sizes), self.seed, epoch, 0)
        return order, np.cumsum(self._sizes[order])

    def _shuffle_block(self, epoch: int, block: int) -> np.ndarray:
        """Return the dataset indices at positions [block * shuffle_block, (block + 1) * shuffle_block) of an epoch."""
        start = block * self.shuffle_block
        length = min(self.shuffle_block, self.num_samples - start)
        positions = start + permutation(length, self.seed, epoch, 1, block)
        order, ends = self._shards(epoch)
        number = np.searchsorted(ends, positions, side="right")
        return positions - (ends - self._sizes[order])[number] + self._starts[order[number]]

    def sample(self, epoch: int, position: int) -> int:
        """Return the dataset index at a global position of an epoch, 0 <= position < len(dataset)."""
        block, offset = divmod(position, self.shuffle_block)
        return int(self._block(epoch, block)[offset])

    def fallbacks(self, epoch: int, position: int) -> Iterator[int]:
        """Yield at most NUM_FALLBACKS dataset indices that may replace a damaged sample at a position, in this order.

        They are drawn from the whole dataset, because one cause may damage neighbouring samples. Samples of the same
        global batch are excluded, so that no pair occurs twice in it, unless the dataset is smaller than two batches.
        """
        size = self.batch_size_of(epoch)
        start = position // size * size
        end = min(start + size, self.num_samples)
        in_batch = {self.sample(epoch, other) for other in range(start, end)}
        draws = (_draws(4 * NUM_FALLBACKS, self.seed, epoch, 2, position) % np.uint64(self.num_samples)).tolist()
        allowed = [index for index in draws if index not in in_batch or self.num_samples < 2 * size]
        return iter(list(dict.fromkeys(allowed))[:NUM_FALLBACKS])

    def num_micro_batches(self, number: int) -> int:
        """Return the number of micro-batches of each rank in global batch `number`."""
        local_size = self._stage_of(number).batch_size // self._world_size
        return local_size // (self._micro_batch_size or local_size)

    def batch(self, number: int, micro_batch: int | None = None) -> tuple[int, list[int]]:
        """Return the epoch and the positions of this rank's samples in global batch `number`.

        Args:
            number: number of the global batch, counted over all epochs.
            micro_batch: number of the rank's micro-batch. None: all of them.
        """
        epoch, start = self.locate(number)
        parts_per_rank = self.num_micro_batches(number)
        parts = range(self._rank * parts_per_rank, (self._rank + 1) * parts_per_rank)
        if micro_batch is not None:
            parts = parts[micro_batch : micro_batch + 1]
        num_parts = parts_per_rank * self._world_size
        part_size = self.batch_size_of(epoch) // num_parts
        if self._cost is None or num_parts == 1:
            return epoch, list(range(start + parts.start * part_size, start + parts.stop * part_size))
        by_cost = self._by_cost(number)
        positions = []
        for part in parts:
            # Snake order: 0 .. n-1, n-1 .. 0, ...
            columns = (part, num_parts - 1 - part)
            positions += sorted(start + by_cost[row * num_parts + columns[row % 2]] for row in range(part_size))
        return epoch, positions

    def _sort_by_cost(self, number: int) -> list[int]:
        """Return the samples of a global batch, counted from its first, by descending cost."""
        assert self._cost is not None
        epoch, start = self.locate(number)
        positions = range(start, start + self.batch_size_of(epoch))
        costs = [self._cost(epoch, self.sample(epoch, position)) for position in positions]
        return sorted(range(len(costs)), key=lambda i: (-costs[i], i))

    def state_dict(self) -> dict[str, Any]:
        """Return the state that `load_state_dict` restores."""
        return {
            "samples": self.num_consumed,
            "batch_size": self._stages[0].batch_size,
            "batch_schedule": [[stage.epoch, stage.batch_size] for stage in self._stages[1:]],
            "shuffle_block": self.shuffle_block,
            "seed": self.seed,
            "fingerprint": self.fingerprint,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state. The number of ranks may differ.

        Raises:
            UserError: dataset, seed, batch size or shuffle block differ, which would change the order of samples.
        """
        for name, value in self.state_dict().items():
            # Older checkpoints have no batch_schedule.
            if name != "samples" and state.get(name, []) != value:
                what = {"fingerprint": "another dataset", "seed": "another seed"}.get(name, f"another {name}")
                raise UserError(
                    f"cannot resume with {what}: the checkpoint has {name} {state.get(name)}, this run has {value}"
                )
        self.num_consumed = int(state["samples"])
