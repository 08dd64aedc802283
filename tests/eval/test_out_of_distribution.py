"""Out-of-distribution scores and their metrics, against scikit-learn, scipy, and cases by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from colours import COLOURS, assert_refused, evaluate_with, jpeg, unit_rows, write_class_folders
from page import Page

from bclip_fast.errors import UserError
from bclip_fast.eval import EvalConfig, out_of_distribution, report


def test_scores_equal_scipy() -> None:
    from scipy.special import logsumexp, softmax

    images, classes = unit_rows(30, 8, 0), unit_rows(4, 8, 1)
    similarities = images.double().numpy() @ classes.double().numpy().T
    scores = out_of_distribution.class_scores(images, classes, 20.0)
    np.testing.assert_allclose(scores["maximum softmax"], softmax(20 * similarities, axis=1).max(1), atol=1e-5)
    np.testing.assert_allclose(scores["energy"], logsumexp(20 * similarities, axis=1) / 20, atol=1e-6)
    np.testing.assert_allclose(scores["maximum cosine"], similarities.max(1), atol=1e-6)


def test_neighbour_scores_equal_sorted_similarities() -> None:
    images, train = unit_rows(25, 8, 0), unit_rows(40, 8, 1)
    expected = np.sort(images.double().numpy() @ train.double().numpy().T, axis=1)[:, -10]
    np.testing.assert_allclose(out_of_distribution.neighbour_scores(images, train), expected, atol=1e-6)
    few = out_of_distribution.neighbour_scores(images, train[:3])
    np.testing.assert_allclose(few, (images @ train[:3].T).amin(1).numpy(), atol=1e-6)


def test_measure_equals_scikit_learn() -> None:
    from sklearn.metrics import roc_auc_score, roc_curve

    classes = unit_rows(4, 8, 1)
    noise = torch.randn(60, 8, generator=torch.Generator().manual_seed(2)) * 0.3
    images = torch.nn.functional.normalize(classes[torch.arange(60) % 4] + noise, dim=1)
    result = out_of_distribution.measure(images, unit_rows(50, 8, 3), classes, 20.0, unit_rows(40, 8, 4))
    json.dumps(result, allow_nan=False)
    metrics = {metric["name"]: metric for metric in result["figures"]}
    assert len(metrics) == 8
    labels = result["samples"]["in_distribution"]
    for name in ("maximum softmax", "energy", "maximum cosine", "nearest training"):
        scores = result["samples"][f"score of {name}"]
        assert metrics[f"AUROC, {name}"]["value"] == pytest.approx(roc_auc_score(labels, scores))
        false, true, _ = roc_curve(labels, scores, drop_intermediate=False)
        assert metrics[f"FPR95, {name}"]["value"] == pytest.approx(false[np.argmax(true >= 0.95)])
    assert metrics["AUROC, maximum cosine"]["value"] > 0.8


def test_measure_ties_and_single_images() -> None:
    same = unit_rows(1, 8, 0)
    result = out_of_distribution.measure(same.repeat(20, 1), same.repeat(5, 1), unit_rows(3, 8, 1), 10.0)
    for metric in result["figures"]:
        assert metric["value"] == (0.5 if metric["name"].startswith("AUROC") else 1.0)
    assert out_of_distribution.threshold(np.arange(100.0)) == 5
    assert out_of_distribution.threshold(np.array([3.0])) == 3
    with pytest.raises(UserError, match="NaN"):
        out_of_distribution.measure(same, same * torch.nan, unit_rows(3, 8, 1), 10.0)


def test_evaluate_ood_against_a_second_data_set(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    for i in range(4):
        (tmp_path / "other" / f"{i}.jpg").write_bytes(jpeg(COLOURS["green"]))
    (tmp_path / "other.csv").write_text("path,kind\n" + "".join(f"other/{i}.jpg,x\n" for i in range(4)))
    settings = {"split": "test", "task": ("ood",), "progress": False}
    results = evaluate_with(EvalConfig(data=str(folder), ood=str(tmp_path / "other.csv"), **settings))
    result = results["tasks"]["ood"]
    assert (result["num_samples"], result["num_other"]) == (6, 4)
    values = {metric["name"]: metric["value"] for metric in result["figures"]}
    for name in ("maximum softmax", "energy", "maximum cosine", "nearest training"):
        assert (values[f"AUROC, {name}"], values[f"FPR95, {name}"]) == (1, 0), name
    assert result["samples"]["key"][0].startswith("blue/")
    assert result["samples"]["key"][-1] == "other: other/3.jpg"
    report.write(tmp_path / "report.html", results)
    page = Page(tmp_path / "report.html")
    assert not page.stack
    assert "6 images of the data against 4 images of" in " ".join(page.text.split())
    options = {"split": "test", "task": ("ood",)}
    assert_refused(folder, "task 'ood' needs --ood", **options)
    assert_refused(folder, "is the data itself", ood=str(folder), **options)


def test_evaluate_ood_without_train_split_has_no_neighbours(tmp_path: Path) -> None:
    data = write_class_folders(tmp_path / "data", {"test": 3})
    other = write_class_folders(tmp_path / "other", {"test": 2})
    config = EvalConfig(data=str(data), ood=str(other), split="test", task=("ood",), progress=False)
    names = [metric["name"] for metric in evaluate_with(config)["tasks"]["ood"]["figures"]]
    assert len(names) == 6
    assert not any("nearest" in name for name in names)
