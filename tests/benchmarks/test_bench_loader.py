"""Tests of `bclip bench loader`: the samples of its contenders, and missing peers."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from pathlib import Path

import pytest
import torch
from peers import import_open_clip
from synthetic import write_shards

from bclip_fast import ops
from bclip_fast.benchmarks import loader
from bclip_fast.benchmarks.loader import LoaderConfig, Source, measure_loader
from bclip_fast.benchmarks.report import BenchConfig, run
from bclip_fast.data.shards.reader import ShardDataset
from bclip_fast.errors import UserError


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Smooth images, because the mean of noise would depend on the resampling.
    return write_shards(tmp_path_factory.mktemp("data") / "shards", num_samples=26, noise=1)


def test_loader_every_contender_gives_all_samples(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("webdataset")
    import_open_clip()
    config = LoaderConfig(shards=str(shards), size=32, batch_size=4, rounds=1, workers=1)
    assert run(BenchConfig("loader", tmp_path, loader=config)) == 0
    rows = [json.loads(line) for line in (tmp_path / "bench.jsonl").read_text().splitlines()]
    names = [row["contender"] for row in rows]
    assert (names[0], names[-1]) == ("webdataset + open_clip", "ours")
    assert set(names) <= set(loader.contenders(Source(config, ShardDataset(shards), [], lambda texts: [])))
    for row in rows:
        assert row["samples"] == 24 and row["samples_per_second"] == pytest.approx(24 / row["seconds"])
        assert row["speedup"] == pytest.approx(rows[0]["seconds"] / row["seconds"])
    assert "samples/s" in capsys.readouterr().out


def test_figures_to_shards_two_articles_holds_their_pairs(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """BCLIP_SHARED_DATA is a folder with two of the real articles."""
    rows = [json.loads(line) for line in (shared_data / "pmc_articles/pairs.jsonl").read_text().splitlines()]
    pairs = [row for row in rows if "/rendered/" in f"/{row['image']}"]
    articles = sorted({row["pmcid"] for row in pairs})[:2]
    for name in articles:
        shutil.copytree(shared_data / "pmc_articles/rendered" / name, tmp_path / "data/pmc_articles/rendered" / name)
    monkeypatch.setenv("BCLIP_SHARED_DATA", str(tmp_path / "data"))
    folder = loader.figures_to_shards(LoaderConfig(max_short_side=100), tmp_path / "shards")
    dataset = ShardDataset(folder)
    expected = [row for row in pairs if row["pmcid"] in articles]
    captions = {dataset.caption(index) for index in range(len(dataset))}
    assert len(dataset) == len(expected) > 2 and len({row["pmcid"] for row in expected}) == 2
    assert {"".join(row["caption"].split()) for row in expected} == {"".join(text.split()) for text in captions}
    assert all(min(ops.image.peek_size(sample.image)) <= 100 for sample in dataset)


def test_measure_loader_wrong_pixels_raises(shards: Path, monkeypatch: pytest.MonkeyPatch):
    our_pass = loader.our_pass
    monkeypatch.setattr(loader, "contenders", lambda source: {
        "black": lambda: lambda: (torch.zeros_like(images) for images in our_pass(source, loader.Loader)()),
        "ours": lambda: our_pass(source, loader.Loader),
    })  # fmt: skip
    with pytest.raises(AssertionError, match="the pixels of black are"):
        measure_loader(LoaderConfig(shards=str(shards), size=32, batch_size=4, rounds=1))


def test_measure_loader_missing_peer_is_logged(
    shards: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with caplog.at_level(logging.WARNING):
        rows = measure_loader(LoaderConfig(shards=str(shards), size=32, batch_size=4, rounds=1, dali=False))
    assert [row["contender"] for row in rows] == ["ours"]
    assert "webdataset + open_clip is not measured: the peer webdataset is not installed" in caplog.text


def test_loader_bad_number_is_refused(shards: Path):
    with pytest.raises(UserError, match=r"loader\.size=0"):
        LoaderConfig(size=0)
    with pytest.raises(UserError, match="the shards hold 26 samples"):
        measure_loader(LoaderConfig(shards=str(shards), batch_size=64))
