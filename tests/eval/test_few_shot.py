"""Few-shot classification: each classifier against scikit-learn or its formula, and draws that repeat."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from colours import assert_refused, evaluate_with, unit_rows, write_class_folders
from page import Page

from bclip_fast.errors import UserError
from bclip_fast.eval import EvalConfig, few_shot, report
from bclip_fast.eval.linear_heads import LabelledFeatures

NAMES = ("a", "b", "c")


def clusters(num: int, seed: int, noise: float = 0.4) -> LabelledFeatures:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num) % 3
    return LabelledFeatures(
        F.normalize(unit_rows(3, 12, 9)[labels] + noise * torch.randn(num, 12, generator=generator), dim=1), labels
    )


@pytest.mark.parametrize("penalty", [0.01, 1.0, 1000.0])
def test_regression_equals_scikit_learn(penalty: float) -> None:
    from sklearn.linear_model import LogisticRegression

    train, test = clusters(30, 0), clusters(20, 1)
    weights = few_shot.regression(train, 3, penalty)
    reference = LogisticRegression(C=penalty, tol=1e-10, max_iter=10_000)
    reference.fit(train.features.double().numpy(), train.labels.numpy())
    probabilities = few_shot._linear(test.features, weights).softmax(1)
    np.testing.assert_allclose(
        probabilities.numpy(), reference.predict_proba(test.features.double().numpy()), atol=1e-4
    )


def test_logistic_chooses_the_penalty_on_validation_data() -> None:
    train, val = clusters(12, 0), clusters(60, 1)
    settings, predict = few_shot.fit_logistic(train, val, 3, unit_rows(3, 12, 2))
    scores = {}
    for penalty in few_shot.PENALTIES:
        logits = few_shot._linear(val.features, few_shot.regression(train, 3, penalty))
        scores[penalty] = float((logits.argmax(1) == val.labels).double().mean())
    assert settings == {"C": max(scores, key=lambda penalty: scores[penalty]), "val_score": max(scores.values())}
    assert float((predict(val.features).argmax(1) == val.labels).double().mean()) == settings["val_score"]


def test_centroid_is_the_class_of_the_nearest_normalised_mean() -> None:
    train, test = clusters(15, 0), clusters(20, 1)
    _, predict = few_shot.fit_centroid(train, train, 3, unit_rows(3, 12, 2))
    means = np.stack([train.features[train.labels == i].numpy().mean(0) for i in range(3)])
    expected = test.features.numpy() @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T
    np.testing.assert_allclose(predict(test.features).numpy() / few_shot.SCALE, expected, atol=1e-6)


def test_tip_adapter_equals_its_formula() -> None:
    train, test, texts = clusters(6, 0), clusters(5, 1), unit_rows(3, 12, 2)
    settings, predict = few_shot.fit_tip_adapter(train, clusters(30, 3), 3, texts)
    for features, logits in zip(test.features.double(), predict(test.features).double(), strict=True):
        for number in range(3):
            expected = 100 * float(features @ texts[number].double())
            for shot, label in zip(train.features.double(), train.labels.tolist(), strict=True):
                weight = np.exp(-settings["beta"] * (1 - float(features @ shot)))
                expected += settings["alpha"] * weight * (label == number)
            assert float(logits[number]) == pytest.approx(expected, abs=1e-4)


def test_measure_learns_from_shots_and_repeats() -> None:
    train, val, test = clusters(150, 0), clusters(30, 1), clusters(60, 2)
    texts = unit_rows(1, 12, 5).repeat(3, 1)  # says nothing about the classes
    first, second = (few_shot.measure(train, val, test, NAMES, texts, shots=(1, 16), num_seeds=2) for _ in range(2))
    json.dumps(first, allow_nan=False)
    assert [metric["value"] for metric in first["figures"]] == [metric["value"] for metric in second["figures"]]
    values = {metric["name"]: metric["value"] for metric in first["figures"]}
    assert len(values) == 2 * 2 * 3
    for classifier in ("centroid", "logistic", "Tip-Adapter"):
        assert values[f"accuracy, {classifier}, 16 shots"] > max(0.8, values[f"accuracy, {classifier}, 1 shot"])
    assert [row["num_val"] for row in first["few_shot"]] == 3 * [3, 3, 12, 12]
    assert all(row["seconds"] >= 0 for row in first["few_shot"])
    rows = [row["accuracy"] for row in first["few_shot"] if (row["classifier"], row["shots"]) == ("tip_adapter", 16)]
    assert np.mean(first["samples"]["accuracy"]) == pytest.approx(rows[0])
    assert values["accuracy, Tip-Adapter, 16 shots"] == pytest.approx(np.mean(rows))


def test_measure_class_without_test_or_validation_samples() -> None:
    train, test = clusters(30, 0), clusters(30, 2)
    val = clusters(30, 1)
    result = few_shot.measure(
        train, val[val.labels != 2], test[test.labels == 0], NAMES, unit_rows(3, 12, 5), shots=(2,), num_seeds=1
    )
    values = {metric["name"]: metric["value"] for metric in result["figures"]}
    assert values["accuracy, centroid, 2 shots"] == values["balanced accuracy, centroid, 2 shots"]
    with pytest.raises(UserError, match="class 'a' has only 10 training samples for 11 shots"):
        few_shot.measure(train, val, test, NAMES, unit_rows(3, 12, 5), shots=(11,))


def test_evaluate_few_shot_takes_the_shots_that_train_has(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_class_folders(tmp_path / "folder", {"train": 3, "val": 1, "test": 4})
    config = EvalConfig(data=str(folder), split="test", task=("few_shot",), progress=False, num_seeds=1)
    results = evaluate_with(config)
    result = results["tasks"]["few_shot"]
    assert {row["shots"] for row in result["few_shot"]} == {1, 2}
    assert "only 3 training samples" in caplog.text
    assert {metric["value"] for metric in result["figures"]} == {1.0}
    assert result["validation"] == "val"
    report.write(tmp_path / "report.html", results)
    page = Page(tmp_path / "report.html")
    assert not page.stack
    words = " ".join(page.text.split())
    assert "Few-shot: class" in words
    assert f"took {result['seconds']} seconds" in words
    assert any("accuracy" in (attributes.get("aria-label") or "") for attributes in page.all("svg"))
    assert_refused(
        folder, "class 'blue' has only 3 training samples for 5", split="test", task=("few_shot",), shots=(5,)
    )
