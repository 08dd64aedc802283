"""`bclip export --to onnx`: onnxruntime gives the model's embeddings, without our package."""

from __future__ import annotations

import csv
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from coca_models import COCA
from PIL import Image
from towers import GPT, SIGLIP, SMALL, shaken

from bclip_fast import pretrained
from bclip_fast.cli import main
from bclip_fast.data.transform import Preprocess, PreprocessConfig
from bclip_fast.export import onnx_files, parity
from bclip_fast.model.biomedclip import BiomedClip, BiomedClipConfig
from bclip_fast.model.tokenizer import Tokenizer
from bclip_fast.model.vision import VisionConfig

CAPTIONS = ["a red square at the left", "cells", "a blue square at the top of the picture &amp; more words than fit"]
RESNET = VisionConfig(kind="resnet", image_size=64, patch_size=32, width=8, layers=4, heads=8, blocks=(1, 1, 1, 1))


def saved(folder: Path, config: BiomedClipConfig, tokenizer: Tokenizer | None = None, **preprocess: Any) -> BiomedClip:
    torch.manual_seed(0)
    model = shaken(BiomedClip(config)).eval()
    text = config.text
    tokenizer = tokenizer or Tokenizer.train(CAPTIONS * 3, text.vocab_size, text.context_length)
    pretrained.save(folder, model, Preprocess(PreprocessConfig(size=config.vision.image_size, **preprocess)), tokenizer)
    return model


@pytest.fixture(scope="module")
def long_model(tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> Path:
    """A small model with 256 tokens and PubMedBERT's vocabulary."""
    folder = tmp_path_factory.mktemp("long")
    text = dataclasses.replace(SMALL.text, context_length=256, vocab_size=30522, max_positions=512)
    tokenizer = Tokenizer.from_file(shared_data / "vocab" / "pubmedbert" / "vocab.txt", 256)
    saved(folder / "model", dataclasses.replace(SMALL, text=text), tokenizer)
    assert main(["export", str(folder / "model"), "--to", "onnx", "--int8", "-o", str(folder / "onnx")]) == 0
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> str:
    """Real radiographs and their captions as a CSV file."""
    folder = shared_data / "pairs"
    path = tmp_path_factory.mktemp("pairs") / "pairs.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "caption"])
        for pair in json.loads((folder / "covid_cxr_ccby" / "pairs.json").read_text())[:20]:
            writer.writerow([folder / pair["image"], pair["text"]])
    return str(path)


def test_onnx_of_real_pictures_and_captions_equals_torch(long_model: Path, pairs: str) -> None:
    model, preprocess, tokenizer = pretrained.load(long_model / "model")
    samples = parity.read_samples(pairs, "test", preprocess)
    caption = " ".join(samples.captions)
    for num_tokens in (3, 17, 256):
        captions = [caption[i * 11 :] if num_tokens > 3 else ["lung", "chest"][i % 2] for i in range(7)]
        ids = tokenizer(captions, num_tokens)
        assert int((ids != tokenizer.pad_id).sum()) == 7 * num_tokens
        for batch in (1, 7):
            given = parity.run(long_model / "onnx" / "text.onnx", ids, batch)
            with torch.no_grad():
                torch.testing.assert_close(given, model.encode_text(ids), rtol=0, atol=1e-5)
    with torch.no_grad():
        expected = model.encode_image(samples.images)
    for batch in (1, 7):
        given = parity.run(long_model / "onnx" / "image.onnx", samples.images, batch)
        torch.testing.assert_close(given, expected, rtol=0, atol=1e-5)


def test_export_prints_what_8_bits_lose_on_given_pairs(long_model: Path, pairs: str) -> None:
    model, preprocess, tokenizer = pretrained.load(long_model / "model")
    samples = parity.read_samples(pairs, "test", preprocess)
    loss = parity.check(long_model / "onnx", model, tokenizer, samples, int8=True)
    assert loss is not None and loss.recall is not None
    assert loss.num_samples == len(samples.captions)
    assert 0.98 < loss.image < 0.99999 and 0.98 < loss.text < 0.99999
    assert f"{loss.num_samples} samples: mean cosine {loss.image:.5f} for images" in str(loss)
    assert "Recall@1 image to text" in str(loss)


# Runs the card's code, where importing our package is an error.
ALONE = """
import json, sys
from pathlib import Path

class Refuse:
    def find_spec(self, name, *_):
        assert name.split(".")[0] not in ("bclip_fast", "torch"), name

sys.meta_path.insert(0, Refuse())
folder, images, captions = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
for block in Path(folder, "README.md").read_text().split("```python\\n")[1:]:
    exec(block.partition("```")[0])
rows = [embed_images(folder, [Image.open(path) for path in images]), embed_captions(folder, captions)]
np.save(sys.argv[4], np.concatenate(rows))
"""


def test_code_of_onnx_card_gives_our_embeddings_in_a_process_without_our_package(tmp_path: Path) -> None:
    model = saved(tmp_path / "model", SMALL)
    assert main(["export", str(tmp_path / "model"), "--to", "onnx", "-o", str(tmp_path / "onnx")]) == 0
    ramp = np.linspace(0, 255, 60 * 41 * 3).reshape(60, 41, 3).astype(np.uint8)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    Image.fromarray(ramp.transpose(1, 0, 2)[:, ::-1].copy()).save(tmp_path / "b.png")
    paths = [str(tmp_path / name) for name in ("a.png", "b.png")]
    out = tmp_path / "rows.npy"
    arguments = [str(tmp_path / "onnx"), json.dumps(paths), json.dumps(CAPTIONS), str(out)]
    subprocess.run([sys.executable, "-c", ALONE, *arguments], check=True, cwd=tmp_path)
    rows = torch.from_numpy(np.load(out))
    _, preprocess, tokenizer = pretrained.load(tmp_path / "model")
    with torch.no_grad():
        images = model.encode_image(torch.stack([preprocess(Image.open(path)) for path in paths]))
        torch.testing.assert_close(rows[2:], model.encode_text(tokenizer(CAPTIONS)), rtol=0, atol=1e-5)
    torch.testing.assert_close(rows[:2], images, rtol=0, atol=1e-2)


def test_graphs_of_other_towers_equal_torch_and_name_no_path(tmp_path: Path) -> None:
    gpt = dataclasses.replace(GPT, end_id=3)
    resnet = dataclasses.replace(SMALL, vision=RESNET, text=gpt)
    for config, towers in ((COCA, ("image", "text")), (SIGLIP, ("image", "text")), (resnet, ("image",))):
        model = shaken(BiomedClip(config)).eval()
        for tower in towers:
            path = tmp_path / "graph.onnx"
            onnx_files.write_graph(path, model, tower)
            inputs = onnx_files.example(model, tower)
            with torch.no_grad():
                expected = model.encode_image(inputs) if tower == "image" else model.encode_text(inputs)
            for batch in (1, 3):
                torch.testing.assert_close(parity.run(path, inputs, batch), expected, rtol=0, atol=1e-5)
            content = path.read_bytes()
            assert b".py" not in content and b"bclip" not in content
            onnx.checker.check_model(onnx.load_from_string(content))


def test_graph_that_differs_from_the_model_is_refused_and_changes_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(tmp_path / "model", SMALL)
    arguments = ["export", str(tmp_path / "model"), "--to", "onnx", "-o", str(tmp_path / "onnx")]
    write = onnx_files.write_graph

    def write_another(path: Path, model: BiomedClip, tower: str) -> None:
        other = BiomedClip(model.config).eval() if tower == "text" else model
        write(path, other, tower)

    monkeypatch.setattr(onnx_files, "write_graph", write_another)
    assert main(arguments) == 2
    assert "text.onnx differs from the model by" in capsys.readouterr().err
    assert not list((tmp_path / "onnx").glob("*.onnx"))


def test_onnx_without_its_packages_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if "onnx" in name else found(name, *rest))
    assert main(["export", "nowhere", "--to", "onnx", "-o", str(tmp_path / "onnx")]) == 2
    assert "pip install 'bclip_fast[export]'" in capsys.readouterr().err


def test_export_refuses_settings_of_another_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, message in (
        (["--int8"], "int8 and data need --to onnx, not --to open_clip"),
        (["--to", "onnx", "--precision", "bf16"], "precision=bf16 isn't possible with --to onnx"),
    ):
        assert main(["export", "model", "-o", str(tmp_path), *options]) == 2
        assert message in capsys.readouterr().err
