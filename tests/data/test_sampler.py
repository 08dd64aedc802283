"""The order of the samples, its division among ranks, batch schedules, fallbacks, and the state."""

from __future__ import annotations

from itertools import chain
from typing import Any

import numpy as np
import pytest

from bclip_fast.data.order import permutation
from bclip_fast.data.sampler import NUM_FALLBACKS, ShardSampler
from bclip_fast.errors import UserError

SHARD_SIZES = [17, 40, 3, 25, 31]


def make_sampler(rank: int = 0, world_size: int = 1, **changes: Any) -> ShardSampler:
    settings: dict[str, Any] = {"batch_size": 8, "seed": 3, "shuffle_block": 16}
    return ShardSampler(SHARD_SIZES, "abc", rank=rank, world_size=world_size, **{**settings, **changes})


def test_permutation_equals_recorded_one():
    # A run that resumes after an update must continue in the old order, on any machine.
    assert permutation(12, 0, 1, 2).tolist() == [6, 8, 9, 11, 3, 2, 10, 7, 0, 4, 5, 1]
    assert sorted(permutation(1000, 5).tolist()) == list(range(1000))


def test_permutation_is_uniform():
    counts = np.zeros((6, 6))
    for key in range(6000):
        counts[np.arange(6), permutation(6, key)] += 1
    # The expected count of a cell is 1000, with a standard deviation of 29.
    assert abs(counts - 1000).max() < 5 * 29


@pytest.mark.parametrize("shuffle_block", [1, 16, 50, 10_000])
def test_epoch_has_every_sample_once(shuffle_block: int):
    sampler = make_sampler(shuffle_block=shuffle_block)
    orders = [[sampler.sample(epoch, p) for p in range(sampler.num_samples)] for epoch in range(3)]
    assert all(sorted(order) == list(range(sum(SHARD_SIZES))) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    assert orders[0] == [make_sampler(shuffle_block=shuffle_block).sample(0, p) for p in range(sampler.num_samples)]
    assert orders[0] != [
        make_sampler(shuffle_block=shuffle_block, seed=4).sample(0, p) for p in range(sampler.num_samples)
    ]


def test_block_reads_only_from_its_shards():
    """A block of 16 positions contains the 16 samples at these positions of the shards in their order."""
    sampler = make_sampler()
    starts = np.cumsum([0, *SHARD_SIZES])
    order = permutation(len(SHARD_SIZES), 3, 0, 0)
    laid_out = np.concatenate([np.arange(starts[shard], starts[shard + 1]) for shard in order])
    for block in range(0, sampler.num_samples, 16):
        positions = range(block, min(block + 16, sampler.num_samples))
        assert {sampler.sample(0, p) for p in positions} == set(laid_out[block : block + 16].tolist())


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_ranks_divide_the_global_batch(world_size: int):
    single = make_sampler()
    assert single.num_batches_of(1) == 14
    ranks = [make_sampler(rank, world_size) for rank in range(world_size)]
    for number in range(30):
        epoch, positions = single.batch(number)
        parts = [sampler.batch(number) for sampler in ranks]
        assert (
            [position for _, part in parts for position in part] == positions == [*range(n := number % 14 * 8, n + 8)]
        )
        assert {part_epoch for part_epoch, _ in parts} == {epoch} == {number // 14}


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_costs_are_divided_evenly(world_size: int):
    costs = permutation(300, 5).tolist()
    single, ranks = (
        make_sampler(),
        [make_sampler(rank, world_size, cost=lambda _, i: costs[i]) for rank in range(world_size)],
    )
    with_costs, sliced = 0.0, 0.0
    for number in range(28):
        epoch, positions = single.batch(number)
        indices = [single.sample(epoch, position) for position in positions]
        parts = [[sampler.sample(epoch, position) for position in sampler.batch(number)[1]] for sampler in ranks]
        assert sorted(index for part in parts for index in part) == sorted(indices)
        assert {len(part) for part in parts} == {8 // world_size}
        step = 8 // world_size
        sums = [sum(costs[i] for i in part) for part in parts]
        with_costs += max(sums) / sum(sums)
        sliced += max(sum(costs[i] for i in indices[k : k + step]) for k in range(0, 8, step)) / sum(sums)
    assert with_costs < sliced if world_size < 8 else with_costs == sliced


def test_micro_batches_depend_only_on_their_number():
    """Four micro-batches on one rank, two on each of two ranks, and one on each of four ranks have the same samples."""
    costs = permutation(300, 5).tolist()
    for cost in (None, lambda _, index: costs[index]):
        parts = []
        for world_size in (1, 2, 4):
            ranks = [make_sampler(rank, world_size, cost=cost, micro_batch_size=2) for rank in range(world_size)]
            assert {sampler.num_micro_batches(0) for sampler in ranks} == {4 // world_size}
            assert {sampler.max_batch_size for sampler in ranks} == {2}
            parts.append([sampler.batch(20, part)[1] for sampler in ranks for part in range(4 // world_size)])
            batches = [sampler.batch(20)[1] for sampler in ranks]
            assert list(chain(*batches)) == list(chain(*parts[-1]))
        assert parts[0] == parts[1] == parts[2]
        assert sorted(chain(*parts[0])) == make_sampler().batch(20)[1]
    with pytest.raises(UserError, match="micro_batch_size=3 does not divide the 4 pairs of a rank"):
        make_sampler(0, 2, micro_batch_size=3)


def test_batch_schedule_sets_the_sizes():
    """116 samples give two epochs of 14 batches of 8, then three of 4 batches of 24, then epochs of 1 batch of 60."""
    sampler = make_sampler(schedule=[(2, 24), (5, 60)])
    sizes = [8] * 28 + [24] * 12 + [60] * 3
    expected = [(0, 8 * n) for n in range(14)] + [(1, 8 * n) for n in range(14)]
    expected += [(epoch, 24 * n) for epoch in (2, 3, 4) for n in range(4)] + [(5, 0), (6, 0), (7, 0)]
    assert [sampler.num_batches_of(epochs) for epochs in range(9)] == [0, 14, 28, 32, 36, 40, 41, 42, 43]
    num_samples = 0
    for number, (size, location) in enumerate(zip(sizes, expected, strict=True)):
        assert sampler.locate(number) == location
        assert sampler.samples_before(number) == num_samples
        epoch, positions = sampler.batch(number)
        assert (epoch, positions) == (location[0], list(range(location[1], location[1] + size)))
        sampler.num_consumed = num_samples
        assert sampler.next_batch == number
        num_samples += size
    assert make_sampler(batch_size=7, schedule=[(0, 8), (2, 24), (5, 60)]).state_dict() == {
        **sampler.state_dict(),
        "samples": 0,
    }
    assert make_sampler(schedule=[(0, 24)]).state_dict() == make_sampler(batch_size=24).state_dict()
    old_state = {key: value for key, value in make_sampler().state_dict().items() if key != "batch_schedule"}
    make_sampler().load_state_dict(old_state)
    with pytest.raises(UserError, match=r"another batch_schedule: the checkpoint has batch_schedule \[\[2, 24\]"):
        make_sampler().load_state_dict(sampler.state_dict())
    with pytest.raises(UserError, match="epoch 2 follows epoch 2"):
        make_sampler(schedule=[(2, 24), (2, 60)])
    with pytest.raises(UserError, match="batch_size=200 is larger than the dataset's 116 samples"):
        make_sampler(schedule=[(2, 200)])


def test_state_with_other_value_is_refused():
    state = make_sampler().state_dict()
    for name, value, words in [
        ("fingerprint", "xyz", "another dataset: the checkpoint has fingerprint xyz, this run has abc"),
        ("seed", 9, "another seed: the checkpoint has seed 9, this run has 3"),
        ("batch_size", 16, "another batch_size: the checkpoint has batch_size 16, this run has 8"),
        ("shuffle_block", 1, "another shuffle_block: the checkpoint has shuffle_block 1, this run has 16"),
    ]:
        with pytest.raises(UserError, match=words):
            make_sampler().load_state_dict({**state, name: value})


def test_invalid_settings_are_refused():
    with pytest.raises(UserError, match="batch_size=8 must be a positive multiple of the 3 ranks"):
        make_sampler(0, 3)
    with pytest.raises(UserError, match="batch_size=200 is larger than the dataset's 116 samples"):
        make_sampler(batch_size=200)
    with pytest.raises(UserError, match="shuffle_block=0"):
        make_sampler(shuffle_block=0)


def test_fallbacks_depend_only_on_seed_epoch_and_position():
    sampler, other = make_sampler(), make_sampler(1, 4, cost=lambda _, index: index)
    for epoch, position in [(0, 0), (1, 37), (5, 115)]:
        fallbacks = list(sampler.fallbacks(epoch, position))
        assert list(other.fallbacks(epoch, position)) == fallbacks
        assert len(set(fallbacks)) == len(fallbacks) == NUM_FALLBACKS
        start = position // 8 * 8
        assert not {sampler.sample(epoch, p) for p in range(start, min(start + 8, 116))} & set(fallbacks)
    for changed in (make_sampler(seed=4).fallbacks(0, 0), sampler.fallbacks(1, 0), sampler.fallbacks(0, 1)):
        assert list(changed) != list(sampler.fallbacks(0, 0))
    # All samples serve as fallbacks. If a batch is as large as the dataset, its own samples do.
    assert {index for p in range(116) for index in sampler.fallbacks(0, p)} == set(range(116))
    assert list(make_sampler(batch_size=100).fallbacks(0, 3))
