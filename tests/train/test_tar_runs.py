"""Every command that takes shards takes tar files of others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from foreign_tars import encoded, pixels, write_tar, write_tars
from runs import column
from synthetic import tiny_run, write_shards

from bclip_fast.cli import main
from bclip_fast.data.sources import Source
from bclip_fast.errors import UserError
from bclip_fast.ingest.verify import VerifyConfig
from bclip_fast.ingest.verify import run as verify
from bclip_fast.plan.samples import samples_of
from bclip_fast.search.index import EmbedConfig, embed
from bclip_fast.train.config import CheckpointConfig, DataConfig, TrainConfig, ValidationConfig
from bclip_fast.train.finetune import FinetuneConfig, finetune
from bclip_fast.train.trainer import train


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tars/train and tars/val with captions in .txt, named.tar with captions in JSON, and shards of ours."""
    root = tmp_path_factory.mktemp("tars")
    write_tars(root / "tars" / "train", 32)
    write_tars(root / "tars" / "val", 8, first=100)
    write_tars(root / "json", 16, first=200, captions="text")
    write_shards(root / "ours", num_samples=32, num_val=8)
    return root


@pytest.fixture(autouse=True)
def _cache(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BCLIP_CACHE", str(root / "cache"))


def run_of(run: Path, shards: Any, **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "data": DataConfig(shards=shards, shuffle_block=32),
        "checkpoint": CheckpointConfig(every_steps=0),
        "max_steps": 2,
    }
    return tiny_run(run, run, **(settings | changes))


@pytest.fixture(scope="module")
def model(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on tar files, in micro-batches with a token budget, validated on their split val."""
    run = tmp_path_factory.mktemp("model") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BCLIP_CACHE", str(root / "cache"))
        validation = ValidationConfig(every_steps=1, batch_size=8)
        train(run_of(run, str(root / "tars"), validation=validation, micro_batch_tokens=200))
    return run


def test_run_on_tar_files_validates_on_their_split(model: Path):
    assert len(column(model, "loss")) == 2
    assert len(column(model, "validation/image to text R@1")) == 2


def test_tar_files_and_shards_are_mixed(root: Path, tmp_path: Path):
    listed = [
        Source(str(root / "ours"), weight=1),
        Source(f"{root}/json/{{00000..00001}}.tar", caption_key="text", weight=1),
    ]
    train(run_of(tmp_path / "run", tuple(listed)))
    assert column(tmp_path / "run", "samples/ours") == column(tmp_path / "run", "samples/json") == [8, 16]
    train(run_of(tmp_path / "run", tuple(listed), resume=True, max_steps=3))
    assert len(column(tmp_path / "run", "loss")) == 3
    assert samples_of(run_of(tmp_path, tuple(listed))).count == 48


def test_evaluation_takes_tar_files(model: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    shared = ["--task", "retrieval", "--cache", "none", "--no-progress", "--batch_size", "8"]
    data = [
        [],
        ["--data", str(root / "tars")],
        ["--data", f"path={root / 'json'},caption_key=text", "--split", "train"],
    ]
    for number, (arguments, count) in enumerate(zip(data, (8, 8, 16), strict=True)):
        out = tmp_path / str(number)
        assert main(["eval", str(model), *arguments, *shared, "--out", str(out)]) == 0
        figures = json.loads((out / "results.json").read_text())["tasks"]["retrieval"]["figures"]
        assert {figure["num_samples"] for figure in figures} == {count}
    assert main(["eval", str(model), "--data", str(root / "json"), *shared]) == 2
    assert "no split 'val': the names of its tar files tell no split" in capsys.readouterr().err


def test_embed_and_finetune_take_tar_files(model: Path, root: Path, tmp_path: Path):
    pytest.importorskip("faiss")
    import pyarrow.parquet as pq

    embed(EmbedConfig(model=str(model), data=str(root / "tars"), out=str(tmp_path / "index"), progress=False))
    assert pq.read_table(tmp_path / "index" / "embeddings.parquet")["caption"].to_pylist() == [
        f"caption {i}" for i in range(100, 108)
    ]
    data = (Source(str(root / "json"), caption_key="text"),)
    finetune(FinetuneConfig(model=str(model), data=data, run=str(tmp_path / "run"), epochs=1, batch_size=8))
    assert len(column(tmp_path / "run", "loss")) == 2
    with pytest.raises(UserError, match="dataset json has a weight or epochs, which bclip finetune doesn't use"):
        FinetuneConfig(model=str(model), data=(Source(str(root / "json"), weight=1),))


def test_verify_reads_tar_files_again(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert verify(VerifyConfig(str(root / "tars"))) == 0
    assert "no problems found" in capsys.readouterr().out
    good = encoded(pixels(0))
    path = write_tar(
        tmp_path / "a.tar", {"0.jpg": good, "0.txt": b"x", "1.jpg": good[:-200], "1.txt": b"x", "2.jpg": good}
    )
    assert verify(VerifyConfig(str(path))) == 1
    out = capsys.readouterr().out
    assert "left out 1 groups of files without a caption, the first a.tar/2" in out
    assert "a.tar: sample a/1: its image cannot be decoded" in out
    assert out.endswith("2 problems\n")
    with pytest.raises(UserError, match="caption_key=x is only for tar files of others"):
        verify(VerifyConfig(str(root / "ours"), caption_key="x"))


@pytest.mark.parametrize(
    ("shards", "changes", "message"),
    [
        ("json", {}, "set caption_key to the key of the caption"),
        ("tars/train", {"validation": ValidationConfig(every_steps=1)}, "no split 'val'"),
        ("tars", {"positives": "article"}, "data.positives=article needs manifest.parquet, which the tar files of"),
    ],
)
def test_run_that_tar_files_do_not_allow_writes_nothing(
    root: Path, tmp_path: Path, shards: str, changes: dict[str, Any], message: str
):
    data = DataConfig(shards=str(root / shards), shuffle_block=32, positives=changes.get("positives", "pair"))
    changes = {name: value for name, value in changes.items() if name != "positives"}
    with pytest.raises(UserError, match=message):
        train(run_of(tmp_path / "run", "", data=data, **changes))
    assert not (tmp_path / "run").exists()
