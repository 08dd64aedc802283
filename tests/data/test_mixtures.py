"""Several datasets as one: exact shares, orders of the members, resume, names, and errors."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from loaders import by_key, take, tokenize
from shard_samples import jpeg
from synthetic import write_shards

from bclip_fast.config import from_toml, parse, to_toml
from bclip_fast.data.batch import Batch
from bclip_fast.data.loader import Loader
from bclip_fast.data.order import Interleaving
from bclip_fast.data.sampler import ShardSampler
from bclip_fast.data.shards.format import Sample
from bclip_fast.data.shards.mixed import MixedDataset, open_dataset
from bclip_fast.data.shards.positives import group_ids
from bclip_fast.data.shards.writer import ShardWriter
from bclip_fast.data.sources import Source, as_sources
from bclip_fast.data.transform import Preprocess, PreprocessConfig
from bclip_fast.errors import UserError
from bclip_fast.plan.samples import samples_of
from bclip_fast.train.config import DataConfig, TrainConfig


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two datasets with 40 and 12 training samples, whose keys are the same."""
    root = tmp_path_factory.mktemp("mixture")
    write_shards(root / "large", num_samples=40, num_val=2)
    write_shards(root / "small", num_samples=12, num_val=1, seed=1)
    return root


def sources(root: Path, *amounts: Any, key: str = "weight") -> tuple[Source, ...]:
    names = ("large", "small")
    listed = [{"path": str(root / name), key: amount} for name, amount in zip(names, amounts, strict=True)]
    result = as_sources(listed, "data.shards")
    assert isinstance(result, tuple)
    return result


def mixed(root: Path, *amounts: Any, key: str = "weight") -> MixedDataset:
    dataset = open_dataset(sources(root, *amounts, key=key), "train")
    assert isinstance(dataset, MixedDataset)
    return dataset


def sampler_of(dataset: MixedDataset, **changes: Any) -> ShardSampler:
    settings: dict[str, Any] = {"batch_size": 8, "seed": 1, "shuffle_block": 16, "mixture": dataset.mixture}
    return ShardSampler(dataset.shard_sizes, dataset.fingerprint, **{**settings, **changes})


@pytest.mark.parametrize(
    "shares", [[3, 1], [1, 3], [5, 2, 1], [1, 1, 1, 1, 1], [7, 0, 3], [6, 2], [1], [40, 13, 7, 29]]
)
def test_every_window_has_the_exact_shares(shares: list[int]):
    interleaving = Interleaving(shares)
    period = sum(shares) // np.gcd.reduce(shares)
    members = [interleaving.locate(position)[0] for position in range(4 * period)]
    for start in range(3 * period):
        window = Counter(members[start : start + period])
        assert [window[member] * sum(shares) for member in range(len(shares))] == [share * period for share in shares]
    seen = [0] * len(shares)
    for position, member in enumerate(members):
        assert interleaving.counts(position) == seen
        assert interleaving.locate(position) == (member, seen[member])
        seen[member] += 1
    for member in range(len(shares)):
        for length in (1, 3, period - 1, period + 2):
            windows = [members[start : start + length].count(member) for start in range(3 * period)]
            assert max(windows) <= interleaving.largest_count(member, length) <= max(windows) + len(shares)


def test_position_far_into_a_run_needs_no_walk():
    position = 10**12 + 3
    member, before = Interleaving([3, 1]).locate(position)
    assert (member, before) == (1, 25 * 10**10)


@pytest.mark.parametrize(
    ("key", "amounts", "length", "shares"),
    [
        ("weight", (3, 1), 52, [3, 1]),
        ("weight", (0.75, 0.25), 52, [3, 1]),
        ("weight", (0.1, 0.2), 52, [1, 2]),
        ("epochs", (1, 3), 76, [10, 9]),
        ("epochs", (0.5, 1.0), 32, [5, 3]),
        ("epochs", (None, None), 52, [10, 3]),
    ],
)
def test_epoch_has_the_documented_length(root: Path, key: str, amounts: Any, length: int, shares: list[int]):
    dataset = mixed(root, *amounts, key=key)
    assert dataset.mixture.epoch_samples == length == sampler_of(dataset).num_samples
    assert [member.share for member in dataset.mixture.members] == shares
    assert len(dataset) == 52


def test_each_pass_over_a_member_is_a_new_permutation(root: Path):
    dataset = mixed(root, 3, 1)
    sampler = sampler_of(dataset)
    indices = [sampler.sample(epoch, position) for epoch in range(6) for position in range(52)]
    passes = [sampler.pass_number(epoch, position) for epoch in range(6) for position in range(52)]
    for first, size in ((0, 40), (40, 12)):
        order = [index for index in indices if first <= index < first + size]
        complete = [order[start : start + size] for start in range(0, len(order) - size + 1, size)]
        assert len(complete) == (5 if first == 0 else 6)
        assert all(sorted(each) == list(range(first, first + size)) for each in complete)
        assert len({tuple(each) for each in complete}) == len(complete)
        numbers = [number for index, number in zip(indices, passes, strict=True) if first <= index < first + size]
        assert numbers == [place // size for place in range(len(order))]
    # Equal datasets have independent orders.
    twins = sampler_of(MixedDataset(sources(root, 1, 1), [dataset.members[1]] * 2))
    first_pass = [[index for p in range(24) if (index := twins.sample(0, p)) // 12 == member] for member in (0, 1)]
    assert [index + 12 for index in first_pass[0]] != first_pass[1]


def test_order_of_one_dataset_is_unchanged(root: Path):
    plain = open_dataset(str(root / "large"), "train")
    listed = open_dataset(as_sources([str(root / "large")], "data.shards"), "train")
    assert not isinstance(listed, MixedDataset)
    repeated = open_dataset(as_sources([{"path": str(root / "large"), "epochs": 2}], "data.shards"), "train")
    assert isinstance(repeated, MixedDataset)
    single = ShardSampler(plain.shard_sizes, plain.fingerprint, batch_size=8, seed=1, shuffle_block=16)
    double = sampler_of(repeated)
    assert double.num_samples == 80
    assert [double.sample(0, p) for p in range(80)] == [single.sample(p // 40, p % 40) for p in range(80)]


def loader_of(dataset: MixedDataset, rank: int, world_size: int, **changes: Any) -> Loader:
    sampler = sampler_of(dataset, rank=rank, world_size=world_size, **changes)
    return Loader(dataset, tokenize, sampler, Preprocess(PreprocessConfig(size=8)), num_threads=1)


def steps_of(dataset: MixedDataset, world_size: int, first: int, count: int, **changes: Any) -> list[list[Any]]:
    """The samples of each of `count` global batches from batch `first` on, over all ranks, sorted by key."""
    steps: list[list[Batch]] = [[] for _ in range(count)]
    for rank in range(world_size):
        with loader_of(dataset, rank, world_size, **changes) as source:
            if first:
                source.load_state_dict({**source.state_dict(), "samples": source.sampler.samples_before(first)})
            for step in range(count):
                steps[step] += take(source, source.sampler.num_micro_batches(first + step))
    return [by_key(batches) for batches in steps]


@pytest.mark.parametrize("with_cost", [False, True])
@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 0), (2, 2), (4, 0), (8, 1)])
def test_resume_in_mid_epoch_continues_the_sequence(
    root: Path, world_size: int, micro_batch_size: int, with_cost: bool
):
    """Batch 6 begins epoch 1, and its schedule doubles the batch, so batches 4 to 9 cross both."""
    dataset = mixed(root, 3, 1)
    cost = (lambda _, i: dataset.caption_bytes(i)) if with_cost else None
    options: dict[str, Any] = {"schedule": [(1, 16)], "cost": cost}
    expected = steps_of(dataset, 1, 0, 10, **options)
    assert [len(step) for step in expected] == [8] * 6 + [16] * 4
    resumed = steps_of(dataset, world_size, 4, 6, micro_batch_size=micro_batch_size, **options)
    assert resumed == expected[4:]
    assert all(Counter(row[0].split("/")[0] for row in step)["small"] == len(step) // 4 for step in expected)


def test_samples_of_each_member_are_counted(root: Path):
    dataset = mixed(root, 3, 1)
    sampler = sampler_of(dataset, schedule=[(1, 16)])
    for number in range(12):
        indices = [
            sampler.sample(epoch, position)
            for batch in range(number)
            for epoch, positions in [sampler.batch(batch)]
            for position in positions
        ]
        small = sum(index >= 40 for index in indices)
        assert sampler.member_samples(number) == {"large": len(indices) - small, "small": small}
    assert ShardSampler([40], "x", batch_size=8).member_samples(3) == {}


def test_crop_of_a_repeated_sample_is_new(root: Path):
    """A small dataset comes several times in an epoch, each time with another crop."""
    dataset = mixed(root, 1, 1)
    rows = [row for step in steps_of(dataset, 1, 0, 6) for row in step if row[0].startswith("small/")]
    keys = Counter(key for key, *_ in rows)
    repeated = [key for key, count in keys.items() if count > 1]
    assert len(repeated) == 12
    assert sum(len({row[1] for row in rows if row[0] == key}) > 1 for key in repeated) >= 10


def test_fallbacks_come_from_the_same_member(root: Path, tmp_path: Path):
    shutil.copytree(root, tmp_path / "data")
    for path in (tmp_path / "data" / "small").glob("train-*.tar"):
        content = bytearray(path.read_bytes())
        place = content.index(b"sample0003.jpg") if b"sample0003.jpg" in content else -1
        if place >= 0:
            content[place + 700] ^= 1
            path.write_bytes(content)
    dataset = mixed(tmp_path / "data", 3, 1)
    with loader_of(dataset, 0, 1) as source:
        batches = take(source, 12)
    bad = [record for batch in batches for record in batch.bad]
    assert {record.key for record in bad} == {"small/sample0003"}
    assert all(record.shard.startswith("small/train-") for record in bad)
    assert all(sum(key.startswith("small/") for key in batch.keys) == 2 for batch in batches)
    sampler = sampler_of(dataset)
    for position in range(48):
        is_small = sampler.sample(0, position) >= 40
        assert {index >= 40 for index in sampler.fallbacks(0, position)} == {is_small}


def test_samples_have_the_names_of_their_dataset(root: Path):
    dataset = mixed(root, 3, 1)
    assert [dataset[i].key for i in (0, 39, 40, 51, -1)] == [
        "large/sample0000", "large/sample0039", "small/sample0000", "small/sample0011", "small/sample0011",
    ]  # fmt: skip
    assert [sample.key for sample in dataset.fetch([45, 3, 40])() if isinstance(sample, Sample)] == [
        "small/sample0005", "large/sample0003", "small/sample0000",
    ]  # fmt: skip
    assert len({sample.key for sample in dataset}) == 52
    assert dataset.name_of(40) == ("small/sample0000", "small/train-000000.tar")
    assert list(dataset.captions()) == [sample.caption for sample in dataset]
    assert [dataset.caption(i) for i in (0, 45)] == [dataset[i].caption for i in (0, 45)]
    assert dataset.caption_bytes(45) == len(dataset[45].caption)
    with pytest.raises(IndexError, match="sample 52 of 52"):
        dataset[52]


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ([], "data.shards is an empty list"),
        (["a/data", "b/data"], "data.shards has 2 datasets with the name data"),
        ([{"path": "a", "weight": -1}], "dataset a has weight=-1, which must be a number of at least 0"),
        ([{"path": "a", "weight": float("nan")}], "dataset a has weight=nan"),
        ([{"path": "a", "weight": 0}, {"path": "b", "weight": 0.0}], "weights of its datasets sum to 0"),
        ([{"path": "a", "epochs": 0}], "epochs of its datasets sum to 0"),
        ([{"path": "a", "weight": 1}, "b"], "so dataset b needs one too"),
        ([{"path": "a", "weight": 1, "epochs": 1}], "dataset a has a weight and a number of epochs"),
        ([{"path": "a", "wieght": 1}], "unknown key wieght; its keys are path, name, weight, epochs, caption_key"),
        ([{"name": "a"}], "dataset a has no path"),
        ([{"path": "a", "name": "x/y"}], "dataset name 'x/y' must have"),
        ([{"path": "a", "weight": "3"}], "dataset a has weight='3', which is not a number"),
    ],
)
def test_wrong_list_is_one_line(listed: list[Any], message: str):
    with pytest.raises(UserError, match=message) as caught:
        DataConfig(shards=listed)  # type: ignore[arg-type]
    assert str(caught.value).startswith("data.shards")
    assert "\n" not in str(caught.value)


def test_file_and_command_line_give_the_same_list(tmp_path: Path):
    file = tmp_path / "run.toml"
    file.write_text(
        '[[data.shards]]\nname = "pmc"\npath = "/data/{a,b}/pmc"\nweight = 3\n'
        '[[data.shards]]\npath = "s3://bucket/rocov2"\nweight = 0.5\n'
    )
    words = ["--data.shards", "name=pmc,path=/data/{a,b}/pmc,weight=3", "path=s3://bucket/rocov2,weight=0.5"]
    configs = [parse(TrainConfig, [str(file)], prog="bclip train"), parse(TrainConfig, words, prog="bclip train")]
    assert configs[0] == configs[1]
    assert [source.name for source in configs[0].data.shards if isinstance(source, Source)] == ["pmc", "rocov2"]
    file.write_text(to_toml(configs[0]))
    assert from_toml(TrainConfig, file) == configs[0]
    assert parse(TrainConfig, [str(file), "--data.shards", "/one"], prog="bclip train").data.shards == "/one"
    file.write_text('[[data.shards]]\npath = "a"\nwieght = 3\n')
    with pytest.raises(UserError, match=r"unknown key wieght") as caught:
        parse(TrainConfig, [str(file)], prog="bclip train")
    assert str(file) in str(caught.value)


def test_state_of_other_members_is_refused_by_name(root: Path, tmp_path: Path):
    state = sampler_of(mixed(root, 3, 1)).state_dict()
    sampler_of(mixed(root, 6, 2)).load_state_dict(state)
    for sampler, message in [
        (sampler_of(mixed(root, 2, 1)), "dataset large had a share of 3, and has 2"),
        (sampler_of(mixed(root, 1, 1, key="epochs")), "dataset large had a share of 3, and has 10"),
        (sampler_of(MixedDataset(sources(root, 3, 1)[::-1], mixed(root, 3, 1).members[::-1])), "dataset large"),
        (ShardSampler([40], "x", batch_size=8), "the checkpoint has large, small, this run has one dataset"),
    ]:
        with pytest.raises(UserError, match=message):
            sampler.load_state_dict(state)
    write_shards(tmp_path / "small", num_samples=12, num_val=1, seed=2)
    shutil.copytree(root / "large", tmp_path / "large")
    with pytest.raises(UserError, match="dataset small had fingerprint"):
        sampler_of(mixed(tmp_path, 3, 1)).load_state_dict(state)


def test_missing_or_broken_member_is_named(root: Path, tmp_path: Path):
    shutil.copytree(root, tmp_path / "data")
    with pytest.raises(UserError, match=r"dataset small: .*no split 'other'"):
        open_dataset(sources(root, 0, 1), "other")
    (tmp_path / "data" / "small" / "train-000000.tar").unlink()
    with pytest.raises(UserError, match=r"dataset small: .*train-000000.tar is missing"):
        mixed(tmp_path / "data", 3, 1)
    shutil.rmtree(tmp_path / "data" / "small")
    with pytest.raises(UserError, match=r"dataset small: .*no such folder"):
        mixed(tmp_path / "data", 3, 1)
    assert len(open_dataset(sources(tmp_path / "data", 1, 0), "train")) == 40
    with pytest.raises(UserError, match="batch_size=32 takes 16 samples of dataset small, which has 12"):
        sampler_of(mixed(root, 1, 1), batch_size=32)


def test_groups_of_members_do_not_collide(tmp_path: Path):
    folders: Sequence[Path] = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        with ShardWriter(folder, max_shard_bytes=1 << 20) as writer:
            for number, article in enumerate(["PMC1", "PMC2", "PMC1"]):
                writer.write(Sample(f"s{number}", jpeg(0), "text", {"article": article}), "train")
    dataset = open_dataset(as_sources([str(folder) for folder in folders], "data.shards"), "train")
    groups = group_ids(dataset, "article")
    assert groups is not None
    assert groups.tolist() == [0, 1, 0, 3, 4, 3]
    (folders[1] / "manifest.parquet").unlink()
    with pytest.raises(UserError, match=re.escape(f"dataset b: {folders[1] / 'manifest.parquet'} is missing")):
        group_ids(dataset, "article")


def test_plan_weighs_the_members(root: Path):
    samples = samples_of(TrainConfig(data=DataConfig(shards=sources(root, 3, 1))))
    assert (samples.count, samples.source, len(samples.tokens)) == (52, "large, small", 20)
    sizes = [
        samples_of(TrainConfig(data=DataConfig(shards=str(root / name)))).image_bytes for name in ("large", "small")
    ]
    assert samples.image_bytes == pytest.approx(0.75 * sizes[0] + 0.25 * sizes[1])
