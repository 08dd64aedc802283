"""Runs that draw one of several texts of a sample."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from runs import assert_equal_runs, stopped_after
from synthetic import tiny_run, write_shards

from bclip_fast import config as config_files
from bclip_fast.data.shards.reader import ShardDataset
from bclip_fast.data.texts import CaptionWeights, TextChoice
from bclip_fast.errors import UserError
from bclip_fast.plan.samples import samples_of
from bclip_fast.train.config import DataConfig, TrainConfig, ValidationConfig
from bclip_fast.train.trainer import train

WEIGHTS = CaptionWeights(caption=0.3, mention=0.6, title=0.1)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("captions") / "shards", num_samples=48, num_val=16, texts=True)


def first_loss(run: Path) -> float:
    with (run / "metrics.jsonl").open() as lines:
        return next(row["loss"] for row in map(json.loads, lines) if "loss" in row)


def test_run_with_mentions_resumes_exactly_and_validates_captions(shards: Path, tmp_path: Path):
    config = tiny_run(tmp_path / "run", shards, micro_batch_size=8, validation=ValidationConfig(every_steps=6))
    # The tower of 12 tokens reads parts of the longer texts.
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, captions=WEIGHTS, long_texts="sentences")
    )
    train(config)
    resumed = dataclasses.replace(
        config, run=str(stopped_after(tmp_path / "run", tmp_path / "resumed", 3)), resume=True
    )
    train(resumed)
    assert_equal_runs(tmp_path / "resumed", tmp_path / "run")
    vocabulary = (tmp_path / "run/model/tokenizer.json").read_text()
    assert '"see"' in vocabulary
    stopped_after(tmp_path / "run", tmp_path / "changed", 3)
    other = dataclasses.replace(config.data, captions=CaptionWeights())
    with pytest.raises(
        UserError, match=r"data\.captions\.caption: 0\.3 -> 1\.0, data\.captions\.mention: 0\.6 -> 0\.0"
    ):
        train(dataclasses.replace(resumed, run=str(tmp_path / "changed"), data=other))


def test_plan_counts_the_tokens_of_the_drawn_texts(shards: Path, tmp_path: Path):
    config = tiny_run(tmp_path, shards)
    dataset, choice = ShardDataset(shards), TextChoice(WEIGHTS, config.seed)
    planned = samples_of(dataclasses.replace(config, data=dataclasses.replace(config.data, captions=WEIGHTS)))
    drawn = sum(choice.num_bytes(0, index, dataset) for index in range(len(dataset))) / len(dataset)
    assert sum(planned.tokens) / 20 == pytest.approx(2 + drawn / 4.4, abs=0.7)
    assert planned.tokens != samples_of(config).tokens


def test_kind_without_samples_is_refused_before_anything_is_written(shards: Path, tmp_path: Path):
    data = DataConfig(shards=str(shards), captions=CaptionWeights(panel=0.2))
    with pytest.raises(UserError, match=r"data\.captions\.panel=0\.2: no sample of .* has such a text"):
        train(tiny_run(tmp_path / "run", shards, data=data))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data.captions.mention", "-1"], r"data\.captions\.mention=-1"),
        (["--data.captions.caption", "0"], r"data\.captions has only weights of 0"),
        (["--data.captions.abstract", "1"], r"--data\.captions\.abstract"),
    ],
)
def test_weights_of_a_command_are_checked(flags: list[str], message: str):
    with pytest.raises(UserError, match=message):
        config_files.parse(TrainConfig, flags, prog="bclip train")
