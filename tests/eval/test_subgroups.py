"""Subgroups: their metrics, bins, intervals and gaps, against scikit-learn and cases by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from colours import COLOURS, assert_refused, evaluate_with, jitter, jpeg
from page import Page

from bclip_fast.eval import EvalConfig, report, subgroups
from bclip_fast.eval import results as result_files


def _result(num: int, classes: int, seed: int = 0) -> dict:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, num)
    scores = generator.dirichlet(np.ones(classes), num)
    samples = {
        "key": [f"k{i}" for i in range(num)],
        "label": [str(label) for label in labels],
        "prediction": [str(place) for place in scores.argmax(1)],
        "accuracy": (scores.argmax(1) == labels).astype(int).tolist(),
        **{f"score of {i}": scores[:, i].tolist() for i in range(classes)},
    }
    return {"samples": samples, "classes": [str(i) for i in range(classes)]}


@pytest.mark.parametrize("classes", [2, 3])
def test_measure_equals_scikit_learn_on_each_subgroup(classes: int) -> None:
    from sklearn.metrics import accuracy_score, roc_auc_score

    result = _result(150, classes)
    groups = np.array(["a", "b", "b"] * 50)
    rows, gaps = subgroups.measure(result, groups, ["a", "b"])
    labels = np.array(result["samples"]["label"], dtype=int)
    scores = np.array([result["samples"][f"score of {i}"] for i in range(classes)]).T
    expected = {}
    for row in rows:
        members = groups == row["group"]
        values = {figure["name"]: figure["value"] for figure in row["figures"]}
        assert values["accuracy"] == pytest.approx(accuracy_score(labels[members], scores[members].argmax(1)))
        name = "AUROC" if classes == 2 else "AUROC, macro"
        reference = scores[members, 1] if classes == 2 else scores[members]
        reference_auroc = roc_auc_score(labels[members], reference, multi_class="ovr", labels=list(range(classes)))
        assert values[name] == pytest.approx(reference_auroc, abs=1e-9)
        assert all(figure["interval"][0] <= figure["value"] <= figure["interval"][1] for figure in row["figures"])
        expected[row["group"]] = values
    for gap in gaps:
        values = {group: expected[group][gap["name"]] for group in expected}
        assert gap["value"] == pytest.approx(max(values.values()) - min(values.values()))
        assert values[gap["best"]] - values[gap["worst"]] == pytest.approx(gap["value"])


def test_gap_interval_equals_plain_bootstrap() -> None:
    result = _result(120, 2)
    groups = np.array(["a", "b"] * 60)
    gap = next(gap for gap in subgroups.measure(result, groups, ["a", "b"])[1] if gap["name"] == "accuracy")
    hits = np.array(result["samples"]["accuracy"])
    generator = np.random.default_rng(5)
    draws = []
    for _ in range(2000):
        means = [generator.choice(hits[groups == name], 60).mean() for name in ("a", "b")]
        draws.append(max(means) - min(means))
    assert gap["interval"] == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.03)


def test_measure_small_and_single_class_subgroups() -> None:
    result = _result(100, 2)
    labels = np.array(result["samples"]["label"])
    groups = np.where(np.arange(100) < 29, "small", np.where(labels == "1", "ill", "well"))
    rows, gaps = subgroups.measure(result, groups, ["small", "ill", "well"])
    assert [row["is_small"] for row in rows] == [True, False, False]
    for row in rows[1:]:
        assert row["figures"][-1] == {"name": "AUROC", "value": None, "interval": None}
    assert [gap["name"] for gap in gaps] == ["accuracy"], "an AUROC without both classes has no gap"
    assert "small" not in (gaps[0]["best"], gaps[0]["worst"])
    json.dumps([rows, gaps], allow_nan=False)


def test_bins_of_ages_numbers_and_words() -> None:
    ages = ["017Y", "018Y", "39", "40.5", "59Y", "006M", "79", "80", "095Y", "3", None, "25"]
    names = subgroups.bins(ages, "PatientAge")
    assert names[:5] == ["under 18", "18 to under 40", "18 to under 40", "40 to under 60", "40 to under 60"]
    assert names[5:] == ["under 18", "60 to under 80", *["80 and over"] * 2, "under 18", "unknown", "18 to under 40"]
    assert sorted(set(names), key=subgroups._order) == [
        "under 18", "18 to under 40", "40 to under 60", "60 to under 80", "80 and over", "unknown",
    ]  # fmt: skip
    quartiles = subgroups.bins([str(i) for i in range(40)], "dose")
    assert {name: quartiles.count(name) for name in set(quartiles)} == {
        "under 9.75": 10, "9.75 to under 19.5": 10, "19.5 to under 29.25": 10, "29.25 and over": 10,
    }  # fmt: skip
    assert subgroups.bins(["1", "2", None], "grade") == ["1", "2", "unknown"]
    words = [f"w{i}" for i in range(20)]
    assert subgroups.bins(words, "word") == words
    assert set(subgroups.bins(["5"] * 60 + [str(i) for i in range(11)], "dose")) == {"under 5", "5 and over"}


def test_evaluate_by_columns_of_a_table(tmp_path: Path) -> None:
    lines = ["path,colour,sex,age"]
    for i in range(80):
        name = ("red", "blue")[i % 2]
        # Some blue images of sex M are red, so the model is wrong there.
        wrong = i >= 40 and i % 4 == 1
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(jitter(COLOURS["red" if wrong else name], i)))
        lines.append(f"{i}.jpg,{name},{'F' if i < 40 else 'M'},{'' if i == 7 else i}")
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n")
    settings = {"task": ("zero_shot",), "label": ("colour",)}
    results = evaluate_with(EvalConfig(data=str(tmp_path / "t.csv"), by="sex, age", progress=False, **settings))
    result = results["tasks"]["zero_shot/colour"]
    table = {(row["by"], row["group"]): row for row in result["subgroups"]}
    assert [group for by, group in table if by == "age"] == [
        "under 18", "18 to under 40", "40 to under 60", "60 to under 80", "unknown",
    ]  # fmt: skip
    assert table["age", "under 18"]["num_samples"] == 17
    figures = {key: {figure["name"]: figure["value"] for figure in row["figures"]} for key, row in table.items()}
    assert figures["sex", "F"]["accuracy"] == 1
    assert figures["sex", "M"]["accuracy"] == 0.75
    gap = next(row for row in result["gaps"] if (row["by"], row["name"]) == ("sex", "accuracy"))
    assert (gap["value"], gap["best"], gap["worst"]) == (0.25, "F", "M")
    assert not [row for row in result["gaps"] if row["by"] == "age"], "all bins of age are small"
    result_files.write(tmp_path / "out", results)
    assert "zero_shot/colour,sex,F,40,0,accuracy,1.0,1.0,1.0" in (tmp_path / "out" / "subgroups.csv").read_text()
    assert "zero_shot/colour,sex,accuracy,0.25," in (tmp_path / "out" / "gaps.csv").read_text()
    report.write(tmp_path / "report.html", results)
    page = Page(tmp_path / "report.html")
    assert not page.stack
    words = " ".join(page.text.split())
    assert "Gaps between the best and the worst subgroup" in words
    assert "under 18 small" in words
    assert_refused(tmp_path / "t.csv", "--by gender: .* has no such column; it has colour, sex, age", by="gender")
