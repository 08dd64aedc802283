"""`bclip eval --filter` and `bclip finetune --filter`: the selected samples of shards, and errors for other data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from colours import COLOURS, assert_refused, evaluate_with, jpeg, write_class_folders, write_shards
from finetunes import settings, write_start

from bclip_fast.data.shards.format import Sample
from bclip_fast.data.shards.writer import ShardWriter
from bclip_fast.errors import UserError
from bclip_fast.eval import EvalConfig
from bclip_fast.eval.command import EvalCommand, _default_out
from bclip_fast.train.class_data import read as read_classes
from bclip_fast.train.finetune import finetune
from bclip_fast.train.finetune_objectives import Pairs


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """24 pairs of four colours, which record the selection of the red ones."""
    root = write_shards(tmp_path / "shards", 24, lambda _, name: f"a {name} square", lambda i, name: {"colour": name})
    description = json.loads((root / "dataset.json").read_text())
    (root / "dataset.json").write_text(json.dumps({**description, "filter": "colour == 'red'"}))
    return root


def evaluated(shards: Path, cache: Path, filter: str) -> dict:
    config = EvalConfig(
        data=str(shards), task=("zero_shot",), label=("colour",), filter=filter, cache=str(cache), progress=False
    )
    (result,) = evaluate_with(config)["tasks"].values()
    return result


def test_evaluation_takes_the_selected_samples_only(shards: Path, tmp_path: Path):
    chosen = {name: evaluated(shards, tmp_path / "cache", name) for name in ("colour in ['red', 'blue']", "all", "")}
    assert [result["task"]["data"]["num_samples"] for result in chosen.values()] == [12, 24, 24]
    classes = [{row["class"] for row in result["per_class"]} for result in chosen.values()]
    assert classes == [{"red", "blue"}, set(COLOURS), set(COLOURS)]
    # The first selection and all samples, for which the selection that the shards record doesn't count.
    assert len({result["task"]["data"]["fingerprint"] for result in chosen.values()}) == 2
    before = set((tmp_path / "cache").rglob("*.safetensors"))
    again = evaluated(shards, tmp_path / "cache", "colour == 'red' or colour == 'blue'")
    assert again["figures"] == chosen["colour in ['red', 'blue']"]["figures"]
    assert set((tmp_path / "cache").rglob("*.safetensors")) == before  # equal samples have equal embeddings


def test_results_of_another_filter_have_another_folder(shards: Path, tmp_path: Path):
    def folder(filter: str) -> Path:
        return _default_out(EvalCommand(model=str(tmp_path), data=str(shards), filter=filter), tmp_path)

    plain = folder("")
    config = {"data": str(shards), "split": "val", "task": [], "filter": "colour == 'red'"}
    plain.mkdir(parents=True)
    (plain / "results.json").write_text(json.dumps({"model": {"path": str(tmp_path)}, "config": config}))
    assert folder("colour == 'red'") == plain
    assert len({plain, folder(""), folder("colour == 'blue'")}) == 3


def test_filter_of_other_data_is_an_error(tmp_path: Path):
    folders = write_class_folders(tmp_path / "folders", {"val": 2})
    assert_refused(folders, "filter=.* selects samples of shards, and data .* are none", filter="colour == 'red'")
    assert_refused(folders, "not questions", filter="colour == 'red'", task=("vqa",))
    for cls in (EvalConfig, lambda **options: settings(tmp_path, tmp_path, tmp_path, **options)):
        with pytest.raises(UserError, match="not an expression"):
            cls(filter="colour =")
    with pytest.raises(UserError, match="but task=vqa has none"):
        settings(tmp_path, tmp_path, tmp_path, filter="colour == 'red'")


def test_finetuning_takes_the_selection(shards: Path, tmp_path: Path):
    start = write_start(tmp_path / "start")

    def config(filter: str, **changes: object):
        return settings(start, shards, tmp_path / "run", task="", split="val", filter=filter, **changes)

    # Without a filter, the selection that the shards record.
    counts = [len(Pairs(config(filter)).texts) for filter in ("", "all", "colour in ['red', 'blue']")]
    assert counts == [6, 24, 12]
    finetune(config("colour in ['red', 'blue']", epochs=1))
    with pytest.raises(UserError, match="another filter"):
        finetune(config("all", epochs=1, resume=True))


def test_classes_are_those_of_the_selection(tmp_path: Path):
    with ShardWriter(tmp_path / "shards") as writer:
        for i in range(24):
            name = list(COLOURS)[i % 4]
            writer.write(
                Sample(f"s{i}", jpeg(COLOURS[name]), "a square", {"colour": name}), "train" if i < 16 else "val"
            )
    config = settings(
        tmp_path, tmp_path / "shards", tmp_path, task="classification", label="colour", filter="colour != 'red'"
    )
    assert sorted(read_classes(config).classes) == ["blue", "green", "grey"]
