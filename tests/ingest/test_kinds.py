"""Kinds of figures: the taxonomy, the features, the classifier of the package, and the harness that measures it."""

from __future__ import annotations

import json
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from articles import encode_image
from PIL import Image
from synthetic import tiny_model

from bclip_fast import pretrained
from bclip_fast.data.transform import Preprocess, PreprocessConfig
from bclip_fast.errors import UserError
from bclip_fast.ingest.kinds import read_taxonomy, taxonomy
from bclip_fast.ingest.kinds.classifier import classifier, features_of, kind_columns
from bclip_fast.ingest.kinds.features import SCALE
from bclip_fast.ingest.label import Labeller
from bclip_fast.model.biomedclip import BiomedClip
from bclip_fast.model.tokenizer import Tokenizer
from benchmarks import figure_kinds

LABELS = Path(__file__).parent / "labels/kinds.json"
# CRC-32 of the features in test_features_are_those_of_every_processor.
RECORDED = 2888835208


def test_taxonomy_is_complete():
    kinds = taxonomy().kinds
    assert len(kinds) == 18
    assert all(kind.title and kind.definition and kind.names and kind.keywords for kind in kinds)
    assert [len(prompts) for prompts in taxonomy().prompts()] == [
        len(taxonomy().templates) * len(kind.names) for kind in kinds
    ]
    words = [word for kind in kinds for word in kind.keywords]
    assert [word for word in words if not re.fullmatch(r"[a-z0-9+ ]+\*?", word)] == []
    labels = json.loads(LABELS.read_text())
    assert len(labels) == 558
    assert {label["kind"] for label in labels} <= set(taxonomy().names)
    with pytest.raises(UserError, match=r"mine\.toml .*names"):
        read_taxonomy("templates = ['{}']\n[a]\n[b]\n", "mine.toml")


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (*size[::-1], 3), np.uint8)
    pixels[:, : size[0] // 2] = generator.integers(0, 256, 3)
    return Image.fromarray(pixels)


_TWO_KINDS = 'templates = [{}]\n[a]\nnames = [{}]\n[b]\nnames = ["y"]\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (_TWO_KINDS.format("1", '"x"'), "templates that contain"),
        (_TWO_KINDS.format('"{}"', '""'), "the kind 'a' has no names, or an empty one"),
        ("templates = " + "[" * 5000 + "]" * 5000, "not a file of kinds"),
    ],
)
def test_wrong_files_of_kinds_are_errors(text, message):
    with pytest.raises(UserError, match=message):
        read_taxonomy(text, "FILE")


def test_only_empty_braces_of_a_template_are_replaced():
    text = _TWO_KINDS.format('"{} {0.__class__} {:>9999999999} {"', '"x"')
    assert read_taxonomy(text, "FILE").prompts()[0] == ["x {0.__class__} {:>9999999999} {"]


@pytest.mark.parametrize("size", [(1, 1), (1, 900), (900, 2), (8, 8), (317, 200)])
def test_features_are_integers_of_any_image(size):
    features = features_of(picture(0, size), "Figure 1. A: CT scan (b) axial.")
    assert features.dtype == np.int64
    assert features.shape == (classifier().weights.shape[1],)
    assert 0 <= features.min() <= features.max() <= SCALE
    # The sums of products are exact in every order, in float64 too.
    assert np.abs(classifier().weights).sum(1).max() * SCALE + np.abs(classifier().bias).max() < 2**53


def test_features_are_those_of_every_processor():
    """Integers, recorded once: they depend neither on the processor nor on numpy's release."""
    pictures = [features_of(picture(seed, (150 + seed, 90)), "MRI of the knee; stain x 400.") for seed in range(6)]
    assert zlib.crc32(np.array(pictures, "<i8").tobytes()) == RECORDED


def test_columns_of_an_image():
    pixels = np.full((300, 400, 3), 255, np.uint8)
    pixels[20:280, 40:43] = pixels[278:281, 40:390] = 0
    pixels[100:278, 80:120] = pixels[150:278, 180:220] = (60, 90, 200)
    columns = kind_columns(
        encode_image(Image.fromarray(pixels)), "Mean concentration (n = 5, P < 0.05); error bars, SD."
    )
    assert columns["kind"] == "chart"
    assert 0.5 < columns["kind_p"] <= 1
    assert round(columns["kind_p"], 4) == columns["kind_p"]
    assert kind_columns(b"not an image", "Forest plot") == {"kind_by": columns["kind_by"]}


def labelled_pictures(folder: Path, count: int) -> Path:
    """Write `count` pictures of noise, and labels of the kinds in turn. Return the labels."""
    names = taxonomy().names
    labels = []
    for i in range(count):
        (folder / f"{i}.jpg").write_bytes(encode_image(picture(i, (40, 40))))
        labels.append({"image": f"{i}.jpg", "kind": names[i % len(names)], "is_composite": False, "sure": True})
    (folder / "labels.json").write_text(json.dumps(labels))
    return folder / "labels.json"


def test_zero_shot_by_a_random_model_is_chance(tmp_path):
    """Each kind is the label of 20 of 360 pictures, so a model that doesn't know them is right in 1 of 18."""
    torch.manual_seed(0)
    config = tiny_model()
    texts = [prompt for prompts in taxonomy().prompts() for prompt in prompts]
    tokenizer = Tokenizer.train(texts, config.text.vocab_size, config.text.context_length)
    pretrained.save(tmp_path / "model", BiomedClip(config), Preprocess(PreprocessConfig(size=32)), tokenizer)
    labels = labelled_pictures(tmp_path, 360)
    found, by_eye = figure_kinds.zero_shot_kinds(tmp_path, labels, Labeller(str(tmp_path / "model"), device="cpu"))
    assert len(found) == len(by_eye) == 360
    right = sum(kind == other for kind, other in zip(found, by_eye, strict=True))
    # 99.9 % of the binomial distribution around 20, whose standard deviation is 4.35.
    assert 7 <= right <= 36


def test_measure_of_an_oracle_and_of_the_most_frequent_kind():
    names = taxonomy().names
    targets = np.arange(90) % len(names)
    right = np.eye(len(names))[targets]
    perfect = figure_kinds.measure(right, targets)
    assert perfect["accuracy"] == perfect["mean_recall"] == 1.0
    assert perfect["medical_precision"] == perfect["medical_recall"] == 1.0
    assert perfect["ece"] == 0.0
    half = figure_kinds.measure_zero_shot(np.where(np.arange(90) < 45, targets, (targets + 1) % len(names)), targets)
    assert half["accuracy"] == half["mean_recall"] == pytest.approx(0.5, abs=0.02)
    # 95 % of the binomial distribution of 90 draws is within 0.5 +- 0.1.
    assert 0.36 < half["accuracy_low"] < 0.43 < 0.57 < half["accuracy_high"] < 0.64
    constant = figure_kinds.measure(np.tile(right[0], (90, 1)), targets)
    assert constant["accuracy"] == pytest.approx(1 / 18)
    assert constant["ece"] == pytest.approx(1 - 1 / 18)


def test_folds_divide_articles():
    articles = [f"PMC{i * i % 37}" for i in range(200)]
    folds = figure_kinds.folds(articles)
    assert len(dict.fromkeys(zip(articles, folds.tolist(), strict=True))) == len(set(articles))
    assert set(folds.tolist()) == set(range(10))


@pytest.mark.long
def test_accuracy_on_articles_never_seen(shared_data):
    """The classifier's kind of every labelled figure, by weights that never saw its article."""
    features, targets, folds = figure_kinds.read_figures(shared_data / "pmc_articles", LABELS)
    measured = figure_kinds.measure(figure_kinds.out_of_fold(features, targets, folds), targets)
    assert measured["accuracy"] > 0.7  # the most frequent kind alone is right in 0.416
    assert measured["mean_recall"] > 0.45
    assert measured["medical_precision"] > 0.8
    assert measured["medical_recall"] > 0.7
