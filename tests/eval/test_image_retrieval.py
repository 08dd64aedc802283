"""Image-to-image retrieval: average precision and recall against scikit-learn, and against all orders of ties."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from colours import assert_refused, evaluate_with, unit_rows, write_class_folders
from page import Page

from bclip_fast.errors import UserError
from bclip_fast.eval import EvalConfig, average_precision, image_retrieval, report
from bclip_fast.eval import results as result_files


def _on_circle(*degrees: float) -> torch.Tensor:
    angles = torch.tensor(degrees).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], 1)


@pytest.mark.parametrize("is_same", [True, False])
def test_retrieve_random_embeddings_equals_scikit_learn(is_same: bool) -> None:
    from sklearn.metrics import average_precision_score

    generator = np.random.default_rng(3)
    queries, classes = unit_rows(90, 16, 0), generator.integers(0, 5, 90)
    candidates, others = (queries, classes) if is_same else (unit_rows(70, 16, 1), generator.integers(0, 5, 70))
    result = average_precision.retrieve(queries, classes, candidates, others, is_same=is_same, pairs_at_once=1000)
    assert result.rows.tolist() == list(range(90))
    scores = queries.double().numpy() @ candidates.double().numpy().T
    for row in result.rows:
        kept = np.arange(len(candidates)) != row if is_same else np.full(len(candidates), True)
        is_correct = others[kept] == classes[row]
        assert result.average_precision[row] == pytest.approx(average_precision_score(is_correct, scores[row, kept]))
        order = np.argsort(-scores[row, kept])
        for k in (1, 5, 10):
            assert result.ranks.hits(k)[row] == is_correct[order][:k].any()


def test_retrieve_ties_equal_the_mean_over_all_orders() -> None:
    candidates = _on_circle(10, 40, 40, 40, 40, 70, 70)
    classes = np.array([1, 0, 1, 0, 1, 1, 0])
    result = average_precision.retrieve(_on_circle(0), np.array([0]), candidates, classes, is_same=False)
    values, firsts = [], []
    for middle, last in itertools.product(itertools.permutations((1, 2, 3, 4)), itertools.permutations((5, 6))):
        is_correct = classes[[0, *middle, *last]] == 0
        precisions = np.cumsum(is_correct) / np.arange(1, 8)
        values.append(precisions[is_correct].mean())
        firsts.append(int(is_correct.argmax()))
    assert result.average_precision[0] == pytest.approx(np.mean(values))
    for k in (1, 2, 3, 5):
        assert result.ranks.hits(k)[0] == pytest.approx(np.mean([first < k for first in firsts]))


def test_measure_collapsed_model_scores_exactly_chance() -> None:
    queries = _on_circle(30).repeat(40, 1)
    labels = ["a"] * 25 + ["b"] * 10 + ["c"] * 4 + ["alone"]
    result = image_retrieval.measure(queries, labels)
    assert result["num_without_match"] == 1
    assert "alone" not in result["samples"]["label"]
    assert [row["class"] for row in result["per_class"]] == ["a", "b", "c"]
    for metric in result["figures"]:
        assert metric["value"] == pytest.approx(metric["chance"]), metric["name"]
    # The chance of average precision, from random orders of 39 candidates.
    generator = np.random.default_rng(0)
    is_correct = generator.permuted(np.tile(np.arange(39) < 24, (20_000, 1)), axis=1)
    precisions = np.cumsum(is_correct, 1) / np.arange(1, 40)
    expected = (precisions * is_correct).sum(1).mean() / 24
    assert result["per_class"][0]["chance"] == pytest.approx(expected, abs=2e-3)
    json.dumps(result, allow_nan=False)


def test_measure_means_over_queries_and_over_classes() -> None:
    # Class a: each of three finds the others first. Class b: each of two finds an a first, the other b last.
    result = image_retrieval.measure(_on_circle(0, 1, 2, 90, -90), ["a", "a", "a", "b", "b"])
    by_name = {metric["name"]: metric for metric in result["figures"]}
    assert by_name["R@1"]["value"] == pytest.approx(3 / 5)
    assert by_name["R@5"]["value"] == 1
    assert by_name["mAP"]["value"] == pytest.approx((3 * 1 + 2 * 1 / 4) / 5)
    assert by_name["mAP, mean over classes"]["value"] == pytest.approx((1 + 1 / 4) / 2)
    assert by_name["mAP, mean over classes"]["interval"] == pytest.approx([5 / 8, 5 / 8])
    assert [row["average_precision"] for row in result["per_class"]] == pytest.approx([1, 1 / 4])
    assert [row["num_correct"] for row in result["per_class"]] == [2, 1]


def test_measure_degenerate_data() -> None:
    one_class = image_retrieval.measure(unit_rows(5, 4, 0), ["a"] * 5)
    assert all(metric["value"] == metric["chance"] == 1 for metric in one_class["figures"])
    with pytest.raises(UserError, match="none of 3 images has another image of its class"):
        image_retrieval.measure(unit_rows(3, 4, 0), ["a", "b", "c"])
    separate = image_retrieval.measure(unit_rows(2, 4, 0), ["a", "x"], unit_rows(3, 4, 1), ["a", "b", "b"])
    assert (separate["num_samples"], separate["num_without_match"], separate["num_candidates"]) == (1, 1, 3)
    with pytest.raises(UserError, match="NaN"):
        image_retrieval.measure(torch.full((2, 3), torch.nan), ["a", "a"])
    with pytest.raises(UserError, match="do not fit together"):
        image_retrieval.measure(unit_rows(3, 4, 0), ["a", "b"])


def test_evaluate_image_retrieval_leaves_out_samples_without_label(shards: Path, tmp_path: Path) -> None:
    settings = {"data": str(shards), "task": ("image_retrieval",), "progress": False}
    results = evaluate_with(EvalConfig(**settings, label=("colour",)))
    result = results["tasks"]["image_retrieval"]
    assert result["num_samples"] == 20
    result_files.write(tmp_path / "out", results)
    lines = (tmp_path / "out" / "per-class.csv").read_text().splitlines()
    assert lines[1:] == [f"image_retrieval,{name},5,,,,,1.0" for name in ("blue", "green", "grey", "red")]
    report.write(tmp_path / "report.html", results)
    page = Page(tmp_path / "report.html")
    assert not page.stack
    assert "20 query images, each among 19 candidates, the other images of the same split" in " ".join(
        page.text.split()
    )
    assert {metric["name"]: metric["value"] for metric in result["figures"]}["mAP"] == 1
    half = evaluate_with(EvalConfig(**settings, label=("half",)))["tasks"]["image_retrieval"]
    assert (half["num_samples"], half["num_without_label"]) == (5, 15)
    assert half["samples"]["key"] == [f"s{i:03d}" for i in range(5)]


def test_evaluate_image_retrieval_searches_a_gallery(folder: Path, tmp_path: Path) -> None:
    other = write_class_folders(tmp_path / "other", {"train": 2, "test": 4})
    settings = {"split": "test", "task": ("image_retrieval",), "progress": False}
    for gallery, num in (("", 5), ("train", 2), (str(other), 8)):
        result = evaluate_with(EvalConfig(data=str(folder), gallery=gallery, **settings))["tasks"]["image_retrieval"]
        assert result["num_candidates"] == num
        assert {metric["value"] for metric in result["figures"]} == {1.0}
    assert_refused(
        folder, "gallery='test' is the data of the queries", gallery="test", split="test", task=("image_retrieval",)
    )
