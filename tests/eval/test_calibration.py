"""Calibration and decision curves, against scikit-learn and cases by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from colours import evaluate_with
from page import Page

from bclip_fast.errors import UserError
from bclip_fast.eval import EvalConfig, calibration, decision_curve, report
from bclip_fast.eval import results as result_files


def _measure(targets: np.ndarray, probabilities: np.ndarray) -> dict:
    result: dict = {"figures": []}
    calibration.add(result, targets, probabilities, [str(i) for i in range(probabilities.shape[1])])
    json.dumps(result, allow_nan=False)
    return result


def test_reliability_equals_scikit_learns_calibration_curve() -> None:
    from sklearn.calibration import calibration_curve

    generator = np.random.default_rng(0)
    positive = generator.random(500)
    targets = (generator.random(500) < positive**2).astype(int)
    table = _measure(targets, np.stack([1 - positive, positive], 1))["calibration"][1]
    shares, means = calibration_curve(targets, positive, n_bins=15)
    assert [row["share"] for row in table["bins"]] == pytest.approx(shares.tolist())
    assert [row["mean_probability"] for row in table["bins"]] == pytest.approx(means.tolist())
    counts = np.array([row["num_samples"] for row in table["bins"]])
    assert counts.sum() == 500
    assert table["ece"] == pytest.approx((counts * np.abs(shares - means)).sum() / 500)


def test_ece_of_classes_by_hand() -> None:
    # Two samples with 0.8, one of them right: a gap of 0.3. One with 0.4, right: 0.6. Both bins weighted by samples.
    probabilities = np.array([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]])
    result = _measure(np.array([0, 0, 2]), probabilities)
    [metric] = result["figures"]
    assert metric["value"] == pytest.approx((2 * 0.3 + 0.6) / 3)
    assert metric["chance"] == pytest.approx(1 / 3)
    assert not metric["higher_is_better"]
    assert [row["num_samples"] for row in result["calibration"][0]["bins"]] == [1, 2]


def test_ece_bins_include_their_upper_end() -> None:
    values = np.array([0.0, 1 / 15, 1 / 15 + 1e-9, 1.0])
    bins = calibration.reliability(values, np.array([False, False, True, True]))
    assert [(round(row["low"] * 15), row["num_samples"]) for row in bins] == [(0, 2), (1, 1), (14, 1)]


def test_ece_degenerate_data() -> None:
    certain = _measure(np.zeros(5, int), np.array([[1.0, 0.0]] * 5))
    assert [metric["value"] for metric in certain["figures"]] == [0, 0]
    assert certain["figures"][0]["interval"] == [0, 0]
    tied = _measure(np.array([0, 1, 1, 1]), np.full((4, 2), 0.5))  # ties: the first class is predicted
    assert tied["figures"][0]["value"] == pytest.approx(0.25)
    labels = _measure(np.array([[True, False], [False, False]]), np.array([[0.9, 0.2], [0.1, 0.2]]))
    assert labels["figures"][0]["name"] == "ECE, mean over labels"
    assert labels["figures"][0]["value"] == pytest.approx((0.1 + 0.2) / 2)
    for bad in (np.array([[np.nan, 1.0]]), np.array([[2.0, -1.0]]), np.zeros((0, 2))):
        with pytest.raises(UserError, match="probabilities from 0 to 1"):
            _measure(np.zeros(len(bad), int), bad)


def test_ece_interval_equals_plain_bootstrap() -> None:
    generator = np.random.default_rng(1)
    probabilities = generator.dirichlet(np.ones(3), 200)
    targets = generator.integers(0, 3, 200)
    [metric] = _measure(targets, probabilities)["figures"]
    confidence, is_right = probabilities.max(1), probabilities.argmax(1) == targets
    rows = [np.random.default_rng(i).integers(0, 200, 200) for i in range(1000)]
    values = [calibration.error(confidence[row], is_right[row]) for row in rows]
    assert metric["interval"] == pytest.approx(np.quantile(values, [0.025, 0.975]), abs=0.01)


def test_decision_curve_equals_the_confusion_matrix_at_each_threshold() -> None:
    from sklearn.metrics import confusion_matrix

    generator = np.random.default_rng(0)
    probabilities = generator.random(300).round(2)  # ties with the thresholds
    is_positive = generator.random(300) < probabilities
    curve = decision_curve.measure(is_positive, probabilities, "ill")
    json.dumps(curve, allow_nan=False)
    for point in curve["points"]:
        odds = point["threshold"] / (1 - point["threshold"])
        treated = probabilities >= point["threshold"]
        (_, false), (_, true) = confusion_matrix(is_positive, treated, labels=[False, True])
        assert point["net_benefit"] == pytest.approx((true - false * odds) / 300, abs=1e-8)
        all_treated = is_positive.mean() - (1 - is_positive.mean()) * odds
        assert point["treat_all"] == pytest.approx(all_treated, abs=1e-8)
        assert point["treat_none"] == 0
        assert point["low"] <= point["net_benefit"] <= point["high"]
    rows = [np.random.default_rng(i).integers(0, 300, 300) for i in range(1000)]
    values = [np.mean(is_positive[row] & treated[row]) for row in rows for treated in [probabilities >= 0.5]]
    values = [
        value - np.mean(~is_positive[row] & (probabilities[row] >= 0.5))
        for value, row in zip(values, rows, strict=True)
    ]
    middle = curve["points"][49]
    assert [middle["low"], middle["high"]] == pytest.approx(np.quantile(values, [0.025, 0.975]), abs=0.02)


def test_decision_curve_of_one_class() -> None:
    for value in (False, True):
        curve = decision_curve.measure(np.full(4, value), np.full(4, 0.5), "ill")
        treated, untreated = curve["points"][49], curve["points"][50]
        assert treated["net_benefit"] == treated["treat_all"] == (1 if value else -1)
        assert untreated["net_benefit"] == 0
    with pytest.raises(UserError, match="at least one sample"):
        decision_curve.measure(np.zeros(0, bool), np.zeros(0), "ill")


def test_evaluate_binary_task_has_calibration_and_decision_curve(folder: Path, tmp_path: Path) -> None:
    results = evaluate_with(EvalConfig(data=str(folder), split="test", task=("zero_shot",), progress=False))
    result = results["tasks"]["zero_shot/class"]
    names = [metric["name"] for metric in result["figures"]]
    assert names[-2:] == ["ECE", "ECE of red"]
    probabilities = np.array([result["samples"][f"score of {name}"] for name in ("blue", "red")])
    assert result["figures"][-2]["value"] == pytest.approx(1 - probabilities.max(0).mean(), abs=1e-6)
    result_files.write(tmp_path / "out", results)
    lines = (tmp_path / "out" / "reliability.csv").read_text().splitlines()
    assert lines[0] == "task,of,low,high,num_samples,mean_probability,share"
    assert len(lines) == 1 + sum(len(table["bins"]) for table in result["calibration"])
    lines = (tmp_path / "out" / "decision-curves.csv").read_text().splitlines()
    assert lines[0] == "task,class,threshold,net_benefit,low,high,treat_all,treat_none"
    assert len(lines) == 100
    assert lines[50] == "zero_shot/class,red,0.5,0.5,0.166666667,0.833333333,0.0,0.0"
    report.write(tmp_path / "report.html", results)
    page = Page(tmp_path / "report.html")
    assert not page.stack
    names = [str(attributes.get("aria-label")) for attributes in page.all("svg")]
    assert any(name.startswith("reliability") for name in names)
    assert any(name.startswith("decision curve of red") for name in names)
