"""Runs on the samples that a filter selects."""

from __future__ import annotations

import dataclasses
import json

import pytest
from runs import assert_equal_runs, records, stopped_after
from synthetic import tiny_run, write_shards

from bclip_fast import cli
from bclip_fast import config as config_files
from bclip_fast.data.shards.reader import ShardDataset
from bclip_fast.data.sources import Source
from bclip_fast.errors import UserError
from bclip_fast.plan.samples import samples_of
from bclip_fast.train.config import DataConfig
from bclip_fast.train.inputs import build_sampler, open_dataset
from bclip_fast.train.trainer import train

RED_OR_BLUE = "caption in ['a red square at the left', 'a blue square at the top'] or position == 0"


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("filtered") / "shards", num_samples=256, num_val=8, texts=True)


def config(run, shards, filter=RED_OR_BLUE, **changes):
    return tiny_run(run, shards, batch_size=8, data=DataConfig(shards=str(shards), filter=filter), **changes)


def selected(shards):
    captions = ("a red square at the left", "a blue square at the top")
    dataset = ShardDataset(shards)
    starts = set(dataset.shard_starts().values())
    return [i for i in range(len(dataset)) if dataset.caption(i) in captions or i in starts]


def test_an_epoch_has_each_selected_sample_once(shards, tmp_path):
    dataset = open_dataset(config(tmp_path, shards).data)
    sampler = build_sampler(config(tmp_path, shards), dataset)
    order = [[dataset.name_of(sampler.sample(epoch, i))[0] for i in range(len(dataset))] for epoch in range(2)]
    expected = [f"sample{i:04d}" for i in selected(shards)]
    assert sorted(order[0]) == sorted(order[1]) == expected
    assert order[0] != order[1]


@pytest.mark.parametrize("changes", [{}, {"micro_batch_tokens": 160}, {"positives": "captions"}], ids=str)
def test_filtered_run_resumes_and_refuses_another_filter(shards, tmp_path, changes):
    data = {name: changes[name] for name in ("positives",) if name in changes}
    settings = {name: value for name, value in changes.items() if name not in data}
    full = config(tmp_path / "full", shards, **settings)
    full = dataclasses.replace(full, data=dataclasses.replace(full.data, **data))
    train(full)
    stopped = stopped_after(tmp_path / "full", tmp_path / "stopped", 3)
    resumed = dataclasses.replace(full, run=str(stopped), resume=True)
    train(resumed)
    assert_equal_runs(stopped, tmp_path / "full")
    assert len(records(stopped)) == 6
    for filter in ("position == 0", "all"):
        other = dataclasses.replace(resumed, data=dataclasses.replace(resumed.data, filter=filter))
        with pytest.raises(UserError, match=r"data\.filter"):
            train(other)


def test_mixture_filters_each_dataset_and_plans_count_the_selection(shards, tmp_path):
    other = write_shards(tmp_path / "other", num_samples=64, num_val=0)
    mixture = (Source(str(shards), "a", weight=1), Source(str(other), "b", weight=1))
    mixed = open_dataset(DataConfig(shards=mixture, filter=RED_OR_BLUE))
    assert [len(member) for member in mixed.members] == [len(selected(shards)), len(selected(other))]
    assert samples_of(config(tmp_path / "run", shards)).count == len(selected(shards))
    with pytest.raises(UserError, match=r"dataset b: filter .* selects none"):
        open_dataset(DataConfig(shards=mixture, filter="key > 'sample0100'"))


def test_plans_say_how_many_samples_the_filter_selects(shards, tmp_path, capsys):
    (tmp_path / "config.toml").write_text(config_files.to_toml(config(tmp_path / "run", shards, filter="")))
    for command in (("plan",), ("train", "--dry_run")):
        assert cli.main([command[0], str(tmp_path / "config.toml"), *command[1:], "--data.filter", RED_OR_BLUE]) == 0
        assert f"{len(selected(shards))} an epoch" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_run_uses_the_selection_of_its_dataset(shards, tmp_path):
    description = json.loads((shards / "dataset.json").read_text())
    (shards / "dataset.json").write_text(json.dumps({**description, "filter": "position == 0"}))
    try:
        assert len(open_dataset(DataConfig(shards=str(shards)))) == len(ShardDataset(shards).shard_sizes)
        assert len(open_dataset(DataConfig(shards=str(shards), filter="all"))) == 256
    finally:
        (shards / "dataset.json").write_text(json.dumps(description))
