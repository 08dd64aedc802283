"""The commands on a tiny SigLIP: pretraining, evaluation, embedding and search run as for the other models."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import colours
import pytest
import torch
from PIL import Image
from synthetic import tiny_run, write_shards
from towers import SIGLIP

from bclip_fast import load
from bclip_fast.cli import main
from bclip_fast.train.losses import LossConfig
from bclip_fast.train.trainer import train


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(shards, run): three steps of the sigmoid loss, with a tokenizer whose padding token is 0."""
    root = tmp_path_factory.mktemp("siglip")
    shards = write_shards(root / "shards", 48, 16)
    model = dataclasses.replace(
        SIGLIP,
        vision=dataclasses.replace(SIGLIP.vision, image_size=35, patch_dropout=0.25),
        text=dataclasses.replace(SIGLIP.text, pad_id=0),
    )
    config = tiny_run(root / "run", shards, model=model, max_steps=3, loss=LossConfig(kind="siglip"))
    config = dataclasses.replace(
        config, micro_batch_size=8, engine=dataclasses.replace(config.engine, grad_checkpointing=True)
    )
    train(config)
    return shards, root / "run"


def test_trained_model_has_siglips_pixels_and_bias(trained: tuple[Path, Path]) -> None:
    _, folder = trained
    model, preprocess, tokenizer = load(folder)
    assert preprocess.config.mean == (0.5, 0.5, 0.5)
    assert preprocess.config.resize_mode == "squash"
    assert model.config.text.pad_id == tokenizer.pad_id == 0
    assert model.logit_bias is not None and model.logit_bias.item() != -10
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 3 and torch.tensor(losses).isfinite().all()


def test_retrieval_and_embedding_run(trained: tuple[Path, Path], tmp_path: Path) -> None:
    shards, folder = trained
    arguments = ["eval", str(folder), "--task", "retrieval", "--data", str(shards), "--out", str(tmp_path / "results")]
    assert main(arguments) == 0
    assert (tmp_path / "results" / "results.json").is_file()
    assert main(["embed", str(folder), "--data", str(shards), "--out", str(tmp_path / "index")]) == 0


def test_zero_shot_probabilities_are_the_softmax_of_the_logits(trained: tuple[Path, Path], tmp_path: Path) -> None:
    """The AUROC compares images by probability. The bias is the same for all classes, so it has no effect."""
    from sklearn.metrics import roc_auc_score

    _, folder = trained
    shards = colours.write_shards(tmp_path / "shards", 20, lambda i, name: name, lambda i, name: {"colour": name})
    names = sorted(colours.COLOURS)
    file = tmp_path / "prompts.toml"
    file.write_text('templates = ["a {} square"]\n[classes]\n' + "".join(f'{name} = "{name}"\n' for name in names))
    arguments = ["eval", str(folder), "--task", "zero_shot", "--label", "colour", "--prompts", str(file)]
    assert main([*arguments, "--data", str(shards), "--out", str(tmp_path / "results")]) == 0
    result = json.loads((tmp_path / "results" / "results.json").read_text())["tasks"]["zero_shot/colour"]

    model, preprocess, tokenizer = load(folder)
    labels = [list(colours.COLOURS)[i % 4] for i in range(20)]
    files = [colours.jpeg(colours.jitter(colours.COLOURS[name], i)) for i, name in enumerate(labels)]
    images = torch.stack([preprocess(Image.open(io.BytesIO(file))) for file in files])
    with torch.no_grad():
        cosines = model.encode_image(images) @ model.encode_text(tokenizer([f"a {name} square" for name in names])).T
        logits = cosines.double() * model.logit_scale.double().exp() + model.logit_bias.double()
    figures = {figure["name"]: figure for figure in result["figures"]}
    targets = torch.tensor([names.index(name) for name in labels])
    assert figures["accuracy"]["value"] == pytest.approx((logits.argmax(1) == targets).double().mean().item())
    expected = roc_auc_score(targets, logits.softmax(1), multi_class="ovr", average="macro")
    by_class = [roc_auc_score(targets == c, logits.sigmoid()[:, c]) for c in range(4)]
    assert abs(expected - sum(by_class) / 4) > 0.01  # the sigmoids of the classes rank the images in another order
    assert figures["AUROC, macro"]["value"] == pytest.approx(expected)


def test_plan_runs(trained: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    _, folder = trained
    assert main(["plan", str(folder / "config.toml")]) == 0
    assert "image tower" in capsys.readouterr().out
