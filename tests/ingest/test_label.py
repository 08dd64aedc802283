"""`bclip ingest label`: kinds in the manifest, the same bytes however it runs, and the selection that it records."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from articles import encode_image, manifest_rows, read_tree
from damage import flip_bit
from ingest_runs import ENVIRONMENT
from PIL import Image
from synthetic import COLOURS, tiny_model

from bclip_fast import pretrained
from bclip_fast.data.shards.format import Sample
from bclip_fast.data.shards.mixed import open_dataset
from bclip_fast.data.shards.verify import verify
from bclip_fast.data.shards.writer import ShardWriter
from bclip_fast.data.transform import Preprocess, PreprocessConfig
from bclip_fast.errors import UserError
from bclip_fast.ingest import label
from bclip_fast.ingest.kinds import taxonomy
from bclip_fast.ingest.kinds.classifier import classifier
from bclip_fast.ingest.label import LabelConfig, run
from bclip_fast.model.biomedclip import BiomedClip
from bclip_fast.model.tokenizer import Tokenizer

CAPTIONS = ["Axial CT scan of the chest.", "Western blot of the cells, lanes 1 to 4.", "Kaplan-Meier curve, P < 0.05."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """30 squares of colours on grey, 10 of them in a second split, in shards of about three samples."""
    folder = tmp_path_factory.mktemp("label") / "shards"
    with ShardWriter(folder, max_shard_bytes=3 * 4096) as writer:
        for i in range(30):
            pixels = np.random.default_rng(i).integers(0, 90, (48, 64, 3), np.uint8)
            pixels[8:40, 12:50] = list(COLOURS.values())[i % 8]
            image = encode_image(Image.fromarray(pixels))
            writer.write(Sample(f"k{i:02}", image, CAPTIONS[i % 3], {"year": 2000 + i}), "train" if i < 20 else "val")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    config = tiny_model()
    texts = [prompt for prompts in taxonomy().prompts() for prompt in prompts]
    tokenizer = Tokenizer.train(texts, config.text.vocab_size, config.text.context_length)
    folder = tmp_path_factory.mktemp("model") / "tiny"
    pretrained.save(folder, BiomedClip(config), Preprocess(PreprocessConfig(size=32)), tokenizer)
    return str(folder)


def copied(folder, tmp_path, name="data"):
    return shutil.copytree(folder, tmp_path / name)


def test_labels_are_columns_and_all_else_stays(folder, tmp_path):
    data = copied(folder, tmp_path)
    run(LabelConfig(data, workers=1))
    before, after = read_tree(folder), read_tree(data)
    assert {name for name in after if before.get(name) != after[name]} == {"manifest.parquet"}
    assert verify(data) == []
    rows, old = manifest_rows(data), manifest_rows(folder)
    new = {"kind", "kind_p", "kind_by"}
    assert [{name: row[name] for name in row if name not in new} for row in rows.values()] == list(old.values())
    assert {row["kind_by"] for row in rows.values()} == {f"features-{classifier().version}"}
    assert {row["kind"] for row in rows.values()} <= set(taxonomy().names)
    assert all(1 / 18 < row["kind_p"] <= 1 for row in rows.values())
    run(LabelConfig(data, workers=1))
    assert read_tree(data) == after
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize("with_model", [False, True])
def test_engines_workers_and_kills_give_the_same_bytes(folder, model, tmp_path, with_model, monkeypatch):
    """Kill -9 after each of several shards, in the middle of the manifest, and before the end."""
    options = {"model": model, "batch_size": 2, "device": "cpu"} if with_model else {}
    expected = copied(folder, tmp_path, "expected")
    run(LabelConfig(expected, workers=1, **options))
    several = copied(folder, tmp_path, "several")
    run(LabelConfig(several, workers=2, **options))
    assert read_tree(several) == read_tree(expected)
    data = copied(folder, tmp_path, "killed")
    script = tmp_path / "kill.py"
    script.write_text(_KILL)
    arguments = [sys.executable, str(script), str(data), json.dumps(options)]
    places = ("shard 1", "manifest") if with_model else ("shard 1", "shard 4", "manifest", "replace", "end")
    for place in places:
        ended = subprocess.run([*arguments, place], env=ENVIRONMENT, capture_output=True, check=False)
        assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
        assert verify(data) == []
    done = []
    monkeypatch.setattr(label, "label_shard", lambda task: done.append(task.shard))
    run(LabelConfig(data, workers=1, **options))
    assert done == []  # the last kill came after all shards
    assert read_tree(data) == read_tree(expected)


_KILL = """
import json, os, signal, sys
from pathlib import Path
from bclip_fast.ingest import label
from bclip_fast.io import atomic
data, options, place = sys.argv[1:]
def kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
def before(module, name, number=0):
    function, count = getattr(module, name), [0]
    def wrapped(*arguments, **keywords):
        if count[0] == number:
            kill()
        count[0] += 1
        return function(*arguments, **keywords)
    setattr(module, name, wrapped)
if place.startswith("shard"):
    before(label, "write_text", int(place.split()[1]))
elif place == "manifest":
    import pyarrow
    before(pyarrow, "array", 2)
elif place == "replace":
    import pyarrow.parquet
    before(pyarrow.parquet.ParquetWriter, "close")
else:
    before(label.shutil, "rmtree")
label.run(label.LabelConfig(Path(data), workers=1, **json.loads(options)))
"""


@pytest.mark.slow
def test_ray_gives_the_same_bytes(folder, tmp_path):
    pytest.importorskip("ray")
    local, ray = copied(folder, tmp_path, "local"), copied(folder, tmp_path, "ray")
    run(LabelConfig(local, workers=1))
    run(LabelConfig(ray, workers=2, engine="ray"))
    assert read_tree(ray) == read_tree(local)


def test_another_model_replaces_the_columns(folder, model, tmp_path):
    data = copied(folder, tmp_path)
    run(LabelConfig(data, workers=1))
    prompts = tmp_path / "two.toml"
    prompts.write_text('templates = ["{}"]\n[warm]\nnames = ["red", "orange"]\n[cold]\nnames = ["blue"]\n')
    run(LabelConfig(data, model=model, prompts=prompts, workers=1, device="cpu"))
    rows = manifest_rows(data).values()
    assert {row["kind"] for row in rows} <= {"warm", "cold"}
    assert all(0.5 <= row["kind_p"] <= 1 for row in rows)
    assert len({row["kind_by"] for row in rows}) == 1
    assert next(iter(rows))["kind_by"].startswith(f"{model} ")
    assert pq.read_schema(data / "manifest.parquet").names.count("kind") == 1


def test_damaged_image_has_no_kind(folder, tmp_path, caplog):
    data = copied(folder, tmp_path)
    row = manifest_rows(data)["k07"]
    flip_bit(data, "jpg", row["shard"], row["position"])
    run(LabelConfig(data, workers=1))
    assert [key for key, row in manifest_rows(data).items() if row["kind"] is None] == ["k07"]
    assert "1 images are damaged" in caplog.text


def test_recorded_filter_selects_and_is_removed(folder, tmp_path, caplog):
    caplog.set_level("INFO")
    data = copied(folder, tmp_path)
    run(LabelConfig(data, workers=1, filter="kind is not null and 2004 < year < 2025"))
    assert "selects 20 of 30 pairs (15 train, 5 val)" in caplog.text
    assert len(open_dataset(str(data), "train", filter="")) == 15
    assert verify(data) == []
    with pytest.raises(UserError, match=r"selects none of the 30 pairs .*year > 3000: 0"):
        run(LabelConfig(data, workers=1, filter="year > 3000"))
    assert len(open_dataset(str(data), "train", filter="")) == 15
    run(LabelConfig(data, workers=1, filter="all"))
    assert len(open_dataset(str(data), "train", filter="")) == 20
    assert read_tree(data)["dataset.json"] == read_tree(folder)["dataset.json"]


def test_wrong_arguments_are_errors(folder, tmp_path, monkeypatch):
    data = copied(folder, tmp_path)
    bad = tmp_path / "bad.toml"
    bad.write_text("templates = []\n[a]\nnames = ['a']\n[b]\nnames = ['b']\n")
    for options, message in [
        ({"prompts": bad, "model": "x"}, "templates"),
        ({"prompts": tmp_path / "none.toml", "model": "x"}, "cannot be read"),
        ({"model": str(tmp_path / "none")}, "none"),
    ]:
        with pytest.raises(UserError, match=message):
            run(LabelConfig(data, **options))
    # Before the images are read, so a slip costs no time.
    monkeypatch.setattr("bclip_fast.ingest.label._label", lambda *args: pytest.fail("the dataset was labelled"))
    with pytest.raises(UserError, match="no column colour"):
        run(LabelConfig(data, filter="colour == 1 and p > 0.5"))
    (data / "manifest.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="cannot be read"):
        run(LabelConfig(data, filter="p > 0.5"))
    for options, message in [
        ({"prompts": bad}, "needs --model"),
        ({"filter": "kind ="}, "not an expression"),
        ({"batch_size": 0}, "at least 1"),
    ]:
        with pytest.raises(UserError, match=message):
            LabelConfig(data, **options)
    (data / "manifest.parquet").unlink()
    with pytest.raises(UserError, match="is missing"):
        run(LabelConfig(data))


def test_model_without_finite_values_is_an_error(folder, monkeypatch):
    class Model:
        def encode_image(self, pixels):
            return torch.full((len(pixels), 4), torch.nan)

    parts = (Model(), lambda image: torch.zeros(3), torch.eye(18, 4), torch.tensor(1.0), torch.device("cpu"))
    monkeypatch.setattr("bclip_fast.ingest.label._model", lambda labeller: parts)
    (sample,) = open_dataset(str(folder), "train").fetch([0])()
    with pytest.raises(UserError, match="model=broken gives values that are not finite"):
        list(label.zero_shot(label.Labeller("broken"), iter([sample])))
