from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from synthetic import write_shards
from torch import Tensor

from bclip_fast.data.loader import Batch, Loader
from bclip_fast.data.sampler import NUM_FALLBACKS, ShardSampler, permutation
from bclip_fast.data.shards.reader import ShardDataset
from bclip_fast.data.transform import Preprocess, PreprocessConfig, random_resized_crop_box
from bclip_fast.errors import UserError
from bclip_fast.ops import image as image_ops

SHARD_SIZES = [17, 40, 3, 25, 31]


def make(rank: int = 0, world_size: int = 1, **changes: Any) -> ShardSampler:
    settings: dict[str, Any] = dict(batch_size=8, seed=3, shuffle_block=16)
    return ShardSampler(SHARD_SIZES, "abc", rank=rank, world_size=world_size, **{**settings, **changes})


def test_permutation_is_fixed_for_ever():
    # Recorded once: a resumed run must find the order of an older release, on any machine.
    assert permutation(12, 0, 1, 2).tolist() == [6, 8, 9, 11, 3, 2, 10, 7, 0, 4, 5, 1]
    assert sorted(permutation(1000, 5).tolist()) == list(range(1000))


def test_permutation_is_uniform():
    counts = np.zeros((6, 6))
    for key in range(6000):
        counts[np.arange(6), permutation(6, key)] += 1
    # 1000 expected in each cell with a standard deviation of 29.
    assert abs(counts - 1000).max() < 5 * 29


@pytest.mark.parametrize("shuffle_block", [1, 16, 50, 10_000])
def test_an_epoch_has_every_sample_once(shuffle_block: int):
    stream = make(shuffle_block=shuffle_block)
    orders = [[stream.sample(epoch, p) for p in range(stream.num_samples)] for epoch in range(3)]
    assert all(sorted(order) == list(range(sum(SHARD_SIZES))) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    assert orders[0] == [make(shuffle_block=shuffle_block).sample(0, p) for p in range(stream.num_samples)]
    assert orders[0] != [make(shuffle_block=shuffle_block, seed=4).sample(0, p) for p in range(stream.num_samples)]


def test_reads_stay_in_few_shards():
    """A block of 16 positions reads from no more shards than lie under it."""
    stream = make()
    starts = np.cumsum([0, *SHARD_SIZES])
    order = permutation(len(SHARD_SIZES), 3, 0, 0)
    laid_out = np.concatenate([np.arange(starts[shard], starts[shard + 1]) for shard in order])
    for block in range(0, stream.num_samples, 16):
        places = range(block, min(block + 16, stream.num_samples))
        assert {stream.sample(0, p) for p in places} == set(laid_out[block : block + 16].tolist())


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_ranks_share_out_the_global_batch(world_size: int):
    whole = make()
    assert whole.num_batches_of(1) == 14
    ranks = [make(rank, world_size) for rank in range(world_size)]
    for number in range(30):
        epoch, positions = whole.batch(number)
        parts = [stream.batch(number) for stream in ranks]
        assert (
            [position for _, part in parts for position in part] == positions == [*range(n := number % 14 * 8, n + 8)]
        )
        assert {part_epoch for part_epoch, _ in parts} == {epoch} == {number // 14}


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_costs_are_shared_out_evenly(world_size: int):
    costs = permutation(300, 5).tolist()
    whole, ranks = make(), [make(rank, world_size, cost=costs.__getitem__) for rank in range(world_size)]
    worst, sliced = 0.0, 0.0
    for number in range(28):
        epoch, positions = whole.batch(number)
        indices = [whole.sample(epoch, position) for position in positions]
        parts = [[stream.sample(epoch, position) for position in stream.batch(number)[1]] for stream in ranks]
        assert sorted(index for part in parts for index in part) == sorted(indices)
        assert {len(part) for part in parts} == {8 // world_size}
        step = 8 // world_size
        sums = [sum(costs[i] for i in part) for part in parts]
        worst += max(sums) / sum(sums)
        sliced += max(sum(costs[i] for i in indices[k : k + step]) for k in range(0, 8, step)) / sum(sums)
    assert worst < sliced if world_size < 8 else worst == sliced


def test_micro_batches_depend_on_their_number_alone():
    """Four on one rank, two on each of two, one on each of four: the same samples meet, in the same order of parts."""
    costs = permutation(300, 5).tolist()
    for cost in (None, costs.__getitem__):
        parts = []
        for world_size in (1, 2, 4):
            ranks = [make(rank, world_size, cost=cost, micro_batch_size=2) for rank in range(world_size)]
            assert {stream.num_micro_batches(0) for stream in ranks} == {4 // world_size}
            assert {stream.max_batch_size for stream in ranks} == {2}
            parts.append([stream.batch(20, part)[1] for stream in ranks for part in range(4 // world_size)])
            whole = [stream.batch(20)[1] for stream in ranks]
            assert sum(whole, []) == sum(parts[-1], [])
        assert parts[0] == parts[1] == parts[2]
        assert sorted(sum(parts[0], [])) == make().batch(20)[1]
    with pytest.raises(UserError, match="micro_batch_size=3 does not divide the 4 pairs of a rank"):
        make(0, 2, micro_batch_size=3)


def test_the_batch_follows_its_schedule():
    """Of 116 samples: two epochs of 14 batches of 8, three of 4 of 24, then 1 of 60."""
    stream = make(schedule=[(2, 24), (5, 60)])
    sizes = [8] * 28 + [24] * 12 + [60] * 3
    expected = [(0, 8 * n) for n in range(14)] + [(1, 8 * n) for n in range(14)]
    expected += [(epoch, 24 * n) for epoch in (2, 3, 4) for n in range(4)] + [(5, 0), (6, 0), (7, 0)]
    assert [stream.num_batches_of(epochs) for epochs in range(9)] == [0, 14, 28, 32, 36, 40, 41, 42, 43]
    seen = 0
    for number, (size, place) in enumerate(zip(sizes, expected, strict=True)):
        assert stream.locate(number) == place and stream.samples_before(number) == seen
        epoch, positions = stream.batch(number)
        assert (epoch, positions) == (place[0], list(range(place[1], place[1] + size)))
        stream.num_consumed = seen
        assert stream.next_batch == number
        seen += size
    assert make(batch_size=7, schedule=[(0, 8), (2, 24), (5, 60)]).state_dict() == {**stream.state_dict(), "samples": 0}
    assert make(schedule=[(0, 24)]).state_dict() == make(batch_size=24).state_dict()
    before_schedules = {key: value for key, value in make().state_dict().items() if key != "batch_schedule"}
    make().load_state_dict(before_schedules)
    with pytest.raises(UserError, match=r"another batch_schedule: the checkpoint has batch_schedule \[\[2, 24\]"):
        make().load_state_dict(stream.state_dict())
    with pytest.raises(UserError, match="epoch 2 follows epoch 2"):
        make(schedule=[(2, 24), (2, 60)])
    with pytest.raises(UserError, match="batch_size=200 is larger than the dataset's 116 samples"):
        make(schedule=[(2, 200)])


def test_state_is_refused_by_name():
    state = make().state_dict()
    for name, value, words in [
        ("fingerprint", "xyz", "another dataset: the checkpoint has fingerprint xyz, this run has abc"),
        ("seed", 9, "another seed: the checkpoint has seed 9, this run has 3"),
        ("batch_size", 16, "another batch_size: the checkpoint has batch_size 16, this run has 8"),
        ("shuffle_block", 1, "another shuffle_block: the checkpoint has shuffle_block 1, this run has 16"),
    ]:
        with pytest.raises(UserError, match=words):
            make().load_state_dict({**state, name: value})


def test_bad_settings():
    with pytest.raises(UserError, match="batch_size=8 must be a positive multiple of the 3 ranks"):
        make(0, 3)
    with pytest.raises(UserError, match="batch_size=200 is larger than the dataset's 116 samples"):
        make(batch_size=200)
    with pytest.raises(UserError, match="shuffle_block=0"):
        make(shuffle_block=0)


def test_fallbacks_depend_on_seed_epoch_and_position_alone():
    whole, other = make(), make(1, 4, cost=lambda index: index)
    for epoch, position in [(0, 0), (1, 37), (5, 115)]:
        fallbacks = list(whole.fallbacks(epoch, position))
        assert (
            list(other.fallbacks(epoch, position)) == fallbacks
            and len(set(fallbacks)) == len(fallbacks) == NUM_FALLBACKS
        )
        start = position // 8 * 8
        assert not {whole.sample(epoch, place) for place in range(start, min(start + 8, 116))} & set(fallbacks)
    for changed in (make(seed=4).fallbacks(0, 0), whole.fallbacks(1, 0), whole.fallbacks(0, 1)):
        assert list(changed) != list(whole.fallbacks(0, 0))
    # All of the dataset serves; a batch as large as the dataset has none outside of it.
    assert {index for p in range(116) for index in whole.fallbacks(0, p)} == set(range(116))
    assert list(make(batch_size=100).fallbacks(0, 3))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> ShardDataset:
    return ShardDataset(write_shards(tmp_path_factory.mktemp("data") / "shards", num_samples=40, num_val=1))


def tokenize(captions: list[str]) -> list[list[int]]:
    """Of different lengths, one of them none."""
    return [[len(caption), ord(caption[2]), 7][: len(caption) % 4] for caption in captions]


def loader(dataset: ShardDataset, rank: int = 0, world_size: int = 1, **changes: Any) -> Loader:
    settings: dict[str, Any] = dict(batch_size=8, seed=1, rank=rank, world_size=world_size)
    stream = ShardSampler(dataset.shard_sizes, dataset.fingerprint, **settings, **changes.pop("stream", {}))
    settings = dict(preprocess=Preprocess(PreprocessConfig(size=24)), **changes)
    return Loader(dataset, settings.pop("tokenize", tokenize), stream, **settings)


def take(source: Loader, count: int) -> list[Batch]:
    return [next(source) for _ in range(count)]


def same(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        x.keys == y.keys
        and torch.equal(x.images, y.images)
        and torch.equal(x.ids, y.ids)
        and x.lengths == y.lengths
        and x.epoch == y.epoch
        for x, y in zip(a, b, strict=True)
    )


def test_batches_do_not_depend_on_threads(dataset: ShardDataset):
    with loader(dataset, num_threads=1, prefetch_batches=0) as one, loader(dataset, num_threads=3) as three:
        first, second = take(one, 11), take(three, 11)
    assert same(first, second)
    assert first[0].images.shape == (8, 24, 24, 3) and first[0].images.dtype == torch.uint8
    assert (
        len(first[0].lengths) == 8
        and len(first[0].ids) == sum(first[0].lengths)
        and [batch.epoch for batch in first] == [0] * 5 + [1] * 5 + [2]
    )
    # The same sample is cropped differently in the next epoch.
    pixels = [{key: image for batch in part for key, image in zip(batch.keys, batch.images, strict=True)}
              for part in (first[:5], first[5:10])]  # fmt: skip
    assert pixels[0].keys() == pixels[1].keys() and len(pixels[0]) == 40
    assert sum(torch.equal(pixels[0][key], pixels[1][key]) for key in pixels[0]) < 5


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_resume_at_every_batch_and_world_size(dataset: ShardDataset, world_size: int):
    with loader(dataset) as source:
        whole = take(source, 8)
    for stop in range(7):
        with loader(dataset) as source:
            take(source, stop)
            state = source.state_dict()
        assert state["samples"] == 8 * stop
        parts = []
        for rank in range(world_size):
            with loader(dataset, rank, world_size) as source:
                next(source)  # what was prefetched before the state is loaded must not come through
                source.load_state_dict(state)
                parts.append(take(source, 8 - stop))
        joined = [
            Batch(torch.cat([b.images for b in ranks]), torch.cat([b.ids for b in ranks]),
                  [length for b in ranks for length in b.lengths], [key for b in ranks for key in b.keys],
                  ranks[0].epoch)
            for ranks in zip(*parts, strict=True)
        ]  # fmt: skip
        assert same(joined, whole[stop:])


def test_pixels_are_the_documented_ones(dataset: ShardDataset):
    by_key = {dataset[i].key: i for i in range(len(dataset))}
    preprocess = Preprocess(PreprocessConfig(size=24))
    with loader(dataset) as source, loader(dataset, augment=False) as plain:
        training, evaluation = next(source), next(plain)
    for row, key in enumerate(training.keys):
        image = Image.fromarray(image_ops.decode(dataset[by_key[key]].image).numpy())
        assert torch.equal(evaluation.images[row], preprocess.to_uint8(image))
        top, left, height, width = random_resized_crop_box(40, 48, 1, 0, by_key[key])
        crop = image.crop((left, top, left + width, top + height)).resize((24, 24), Image.Resampling.BICUBIC)
        assert torch.equal(training.images[row], torch.from_numpy(np.array(crop)))


def test_an_error_of_the_tokenizer_reaches_the_consumer(dataset: ShardDataset):
    def fail(captions: list[str]) -> Tensor:
        raise KeyError("no such token")

    with loader(dataset, tokenize=fail) as source, pytest.raises(KeyError, match="no such token"):
        next(source)


def test_closing_ends_the_threads(dataset: ShardDataset):
    before = threading.active_count()
    with loader(dataset, num_threads=4, prefetch_batches=4) as source:
        next(source)
        assert threading.active_count() > before
    assert threading.active_count() == before


def test_missing_folder(tmp_path: Path):
    with pytest.raises(UserError, match="no such folder"):
        ShardDataset(tmp_path / "nowhere")
