"""Micro-batches within a token budget: the packing, the sampler, the loader and the captions' lengths."""

from __future__ import annotations

import shutil
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from damage import spoil
from loaders import by_key, loader, take
from synthetic import write_shards

from bclip_fast.data.caption_lengths import caption_lengths
from bclip_fast.data.loader import Loader
from bclip_fast.data.packing import pack
from bclip_fast.data.sampler import ShardSampler
from bclip_fast.data.shards.mixed import MixedDataset, open_dataset
from bclip_fast.data.shards.reader import ShardDataset
from bclip_fast.data.sources import as_sources
from bclip_fast.data.texts import CaptionWeights
from bclip_fast.errors import UserError

IMAGE_TOKENS = 5


def words(captions: list[str]) -> list[list[int]]:
    """One token for each letter of the colour in `a COLOUR square at the PLACE`, and one for the end."""
    return [[*caption.split()[1].encode(), 0] for caption in captions]


@pytest.mark.parametrize("seed", range(40))
def test_packing_has_every_sample_once_and_holds_the_budget(seed: int):
    generator = np.random.default_rng(seed)
    multiple = int(generator.integers(1, 5))
    size = multiple * int(generator.integers(1, 40))
    costs = generator.integers(1, 60, size).tolist()
    budget = max(costs) + int(generator.integers(0, 300))
    bins = pack(costs, budget, multiple)
    assert sorted(chain(*bins)) == list(range(size))
    assert all(part == sorted(part) and part for part in bins)
    assert len(bins) % multiple == 0
    sums = [sum(costs[i] for i in part) for part in bins]
    assert max(sums) <= budget
    # The sums differ by at most one cost, so the ranks have nearly equal work at each micro-batch.
    assert max(sums) - min(sums) <= max(costs)
    fewest = -(-sum(costs) // (budget * multiple)) * multiple
    assert len(bins) <= max(fewest + multiple, -(-2 * sum(costs) // (budget * multiple)) * multiple)


def test_packing_at_the_smallest_budget_has_one_sample_in_each_bin():
    assert pack([7, 7, 7, 7], 7, 2) == [[0], [1], [2], [3]]
    assert pack([1, 7, 1, 1], 7, 1) == [[1], [0, 2, 3]]


def budgeted(rank: int, world_size: int, costs: list[int], budget: int = 60, batch_size: int = 24) -> ShardSampler:
    sampler = ShardSampler(
        [len(costs)], "", batch_size=batch_size, token_budget=budget, rank=rank, world_size=world_size, seed=2
    )
    # The captions of the second epoch are longer.
    sampler.count_tokens(IMAGE_TOKENS, lambda epoch, index: costs[index] + epoch)
    return sampler


def test_ranks_have_equally_many_micro_batches_within_the_budget():
    costs = np.random.default_rng(0).integers(1, 40, 120).tolist()
    for world_size in (1, 2, 3):
        ranks = [budgeted(rank, world_size, costs) for rank in range(world_size)]
        unequal = 0
        for number in range(10):
            (count,) = {sampler.num_micro_batches(number) for sampler in ranks}
            sizes, positions = [], []
            for sampler in ranks:
                parts = [sampler.batch(number, part) for part in range(count)]
                for epoch, part in parts:
                    tokens = [IMAGE_TOKENS + epoch + costs[sampler.sample(epoch, position)] for position in part]
                    assert sum(tokens) <= 60
                assert sampler.micro_batch_sizes(number) == [len(part) for _, part in parts]
                assert max(sampler.micro_batch_sizes(number)) <= sampler.max_batch_size
                assert sampler.batch(number)[1] == list(chain(*(part for _, part in parts)))
                positions += sampler.batch(number)[1]
                sizes.append(len(sampler.batch(number)[1]))
            assert sorted(positions) == list(range(number % 5 * 24, number % 5 * 24 + 24))
            unequal += len(set(sizes)) > 1
        assert unequal or world_size == 1, "the test needs ranks with unequal parts"


def test_packed_micro_batches_depend_only_on_their_number():
    costs = [10] * 48
    parts = []
    for world_size in (1, 2, 4):
        ranks = [budgeted(rank, world_size, costs, budget=45) for rank in range(world_size)]
        assert {sampler.num_micro_batches(1) for sampler in ranks} == {8 // world_size}
        parts.append([sampler.batch(1, part)[1] for sampler in ranks for part in range(8 // world_size)])
    assert parts[0] == parts[1] == parts[2]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("packing"), num_samples=48, num_val=4)


def budgeted_loader(
    folder: Path, budget: int, rank: int = 0, world_size: int = 1, weights: CaptionWeights | None = None
) -> Loader:
    dataset, weights = ShardDataset(folder), weights or CaptionWeights()
    options = {"stream": {"token_budget": budget}, "captions": weights}
    source = loader(dataset, rank, world_size, tokenize=words, **options)
    lengths = caption_lengths(dataset, words, kinds=weights.kinds)
    source.sampler.count_tokens(IMAGE_TOKENS, lambda _, index: int(lengths[index]))
    return source


def test_loader_yields_packed_micro_batches(shards: Path):
    lengths = caption_lengths(ShardDataset(shards), words)
    assert lengths.tolist() == [len(ids) for ids in words(list(ShardDataset(shards).captions()))]
    assert (caption_lengths(ShardDataset(shards), words, (1, 2)) == 0).all()
    with loader(ShardDataset(shards), tokenize=words) as undivided, budgeted_loader(shards, 24) as source:
        for expected in take(undivided, 7):
            batches = take(source, source.sampler.num_micro_batches(source.sampler.next_batch))
            assert [batch.last for batch in batches] == [False] * (len(batches) - 1) + [True]
            assert all(sum(batch.lengths) + IMAGE_TOKENS * len(batch.lengths) <= 24 for batch in batches)
            assert by_key(batches) == by_key([expected])
            state = source.state_dict()
        # A restart in the second epoch continues with the same micro-batches.
        expected = take(source, 5)
        source.load_state_dict(state)
        assert by_key(take(source, 5)) == by_key(expected)
        assert [batch.keys for batch in expected] != [batch.keys for batch in batches]


def test_budget_holds_whichever_text_is_drawn(tmp_path: Path):
    folder, weights = write_shards(tmp_path / "texts", 48, 4, texts=True), CaptionWeights(mention=2.0, title=0.5)
    dataset = ShardDataset(folder)
    texts = [[text for kind in weights.kinds for text in dataset.texts(i).get(kind, ())] for i in range(len(dataset))]
    lengths = caption_lengths(dataset, words, kinds=weights.kinds)
    assert lengths.tolist() == [max(map(len, words(each))) for each in texts]
    with (
        loader(dataset, tokenize=words, captions=weights) as undivided,
        budgeted_loader(folder, 24, weights=weights) as source,
    ):
        for expected in take(undivided, 7):
            batches = take(source, source.sampler.num_micro_batches(source.sampler.next_batch))
            assert all(sum(batch.lengths) + IMAGE_TOKENS * len(batch.lengths) <= 24 for batch in batches)
            assert by_key(batches) == by_key([expected])


def test_fallback_caption_is_cut_to_the_damaged_one(tmp_path: Path, shards: Path):
    folder = tmp_path / "shards"
    shutil.copytree(shards, folder)
    for i in range(0, 48, 3):
        spoil(folder, i)
    with budgeted_loader(folder, 24) as source:
        batches = take(source, sum(map(source.sampler.num_micro_batches, range(6))))
    num_bad = sum(len(batch.bad) for batch in batches)
    assert num_bad >= 16
    assert all(sum(batch.lengths) + IMAGE_TOKENS * len(batch.lengths) <= 24 for batch in batches)


def test_captions_of_other_length_than_in_manifest_are_refused(shards: Path):
    with budgeted_loader(shards, 24) as source:
        source.sampler.count_tokens(IMAGE_TOKENS, lambda *_: 3)
        with pytest.raises(UserError, match=r"sample sample00\d\d has a caption of \d+ tokens, but .* has 3"):
            take(source, 1)


def test_missing_and_wrong_manifests_are_named(tmp_path: Path, shards: Path):
    folder = tmp_path / "shards"
    shutil.copytree(shards, folder)
    pq.write_table(pq.read_table(folder / "manifest.parquet").drop(["caption"]), folder / "manifest.parquet")
    with pytest.raises(UserError, match=r"manifest.parquet has no column caption, which micro_batch_tokens needs"):
        caption_lengths(ShardDataset(folder), words)
    (folder / "manifest.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"manifest.parquet cannot be read: .*; copy it again, or set micro_batch_size"):
        caption_lengths(ShardDataset(folder), words)
    (folder / "manifest.parquet").unlink()
    with pytest.raises(UserError, match=r"manifest.parquet is missing, and micro_batch_tokens needs it"):
        caption_lengths(ShardDataset(folder), words)


def test_captions_of_a_mixture_are_counted_by_dataset(tmp_path: Path, shards: Path):
    other = write_shards(tmp_path / "other", num_samples=10, num_val=1)
    listed = [{"path": str(shards)}, {"path": str(other)}]
    dataset = open_dataset(as_sources(listed, "data.shards"), "train")
    assert isinstance(dataset, MixedDataset)
    parts = [caption_lengths(member, words) for member in dataset.members]
    assert caption_lengths(dataset, words).tolist() == np.concatenate(parts).tolist()
    (other / "manifest.parquet").unlink()
    with pytest.raises(UserError, match=r"^dataset other: .*manifest.parquet is missing, and micro_batch_tokens"):
        caption_lengths(dataset, words)
