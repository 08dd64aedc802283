"""The model card: what the run's files say, and nothing that they don't."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import yaml
from towers import SMALL

from bclip_fast import pretrained
from bclip_fast.cli import main
from bclip_fast.data.transform import Preprocess, PreprocessConfig
from bclip_fast.errors import UserError
from bclip_fast.export import card
from bclip_fast.export.command import ExportConfig
from bclip_fast.model.biomedclip import BiomedClip
from bclip_fast.model.tokenizer import Tokenizer


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder, the data that it names, and an evaluation."""
    data = tmp_path / "pmc"
    data.mkdir()
    splits = {"train": {"samples": 1200}, "val": {"samples": 30}}
    (data / "dataset.json").write_text(json.dumps({"splits": splits, "fingerprint": "f" * 64}))
    licences = ["CC BY"] * 3 + ["CC BY-NC"] + [None]
    parquet.write_table(pa.table({"licence": licences}), data / "manifest.parquet")
    folder = tmp_path / "run"
    tokenizer = Tokenizer.train(["cells of the lung"] * 3, 100, 20)
    pretrained.save(folder / "model", BiomedClip(SMALL).eval(), Preprocess(PreprocessConfig(size=32)), tokenizer)
    (folder / "config.toml").write_text(
        f'epochs = 3\nbatch_size = 64\n[data]\nshards = "{data}"\n[loss]\nkind = "siglip"\n[optim]\nlr = 5e-4\n'
    )
    lines = [{"step": 1, "loss": 4.0}, {"step": 2, "validation/recall@1": 0.1234567, "validation/seconds": 3.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluation = tmp_path / "eval"
    (evaluation / "samples").mkdir(parents=True)
    (evaluation / "samples" / "lung.csv").write_text("key\na\n")
    figure = {"name": "accuracy | <b>", "value": 0.75, "interval": [0.5, 0.9], "num_samples": 40, "unit": ""}
    task = {"figures": [figure], "samples_file": "samples/lung.csv"}
    (evaluation / "results.json").write_text(json.dumps({"tasks": {"lung": task}}))
    return folder


def test_card_states_data_licences_recipe_and_metrics_of_the_run(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--evaluations", str(tmp_path / "eval"), "--license", "cc-by-nc-4.0"]
    assert main(["export", str(run), "-o", str(out), *arguments]) == 0
    text = (out / "README.md").read_text()
    head = yaml.safe_load(text.split("---")[1])
    assert head["library_name"] == "open_clip" and head["license"] == "cc-by-nc-4.0"
    assert "zero-shot-image-classification" in head["tags"]
    for line in (
        "- `pmc`: 1,200 of train, 30 of val. SHA-256 of the samples: `" + "f" * 64 + "`.",
        "Licences of the figures: CC BY (3), CC BY-NC (1), not stated (1).",
        "| loss | siglip |",
        "| learning rate | 0.0005 |",
        "| recall@1 | 0.1235 |",
        "| lung | accuracy \\| &lt;b> | 0.75 | 0.5 to 0.9 | 40 |",
        "The weights: cc-by-nc-4.0.",
        "## Intended use",
        "It isn't a medical device",
    ):
        assert line in text
    assert "seconds" not in text and str(tmp_path) not in text
    assert pretrained.load(out)[0].config == SMALL


def test_card_names_what_is_unknown_and_keeps_a_card_of_the_users(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["export", str(run / "model"), "-o", str(out)]) == 0
    text = (out / "README.md").read_text()
    assert "Unknown: the model wasn't exported from the folder of its training run." in text
    assert "The licence of the weights isn't stated." in text
    (out / "README.md").write_text("my own card")
    assert main(["export", str(run), "-o", str(out)]) == 0
    assert (out / "README.md").read_text() == "my own card"


def test_card_of_a_run_with_max_steps_names_steps_and_no_epochs(run: Path) -> None:
    assert ("epochs", "3") in card.read_run(run).recipe
    (run / "config.toml").write_text("max_steps = 4\n" + (run / "config.toml").read_text())
    recipe = dict(card.read_run(run).recipe)
    assert recipe["steps"] == "4" and "epochs" not in recipe


def test_card_of_a_run_whose_data_are_elsewhere_says_so(run: Path) -> None:
    content = (run / "config.toml").read_text().replace("/pmc", "/moved")
    (run / "config.toml").write_text(content)
    (run / "metrics.jsonl").unlink()
    read = card.read_run(run)
    assert read is not None
    assert read.data == ["- `moved`: its files were not there when the model was exported."]
    assert read.metrics == []


def test_weights_alone_load_into_the_model_of_open_clips_names(run: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    out = tmp_path / "out"
    assert main(["export", str(run), "--to", "safetensors", "--precision", "bf16", "-o", str(out)]) == 0
    state = load_file(out / "model.safetensors")
    whole = load_file(run / "model" / "open_clip_model.safetensors")
    assert state.keys() == whole.keys()
    assert all(state[name].equal(whole[name].to(state[name].dtype)) for name in whole)
    assert str(state["visual.trunk.cls_token"].dtype) == "torch.bfloat16"


def test_card_of_a_run_with_damaged_files_names_what_is_unknown(run: Path) -> None:
    data = run.parent / "pmc" / "dataset.json"
    for content in ('{"splits": {"train": {"samples": "many"}}, "fingerprint": ""}', '{"splits": ["train"]}', "{}"):
        data.write_text(content)
        found = card.read_run(run)
        assert found is not None
        assert "were not there when the model was exported" in found.data[0]
    (run / "config.toml").write_text("data = 5")
    found = card.read_run(run)
    assert found is not None
    assert found.data == []


def test_export_refuses_a_licence_that_would_add_lines_to_the_card() -> None:
    with pytest.raises(UserError, match="is not a licence's name"):
        ExportConfig(model="x", out=Path("y"), license="mit\ntags: evil")
