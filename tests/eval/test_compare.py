"""`bclip eval compare`, the files an evaluation leaves, and published figures on the page."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from browser import Browser, check_drawn, check_keyboard
from test_eval import COLOURS, ColourModel, jitter, jpeg, preprocess, tokenizer
from test_report import Page

from bclip_fast.errors import UserError
from bclip_fast.eval import compare, evaluate, report, statistics
from bclip_fast.eval import results as files
from bclip_fast.eval.datasets import open_dataset

TASK = """title = "Red or blue"
protocol = "zero_shot"
label = "class"
split = "test"
metric = "accuracy"
num_samples = 500
about = "Mind <the> step."
[prompts]
templates = ["a {}"]
[prompts.classes]
red = "red"
blue = "blue"
[[published]]
model = "Someone's"
figure = "accuracy"
value = 65.23
source = "a paper"
"""


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Two evaluations of the same 40 images: a model that sees the colour, and one that sees it in half of them."""
    for name in ("red", "blue"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(20):
            (tmp_path / "data" / name / f"{i}.jpg").write_bytes(jpeg(jitter(COLOURS[name], i)))
    (tmp_path / "colours.toml").write_text(TASK)

    def half_blind(image):
        pixels = preprocess(image)
        return pixels.flip(0) if int(pixels[1].mean() * 255) % 2 else pixels

    found = []
    for i, transform in enumerate((half_blind, preprocess)):
        results = evaluate(
            (ColourModel(), transform, tokenizer),
            [str(tmp_path / "colours.toml")],
            data=str(tmp_path / "data"),
            progress=False,
        )
        results["model"]["path"] = f"model {i}"
        files.write(tmp_path / f"e{i}", results)
        report.write(
            tmp_path / f"e{i}" / "report.html", results, {"colours": open_dataset(str(tmp_path / "data"), "test")}
        )
        found.append(tmp_path / f"e{i}")
    return found


def test_files_hold_what_was_measured(folders: list[Path]) -> None:
    results = json.loads((folders[1] / "results.json").read_text())
    task = results["tasks"]["colours"]
    assert "samples" not in task and task["samples_file"] == "samples/colours.csv"
    with (folders[1] / "samples" / "colours.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) == 40 and {row["prediction"] for row in rows} == {"red", "blue"}
    assert np.mean([row["label"] == row["prediction"] for row in rows]) == task["figures"][0]["value"] == 1
    with (folders[1] / "figures.csv").open(newline="") as lines:
        figures = list(csv.DictReader(lines))
    assert [(row["figure"], float(row["value"])) for row in figures] == [
        (f["name"], f["value"]) for f in task["figures"]
    ]
    with (folders[1] / "per-class.csv").open(newline="") as lines:
        assert [row["class"] for row in csv.DictReader(lines)] == ["red", "blue"]
    assert files.read(folders[1])["tasks"]["colours"]["samples"]["key"] == [row["key"] for row in rows]


def test_differences_are_paired(folders: list[Path]) -> None:
    found = compare.compare(folders)
    rows = {row["figure"]: row for row in found["rows"] if row["model"] == "model 1"}
    right = [np.array(files.read(folder)["tasks"]["colours"]["samples"]["accuracy"], dtype=float) for folder in folders]
    accuracy = rows["accuracy"]
    assert 0 < right[0].mean() < 1 == right[1].mean()
    assert accuracy["difference"] == pytest.approx(1 - right[0].mean())
    assert accuracy["p"] == statistics.mcnemar(right[0] == 1, right[1] == 1) and accuracy["p_holm"] >= accuracy["p"]
    assert accuracy["low"] < accuracy["difference"] < accuracy["high"]
    assert rows["AUROC"]["test"] == "bootstrap" and rows["AUROC"]["difference"] > 0
    assert all(row["difference"] is None for row in found["rows"] if row["model"] == "model 0")
    same = compare.compare([folders[0], folders[0]])["rows"]
    assert {row["difference"] for row in same} == {None, 0.0} and {row["p"] for row in same} == {None, 1.0}


def test_the_command_writes_a_page_and_tables(folders: list[Path], tmp_path: Path, capsys) -> None:
    compare.run(compare.CompareCommand(results=tuple(map(str, folders)), out=str(tmp_path / "out")))
    page = Page(tmp_path / "out" / "compare.html")
    assert not page.stack and "McNemar, exact" in page.text and not page.all("script")
    rows = json.loads((tmp_path / "out" / "compare.json").read_text())["rows"]
    with (tmp_path / "out" / "compare.csv").open(newline="") as lines:
        assert len(list(csv.DictReader(lines))) == len(rows)
    assert "colours" in capsys.readouterr().out


def test_what_does_not_compare_is_refused(folders: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="two evaluations at least"):
        compare.compare(folders[:1])
    with pytest.raises(UserError, match="not what bclip eval writes"):
        compare.compare([folders[0], tmp_path / "data"])
    path = folders[1] / "results.json"
    results = json.loads(path.read_text())
    results["tasks"]["colours"]["task"]["data"]["fingerprint"] = "another"
    path.write_text(json.dumps(results))
    with pytest.raises(UserError, match="e1 was measured on other data than .*e0"):
        compare.compare(folders)
    results["tasks"] = {"other": results["tasks"]["colours"]}
    path.write_text(json.dumps(results))
    with pytest.raises(UserError, match="no task in common"):
        compare.compare(folders)


def test_published_figures_are_marked_and_never_taken_for_measured(folders: list[Path]) -> None:
    page = Page(folders[1] / "report.html")
    words = " ".join(page.text.split())
    assert "accuracySomeone's65.23 %published a paper" in words
    assert "accuracymodel 1100.00 %measured here" in words
    assert "Mind <the> step. Published on 500 samples, measured on 40: the figures do not compare." in words
    assert "65.23" not in (folders[1] / "figures.csv").read_text()


def test_pages_in_a_browser(folders: list[Path], tmp_path: Path) -> None:
    """Chromium draws both pages out, in light and dark, wide and narrow, and keys reach all that scrolls or opens."""
    compare.run(compare.CompareCommand(results=tuple(map(str, folders)), out=str(tmp_path / "out")))
    with Browser() as browser:
        for path, num_controls in ((folders[1] / "report.html", 7), (tmp_path / "out" / "compare.html", 1)):
            check_drawn(browser, path.as_uri(), tmp_path)
            assert len(check_keyboard(browser)) == num_controls
