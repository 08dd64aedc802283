"""The sequence of global batches, its division among ranks, and the state that resumes it.

The sample at global position p of epoch e depends only on (seed, e, p). Global batch n of an
epoch has the positions [n * B, (n + 1) * B). Rank r of R takes the r-th of its R equal slices, whose m equal parts are
its micro-batches. The batches therefore depend neither on the number of ranks nor on threads, and the number of
consumed samples is a sufficient state.

With a cost function, the R * m micro-batches are not slices. They still have equally many samples, but nearly equal
costs. With a token budget, they have as many samples as the budget allows, and so the ranks too have different numbers
of samples. All ranks have equally many micro-batches. In each case, their content depends only on R * m.

A fallback replaces a damaged sample. It also depends only on (seed, e, p). Ranks therefore need no communication,
every batch keeps its size, and a resumed run on any number of ranks uses the same fallback.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bclip_fast.errors import UserError

from .order import Interleaving, Member, Mixture, ShuffledShards, draws
from .packing import pack

# Fallbacks are drawn from the whole dataset, where damaged samples are rare. If this many in a row are damaged, the
# storage is at fault.
NUM_FALLBACKS = 16


class _Stage(NamedTuple):
    """Global batches have `batch_size` samples from `epoch` on. `number` batches with `samples` in all come before."""

    epoch: int
    batch_size: int
    number: int
    samples: int


class ShardSampler:
    """The endless sequence of global batches, epoch after epoch, and one rank's part of each.

    An epoch skips the last num_samples % batch_size samples of its order, so that all batches have the same size. Each
    epoch skips different samples.

    An epoch of a mixture has `mixture.epoch_samples` positions, and the positions of all epochs follow one another. So
    a member's passes over its samples don't begin and end with the epochs. At the end of a member's pass, a global
    batch may hold a sample twice.

    Args:
        shard_sizes: number of samples in each shard, in the order of the dataset's indices.
        fingerprint: hash of the dataset's content. A state with another fingerprint is refused.
        batch_size: size B of the global batch, over all ranks.
        schedule: (epoch, batch size) pairs. Each sets B from that epoch on, in place of `batch_size`.
        micro_batch_size: number of samples in a rank's micro-batch. 0: all of the rank's part of the global batch.
        token_budget: largest number of tokens in a micro-batch, in place of micro_batch_size. Then call `count_tokens`
            before any other method. 0: no limit.
        shuffle_block: number of samples that are shuffled together. 1: keep the order within a shard.
        cost: cost of a sample, given its pass and dataset index, on every rank the same. The samples of a global batch
            are sorted by descending cost and assigned in snake order, so that micro-batches cost about the same.
        mixture: the datasets that the shards belong to. None: one dataset.

    Raises:
        UserError: ranks and micro-batches do not divide the batch, or the batch is larger than the dataset or takes
            more samples of a member than it has.
    """

    def __init__(
        self,
        shard_sizes: Sequence[int],
        fingerprint: str,
        *,
        batch_size: int,
        schedule: Sequence[tuple[int, int]] = (),
        micro_batch_size: int = 0,
        token_budget: int = 0,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle_block: int = 8192,
        cost: Callable[[int, int], int] | None = None,
        mixture: Mixture | None = None,
    ) -> None:
        if shuffle_block < 1:
            raise UserError(f"shuffle_block={shuffle_block}: must be at least 1")
        total = sum(shard_sizes)
        mixture = mixture or Mixture((Member("", len(shard_sizes), 1, fingerprint),), total)
        self.num_samples = mixture.epoch_samples
        self.fingerprint = fingerprint
        self.seed = seed
        self.shuffle_block = shuffle_block
        self.num_consumed = 0
        self._rank = rank
        self._cost = cost
        self._members = mixture.members
        self._interleaving = Interleaving([member.share for member in mixture.members])
        self._orders: list[ShuffledShards] = []
        first = num_shards = 0
        for number, member in enumerate(mixture.members):
            sizes = shard_sizes[num_shards : num_shards + member.num_shards]
            # The order of a single dataset is that of earlier releases.
            key = (seed,) if len(mixture.members) == 1 else (seed, 3, number)
            self._orders.append(ShuffledShards(sizes, first, shuffle_block, *key))
            first, num_shards = first + sum(sizes), num_shards + member.num_shards
        self._world_size = world_size
        self._micro_batch_size = micro_batch_size
        self._token_budget = token_budget
        self._stages: list[_Stage] = []
        for epoch, size in [*([(0, batch_size)] if not schedule or schedule[0][0] else []), *schedule]:
            self._begin_stage(epoch, size)
        self._by_cost = functools.lru_cache(2)(self._sort_by_cost)
        # The planner of the loader is some steps ahead of the trainer, which asks for the sizes.
        self._packed = functools.lru_cache(8)(self._pack)

    def _begin_stage(self, epoch: int, size: int) -> None:
        if size < 1 or size % self._world_size:
            raise UserError(
                f"batch_size={size} must be a positive multiple of the {self._world_size} ranks; it is the global batch"
            )
        if self.num_samples < size:
            raise UserError(
                f"batch_size={size} is larger than the dataset's {self.num_samples} samples; use a smaller batch"
            )
        for number, (member, order) in enumerate(zip(self._members, self._orders, strict=True)):
            if (count := self._interleaving.largest_count(number, size)) > order.num_samples:
                raise UserError(
                    f"batch_size={size} takes {count} samples of dataset {member.name}, which has "
                    f"{order.num_samples}; use a smaller batch, or give {member.name} a smaller weight"
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
        """Largest number of samples in one of this rank's micro-batches. With a token budget, an upper bound."""
        if self._token_budget:
            return min(max(stage.batch_size for stage in self._stages), self._token_budget // (self._image_tokens + 1))
        return self._micro_batch_size or max(stage.batch_size for stage in self._stages) // self._world_size

    def count_tokens(self, image_tokens: int, caption_tokens: Callable[[int, int], int]) -> None:
        """Set the tokens of the samples, for the token budget.

        Args:
            image_tokens: number of tokens of each image.
            caption_tokens: function from an epoch and a dataset index to the number of tokens of the caption. It must
                agree on every rank.
        """
        self._image_tokens, self._caption_tokens = image_tokens, caption_tokens

    def caption_limit(self, epoch: int, index: int) -> int | None:
        """Return the number of caption tokens that the token budget has for a sample. Without a budget, return None."""
        return self._caption_tokens(epoch, index) if self._token_budget else None

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

    def member_samples(self, number: int) -> dict[str, int]:
        """Return the number of samples of each member of a mixture in all global batches before `number`, by name.

        Fallbacks count as the samples that they replace. For one dataset, the result is empty.
        """
        if len(self._members) == 1:
            return {}
        epoch, position = self.locate(number)
        totals = [0] * len(self._members)
        for earlier in range(epoch + 1):
            size = self.batch_size_of(earlier)
            start = earlier * self.num_samples
            used = position if earlier == epoch else self.num_samples // size * size
            before, after = self._interleaving.counts(start), self._interleaving.counts(start + used)
            totals = [total + last - first for total, first, last in zip(totals, before, after, strict=True)]
        return dict(zip((member.name for member in self._members), totals, strict=True))

    def _locate_sample(self, epoch: int, position: int) -> tuple[ShuffledShards, int, int]:
        """Return the order of the member at a position of an epoch, its pass, and the position in that pass."""
        member, number = self._interleaving.locate(epoch * self.num_samples + position)
        order = self._orders[member]
        return order, *divmod(number, order.num_samples)

    def sample(self, epoch: int, position: int) -> int:
        """Return the dataset index at a global position of an epoch, 0 <= position < num_samples."""
        order, number, place = self._locate_sample(epoch, position)
        return order.sample(number, place)

    def pass_number(self, epoch: int, position: int) -> int:
        """Return the number of the pass over its dataset to which a sample belongs. For one dataset, it is the epoch.

        Random numbers of a sample depend on it, as a small dataset comes several times in an epoch of a mixture.
        """
        return self._locate_sample(epoch, position)[1]

    def fallbacks(self, epoch: int, position: int) -> Iterator[int]:
        """Yield at most NUM_FALLBACKS dataset indices that may replace a damaged sample at a position, in this order.

        They are drawn from the whole dataset of the sample, because one cause may damage neighbouring samples. Samples
        of the same global batch are excluded, so that no pair occurs twice in it, unless the batch holds more than half
        of the dataset.
        """
        size = self.batch_size_of(epoch)
        start = position // size * size
        end = min(start + size, self.num_samples)
        order, *_ = self._locate_sample(epoch, position)
        first, num_samples = order.first, order.num_samples
        in_batch = {self.sample(epoch, other) for other in range(start, end)}
        num_in_batch = sum(first <= index < first + num_samples for index in in_batch)
        random = draws(4 * NUM_FALLBACKS, self.seed, epoch, 2, position) % np.uint64(num_samples)
        indices = (first + random.astype(np.int64)).tolist()
        allowed = [index for index in indices if index not in in_batch or num_samples < 2 * num_in_batch]
        return iter(list(dict.fromkeys(allowed))[:NUM_FALLBACKS])

    def num_micro_batches(self, number: int) -> int:
        """Return the number of micro-batches of each rank in global batch `number`."""
        return len(self.micro_batch_sizes(number))

    def micro_batch_sizes(self, number: int) -> list[int]:
        """Return the number of samples in each of this rank's micro-batches of global batch `number`."""
        if self._token_budget:
            sizes = list(map(len, self._packed(number)))
            return sizes[self._rank * len(sizes) // self._world_size :][: len(sizes) // self._world_size]
        local_size = self._stage_of(number).batch_size // self._world_size
        size = self._micro_batch_size or local_size
        return [size] * (local_size // size)

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
        if self._token_budget:
            return epoch, [start + offset for part in parts for offset in self._packed(number)[part]]
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
        costs = [self._cost(self.pass_number(epoch, place), self.sample(epoch, place)) for place in positions]
        return sorted(range(len(costs)), key=lambda i: (-costs[i], i))

    def _pack(self, number: int) -> list[list[int]]:
        """Return the samples of each micro-batch of all ranks, counted from the first of the global batch."""
        epoch, start = self.locate(number)
        indices = (self.sample(epoch, position) for position in range(start, start + self.batch_size_of(epoch)))
        costs = [self._image_tokens + self._caption_tokens(epoch, index) for index in indices]
        return pack(costs, self._token_budget, self._world_size)

    def state_dict(self) -> dict[str, Any]:
        """Return the state that `load_state_dict` restores."""
        members = [{"name": m.name, "share": m.share, "fingerprint": m.fingerprint} for m in self._members]
        return {
            "samples": self.num_consumed,
            "batch_size": self._stages[0].batch_size,
            "batch_schedule": [[stage.epoch, stage.batch_size] for stage in self._stages[1:]],
            "shuffle_block": self.shuffle_block,
            "seed": self.seed,
            "datasets": members if len(members) > 1 else [],
            "epoch_samples": self.num_samples,
            "fingerprint": self.fingerprint,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state. The number of ranks may differ.

        Raises:
            UserError: dataset, seed, batch size or shuffle block differ, which would change the order of samples.
        """
        current = self.state_dict()
        if difference := _first_difference(state.get("datasets", []), current.pop("datasets")):
            raise UserError(f"cannot resume with other data: {difference}")
        # Older checkpoints have no batch_schedule and no epoch_samples.
        defaults: dict[str, Any] = {"batch_schedule": [], "epoch_samples": self.num_samples}
        for name, value in current.items():
            if name != "samples" and (recorded := state.get(name, defaults.get(name))) != value:
                what = {"fingerprint": "another dataset", "seed": "another seed"}.get(name, f"another {name}")
                raise UserError(
                    f"cannot resume with {what}: the checkpoint has {name} {recorded}, this run has {value}"
                )
        self.num_consumed = int(state["samples"])


def _first_difference(recorded: list[dict[str, Any]], current: list[dict[str, Any]]) -> str:
    """Return the first difference between the members of two mixtures, or an empty string. Names do not count."""
    if len(recorded) != len(current):
        names = [", ".join(member["name"] for member in members) or "one dataset" for members in (recorded, current)]
        return f"the checkpoint has {names[0]}, this run has {names[1]}"
    for old, new in zip(recorded, current, strict=True):
        name = new["name"] if new["name"] == old["name"] else f"{old['name']} (now {new['name']})"
        if old["fingerprint"] != new["fingerprint"]:
            return f"dataset {name} had fingerprint {old['fingerprint']}, and has {new['fingerprint']}"
        if old["share"] != new["share"]:
            return f"dataset {name} had a share of {old['share']}, and has {new['share']}"
    return ""
