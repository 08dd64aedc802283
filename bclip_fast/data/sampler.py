"""Which sample comes when: the order of training, its slices by rank, and the state that resumes it.

The sample at global position p of epoch e is a function of (seed, e, p) alone. Shards are put in a random order and
their samples, laid end to end, are shuffled within blocks of `shuffle_block`: a block touches few shards, so reads
stay mostly sequential, and no rank has to hold more than one block's order. Global batch n of an epoch is positions
[n * B, (n + 1) * B), and rank r of R takes the r-th of its R equal slices, whose m equal parts are its micro-batches.
So the batches depend neither on the number of ranks nor on threads, and the number of samples consumed is all there is
to remember. Where samples differ in what they cost, the R * m micro-batches are equally many samples of nearly equal
cost instead of slices: which samples meet in one depends on R * m alone.

A sample that turns out damaged is replaced by a reserve of its position, a function of (seed, e, p) as well: no rank
has to tell another, every batch keeps its size, and a resumed run, on any number of ranks, replaces it the same way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bclip_fast.errors import UserError

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
# Damage is rare and reserves come from everywhere in the dataset: this many bad ones in a row are another problem.
NUM_RESERVES = 16


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014) on uint64: a bijection without visible structure."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def permutation(length: int, *key: int) -> np.ndarray:
    """A random permutation of range(length), int64, the same for the same `key` on every machine and numpy version."""
    return np.argsort(_draws(length, *key), kind="stable")


def _draws(count: int, *key: int) -> np.ndarray:
    """(count,) random uint64, the same for the same `key`."""
    state = np.zeros(1, np.uint64)
    for number in key:
        state = _mix(state ^ np.array([(number + 1) * _GOLDEN & _MASK], np.uint64))
    counters = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    return _mix(counters + state)


class _Stage(NamedTuple):
    """From `epoch` on global batches have `batch_size` samples; `number` batches of `samples` in all come before."""

    epoch: int
    batch_size: int
    number: int
    samples: int


class SampleStream:
    """The endless sequence of global batches, epoch after epoch, and one rank's slice of each.

    The last len(dataset) % batch_size samples of an epoch's order are left out, so that every rank sees equally many
    batches of equal size; another epoch leaves out others.

    Args:
        shard_sizes: samples in each shard, in the order of the dataset's indices.
        fingerprint: names the dataset's content; a state is only restored where it is the same.
        batch_size: the global batch B, over all ranks.
        schedule: (epoch, batch size) pairs: B from that epoch on, in place of `batch_size`.
        micro_batch_size: samples of a rank's micro-batch; 0: all that it has of a global batch.
        shuffle_block: samples shuffled together; 1 leaves the order within a shard as written.
        cost: of a dataset index, the same on every rank. Dearest first, the samples of a global batch are dealt to the
            micro-batches of all ranks, there and back again.

    Raises:
        UserError: a batch that ranks and micro-batches don't divide, or that is larger than the dataset.
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
        cost: Callable[[int], int] | None = None,
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
        # Prefetching crosses block and epoch borders, so a few of each are kept.
        self._shards = functools.lru_cache(4)(self._shuffle_shards)
        self._block = functools.lru_cache(16)(self._shuffle_block)
        self._dearest = functools.lru_cache(2)(self._sort_by_cost)

    def _begin_stage(self, epoch: int, size: int) -> None:
        if size < 1 or size % self._world_size:
            raise UserError(
                f"batch_size={size} is not a positive multiple of the {self._world_size} ranks; it is the global batch"
            )
        if self.num_samples < size:
            raise UserError(
                f"batch_size={size} is larger than the dataset's {self.num_samples} samples; use a smaller batch"
            )
        share = size // self._world_size
        if self._micro_batch_size and share % self._micro_batch_size:
            raise UserError(f"micro_batch_size={self._micro_batch_size} does not divide the {share} pairs of a rank")
        number = samples = 0
        if self._stages:
            last = self._stages[-1]
            if epoch <= last.epoch:
                raise UserError(f"batch_schedule: epoch {epoch} comes after epoch {last.epoch}; its epochs must rise")
            batches = (epoch - last.epoch) * (self.num_samples // last.batch_size)
            number, samples = last.number + batches, last.samples + batches * last.batch_size
        self._stages.append(_Stage(epoch, size, number, samples))

    @property
    def max_batch_size(self) -> int:
        """The largest number of samples that a rank is handed at a time."""
        return self._micro_batch_size or max(stage.batch_size for stage in self._stages) // self._world_size

    def batch_size_of(self, epoch: int) -> int:
        """The global batch in an epoch."""
        return next(stage.batch_size for stage in reversed(self._stages) if stage.epoch <= epoch)

    def num_batches_of(self, epochs: int) -> int:
        """Global batches in the first `epochs` epochs."""
        stage = next(stage for stage in reversed(self._stages) if stage.epoch <= epochs)
        return stage.number + (epochs - stage.epoch) * (self.num_samples // stage.batch_size)

    def samples_before(self, number: int) -> int:
        """Samples of all global batches before `number`."""
        stage = self._stage_of(number)
        return stage.samples + (number - stage.number) * stage.batch_size

    def locate(self, number: int) -> tuple[int, int]:
        """Epoch of global batch `number`, counted over all epochs, and the position in it of its first sample."""
        stage = self._stage_of(number)
        epoch, number = divmod(number - stage.number, self.num_samples // stage.batch_size)
        return stage.epoch + epoch, number * stage.batch_size

    def _stage_of(self, number: int) -> _Stage:
        return next(stage for stage in reversed(self._stages) if stage.number <= number)

    @property
    def next_batch(self) -> int:
        """The number of the global batch that comes next."""
        stage = next(stage for stage in reversed(self._stages) if stage.samples <= self.num_consumed)
        return stage.number + (self.num_consumed - stage.samples) // stage.batch_size

    def _shuffle_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards in this epoch's order, and where each ends in it."""
        order = permutation(len(self._sizes), self.seed, epoch, 0)
        return order, np.cumsum(self._sizes[order])

    def _shuffle_block(self, epoch: int, block: int) -> np.ndarray:
        """Dataset indices at positions [block * shuffle_block, (block + 1) * shuffle_block) of the epoch."""
        start = block * self.shuffle_block
        length = min(self.shuffle_block, self.num_samples - start)
        places = start + permutation(length, self.seed, epoch, 1, block)
        order, ends = self._shards(epoch)
        number = np.searchsorted(ends, places, side="right")
        return places - (ends - self._sizes[order])[number] + self._starts[order[number]]

    def sample(self, epoch: int, position: int) -> int:
        """The dataset index at a global position, 0 <= position < len(dataset), of an epoch."""
        block, place = divmod(position, self.shuffle_block)
        return int(self._block(epoch, block)[place])

    def reserves(self, epoch: int, position: int) -> Iterator[int]:
        """Dataset indices, at most NUM_RESERVES, to be tried in turn in place of a damaged sample at a position.

        They are drawn from the whole dataset, since what damaged one sample may have damaged its neighbours. Those of
        the same global batch are passed over, as a pair must not stand twice in it, unless the dataset is so small
        that few others are left.
        """
        size = self.batch_size_of(epoch)
        start = position // size * size
        end = min(start + size, self.num_samples)
        taken = {self.sample(epoch, place) for place in range(start, end)}
        draws = (_draws(4 * NUM_RESERVES, self.seed, epoch, 2, position) % np.uint64(self.num_samples)).tolist()
        free = [index for index in draws if index not in taken or self.num_samples < 2 * size]
        return iter(list(dict.fromkeys(free))[:NUM_RESERVES])

    def num_micro_batches(self, number: int) -> int:
        """Micro-batches of each rank in global batch `number`."""
        share = self._stage_of(number).batch_size // self._world_size
        return share // (self._micro_batch_size or share)

    def batch(self, number: int, micro_batch: int | None = None) -> tuple[int, list[int]]:
        """(epoch, positions in it) of this rank's samples, or of one micro-batch of them, in global batch `number`.

        Batches are counted over all epochs.
        """
        epoch, start = self.locate(number)
        of_rank = self.num_micro_batches(number)
        parts = range(self._rank * of_rank, (self._rank + 1) * of_rank)
        if micro_batch is not None:
            parts = parts[micro_batch : micro_batch + 1]
        num_parts = of_rank * self._world_size
        share = self.batch_size_of(epoch) // num_parts
        if self._cost is None or num_parts == 1:
            return epoch, list(range(start + parts.start * share, start + parts.stop * share))
        dearest = self._dearest(number)
        positions = []
        for part in parts:
            turns = (part, num_parts - 1 - part)
            positions += sorted(start + dearest[k * num_parts + turns[k % 2]] for k in range(share))
        return epoch, positions

    def _sort_by_cost(self, number: int) -> list[int]:
        """The samples of a global batch, counted from its first, dearest first."""
        assert self._cost is not None
        epoch, start = self.locate(number)
        places = range(start, start + self.batch_size_of(epoch))
        costs = [self._cost(self.sample(epoch, position)) for position in places]
        return sorted(range(len(costs)), key=lambda place: (-costs[place], place))

    def state_dict(self) -> dict[str, Any]:
        return {
            "samples": self.num_consumed,
            "batch_size": self._stages[0].batch_size,
            "batch_schedule": [[stage.epoch, stage.batch_size] for stage in self._stages[1:]],
            "shuffle_block": self.shuffle_block,
            "seed": self.seed,
            "fingerprint": self.fingerprint,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` stood; the number of ranks may differ.

        Raises:
            UserError: another dataset, seed, batch size or block: the order would not be the same; names both values.
        """
        for name, own in self.state_dict().items():
            # Older checkpoints knew no schedule.
            if name != "samples" and state.get(name, []) != own:
                what = {"fingerprint": "another dataset", "seed": "another seed"}.get(name, f"another {name}")
                raise UserError(
                    f"cannot resume with {what}: the checkpoint has {name} {state.get(name)}, this run has {own}"
                )
        self.num_consumed = int(state["samples"])
