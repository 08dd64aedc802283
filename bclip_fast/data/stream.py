"""Which sample comes when: the order of training, its slices by rank, and the state that resumes it.

The sample at global position p of epoch e is a function of (seed, e, p) alone. Shards are put in a random order and
their samples, laid end to end, are shuffled within blocks of `shuffle_block`: a block touches few shards, so reads
stay mostly sequential, and no rank has to hold more than one block's order. Global batch n of an epoch is positions
[n * B, (n + 1) * B), and rank r of R takes the r-th of its R equal slices. So the batches depend neither on the number
of ranks nor on threads, and the number of samples consumed is all there is to remember. Where samples differ in what
they cost, the ranks take equally many of each global batch in shares of nearly equal cost instead of slices.

A sample that turns out damaged is replaced by a reserve of its position, a function of (seed, e, p) as well: no rank
has to tell another, every batch keeps its size, and a resumed run, on any number of ranks, replaces it the same way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

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


class SampleStream:
    """The endless sequence of global batches, epoch after epoch, and one rank's slice of each.

    The last len(dataset) % batch_size samples of an epoch's order are left out, so that every rank sees equally many
    batches of equal size; another epoch leaves out others.

    Args:
        shard_sizes: samples in each shard, in the order of the dataset's indices.
        fingerprint: names the dataset's content; a state is only restored where it is the same.
        batch_size: the global batch B, over all ranks.
        shuffle_block: samples shuffled together; 1 leaves the order within a shard as written.
        cost: of a dataset index, the same on every rank. Dearest first, the samples of a global batch are dealt to the
            ranks, there and back again.

    Raises:
        UserError: a batch that the world size doesn't divide, or that is larger than the dataset.
    """

    def __init__(
        self,
        shard_sizes: Sequence[int],
        fingerprint: str,
        *,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle_block: int = 8192,
        cost: Callable[[int], int] | None = None,
    ) -> None:
        if batch_size < 1 or batch_size % world_size:
            raise UserError(
                f"batch_size={batch_size} is not a positive multiple of the {world_size} ranks; it is the global batch"
            )
        if shuffle_block < 1:
            raise UserError(f"shuffle_block={shuffle_block}: must be at least 1")
        self.num_samples = sum(shard_sizes)
        if self.num_samples < batch_size:
            raise UserError(
                f"batch_size={batch_size} is larger than the dataset's {self.num_samples} samples; use a smaller batch"
            )
        self.batch_size = batch_size
        self.rank_batch_size = batch_size // world_size
        self.num_batches = self.num_samples // batch_size
        self.fingerprint = fingerprint
        self.seed = seed
        self.shuffle_block = shuffle_block
        self.num_consumed = 0
        self._rank = rank
        self._world_size = world_size
        self._cost = cost
        self._sizes = np.asarray(shard_sizes, dtype=np.int64)
        self._starts = np.concatenate([[0], np.cumsum(self._sizes)])
        # Prefetching crosses block and epoch borders, so a few of each are kept.
        self._shards = functools.lru_cache(4)(self._shuffle_shards)
        self._block = functools.lru_cache(16)(self._shuffle_block)

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
        start = position // self.batch_size * self.batch_size
        end = min(start + self.batch_size, self.num_samples)
        taken = {self.sample(epoch, place) for place in range(start, end)}
        draws = (_draws(4 * NUM_RESERVES, self.seed, epoch, 2, position) % np.uint64(self.num_samples)).tolist()
        free = [index for index in draws if index not in taken or self.num_samples < 2 * self.batch_size]
        return iter(list(dict.fromkeys(free))[:NUM_RESERVES])

    def epoch(self, number: int) -> int:
        """The epoch of global batch `number`, counted over all epochs."""
        return number // self.num_batches

    def batch(self, number: int) -> tuple[int, list[int]]:
        """(epoch, positions in it) of this rank's slice of global batch `number`, counted over all epochs."""
        epoch, number = divmod(number, self.num_batches)
        start = number * self.batch_size
        share = self.rank_batch_size
        if self._cost is None or self._world_size == 1:
            return epoch, list(range(start + self._rank * share, start + (self._rank + 1) * share))
        costs = [self._cost(self.sample(epoch, position)) for position in range(start, start + self.batch_size)]
        dearest = sorted(range(len(costs)), key=lambda place: (-costs[place], place))
        turns = (self._rank, self._world_size - 1 - self._rank)
        return epoch, [start + i for i in sorted(dearest[k * self._world_size + turns[k % 2]] for k in range(share))]

    def state_dict(self) -> dict[str, Any]:
        return {
            "samples": self.num_consumed,
            "batch_size": self.batch_size,
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
            if name != "samples" and state[name] != own:
                what = {"fingerprint": "another dataset", "seed": "another seed"}.get(name, f"another {name}")
                raise UserError(
                    f"cannot resume with {what}: the checkpoint has {name} {state[name]}, this run has {own}"
                )
        self.num_consumed = int(state["samples"])
