"""`bclip eval compare`, the result files of an evaluation, and published scores in the report."""

from __future__ import annotations

import csv
import json
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import Browser, check_drawn, check_keyboard
from colours import ColourModel, preprocess, tokenizer, write_class_folders
from page import Page

from bclip_fast.errors import UserError
from bclip_fast.eval import compare, evaluate, report, results, statistics, zero_shot
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
    """Two evaluations of the same 40 images. The first model sees the colour in only half of them."""
    write_class_folders(tmp_path / "data", {"": 20})
    (tmp_path / "colours.toml").write_text(TASK)

    def half_blind(image):
        pixels = preprocess(image)
        return pixels.flip(0) if int(pixels[1].mean() * 255) % 2 else pixels

    evaluations = []
    for i, transform in enumerate((half_blind, preprocess)):
        evaluated = evaluate(
            (ColourModel(), transform, tokenizer),
            [str(tmp_path / "colours.toml")],
            data=str(tmp_path / "data"),
            progress=False,
        )
        evaluated["model"]["path"] = f"model {i}"
        results.write(tmp_path / f"e{i}", evaluated)
        report.write(
            tmp_path / f"e{i}" / "report.html", evaluated, {"colours": open_dataset(str(tmp_path / "data"), "test")}
        )
        evaluations.append(tmp_path / f"e{i}")
    return evaluations


def test_result_files_hold_samples_and_metrics(folders: list[Path]) -> None:
    content = json.loads((folders[1] / "results.json").read_text())
    task = content["tasks"]["colours"]
    assert "samples" not in task
    assert task["samples_file"] == "samples/colours.csv"
    with (folders[1] / "samples" / "colours.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) == 40
    assert {row["prediction"] for row in rows} == {"red", "blue"}
    assert np.mean([row["label"] == row["prediction"] for row in rows]) == task["figures"][0]["value"] == 1
    with (folders[1] / "figures.csv").open(newline="") as lines:
        metrics = list(csv.DictReader(lines))
    assert [(row["figure"], float(row["value"])) for row in metrics] == [
        (m["name"], m["value"]) for m in task["figures"]
    ]
    with (folders[1] / "per-class.csv").open(newline="") as lines:
        assert [row["class"] for row in csv.DictReader(lines)] == ["red", "blue"]
    assert results.read(folders[1])["tasks"]["colours"]["samples"]["key"] == [row["key"] for row in rows]


AMBIGUOUS = ("病变", "部位", "a b", "a/b", "A.b", "a.b", "con", "..", "x" * 300, "é", "e\u0301", "\udcff")


def test_samples_of_any_task_names_are_kept_apart(folders: list[Path], tmp_path: Path) -> None:
    evaluated = results.read(folders[0])
    task = evaluated["tasks"].pop("colours")
    for name in AMBIGUOUS:
        samples = {"key": task["samples"]["key"], f"score of {name}": [name] * 40}
        evaluated["tasks"][f"zero_shot/{name}"] = task | {"label": name, "samples": samples}
    results.write(tmp_path / "many", evaluated)
    files = [path.name.casefold() for path in (tmp_path / "many" / "samples").iterdir()]
    assert len(set(files)) == len(AMBIGUOUS)
    assert {"zero_shot-con.csv", "zero_shot-病变.csv"} <= set(files)
    written = json.loads((tmp_path / "many" / "results.json").read_text())["tasks"]
    assert len({result["samples_file"] for result in written.values()}) == len(AMBIGUOUS)
    for name in set(AMBIGUOUS) - {"\udcff"}:
        assert set(results.read(tmp_path / "many")["tasks"][f"zero_shot/{name}"]["samples"]) == {
            "key",
            f"score of {name}",
        }


def test_compare_results_that_lost_samples_raise(folders: list[Path]) -> None:
    """Earlier versions wrote the samples of two tasks to one file. A file outside of the folder is not read."""
    path = folders[1] / "results.json"
    content = json.loads(path.read_text())
    content["tasks"]["colours 2"] = content["tasks"]["colours"]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"several tasks have the samples samples/colours.csv.*evaluate again"):
        compare.compare(folders)
    del content["tasks"]["colours 2"]
    content["tasks"]["colours"]["samples_file"] = "../e0/samples/colours.csv"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="is not in its folder"):
        compare.compare(folders)


def test_results_of_1500_classes_stay_small(folders: list[Path], tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    names = [f"a class with a long name, number {i}" for i in range(1500)]
    labels = torch.from_numpy(generator.integers(0, 1500, 12_000))
    predictions = torch.from_numpy(generator.integers(0, 1500, 12_000))
    result = zero_shot.measure(labels, predictions, names)
    curve = {"points": [(i / 400, i / 400) for i in range(400)]}
    result["roc"] = [curve | {"class": name, "auroc": i / 1500} for i, name in enumerate(names)]
    evaluated = results.read(folders[0])
    task = evaluated["tasks"]["colours"]
    classes = {name: [name, f"{name} (in other words)"] for name in names}
    extra = {"task": task["task"], "label": "class", "num_without_label": 0, "num_ties": 0}
    prompts = {"source": "", "templates": ["a {}"], "classes": classes}
    result["samples"] = {"key": [str(i) for i in range(12_000)], **result["samples"]}
    evaluated["tasks"] = {"many": result | extra | {"prompts": prompts}, "colours": task}
    results.write(tmp_path / "many", evaluated)
    content = (tmp_path / "many" / "results.json").read_text()
    assert len(content.encode()) < 2_000_000
    written = json.loads(content)["tasks"]
    assert written["colours"]["confusion"] == task["confusion"], "a small matrix stays as it was"
    assert sum(count for *_, count in written["many"]["confusion"]["entries"]) == 12_000
    assert [curve["class"] for curve in written["many"]["roc"]] == names[:-9:-1]
    again = results.read(tmp_path / "many")
    assert again["tasks"]["many"]["confusion"] == result["confusion"]
    rows = compare.compare([tmp_path / "many", tmp_path / "many"])["rows"]
    assert {row["difference"] for row in rows if row["task"] == "many" and row["test"]} == {0.0}
    report.write(tmp_path / "report.html", again)
    assert "The confusion matrix of 1500 classes is in results.json" in (tmp_path / "report.html").read_text()
    written["many"]["confusion"]["entries"] = [[10**9, 0, 1]]
    (tmp_path / "many" / "results.json").write_text(json.dumps(evaluated | {"tasks": written}))
    with pytest.raises(UserError, match="not a file of bclip eval"):
        results.read(tmp_path / "many")


def test_results_that_cannot_be_written_leave_the_earlier_ones(folders: list[Path], tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in folders[0].rglob("*") if path.is_file()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    evaluated = results.read(folders[1])
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
        with pytest.raises(UserError, match="cannot write .*results.json.*another --out"):
            results.write(folders[0], evaluated)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path: path.read_bytes() for path in folders[0].rglob("*") if path.is_file()} == before
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        results.write(tmp_path / "file" / "out", evaluated)
    with pytest.raises(UserError, match="cannot write report.html"):
        report.write(tmp_path / "file" / "report.html", evaluated)


def test_compare_differences_are_paired(folders: list[Path]) -> None:
    comparison = compare.compare(folders)
    rows = {row["figure"]: row for row in comparison["rows"] if row["model"] == "model 1"}
    is_correct = [
        np.array(results.read(folder)["tasks"]["colours"]["samples"]["accuracy"], dtype=float) for folder in folders
    ]
    accuracy = rows["accuracy"]
    assert 0 < is_correct[0].mean() < 1 == is_correct[1].mean()
    assert accuracy["difference"] == pytest.approx(1 - is_correct[0].mean())
    assert accuracy["p"] == statistics.mcnemar(is_correct[0] == 1, is_correct[1] == 1)
    assert accuracy["p_holm"] >= accuracy["p"]
    assert accuracy["low"] < accuracy["difference"] < accuracy["high"]
    assert rows["AUROC"]["test"] == "bootstrap"
    assert rows["AUROC"]["difference"] > 0
    assert all(row["difference"] is None for row in comparison["rows"] if row["model"] == "model 0")
    same = compare.compare([folders[0], folders[0]])["rows"]
    assert {row["difference"] for row in same} == {None, 0.0}
    assert {row["p"] for row in same} == {None, 1.0}


def test_command_writes_page_and_tables(folders: list[Path], tmp_path: Path, capsys) -> None:
    compare.run(compare.CompareCommand(results=tuple(map(str, folders)), out=str(tmp_path / "out")))
    page = Page(tmp_path / "out" / "compare.html")
    assert not page.stack
    assert "McNemar, exact" in page.text
    assert not page.all("script")
    rows = json.loads((tmp_path / "out" / "compare.json").read_text())["rows"]
    with (tmp_path / "out" / "compare.csv").open(newline="") as lines:
        assert len(list(csv.DictReader(lines))) == len(rows)
    assert "colours" in capsys.readouterr().out


def test_compare_different_data_or_tasks_raise(folders: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least two evaluations"):
        compare.compare(folders[:1])
    with pytest.raises(UserError, match="not a file of bclip eval"):
        compare.compare([folders[0], tmp_path / "data"])
    path = folders[1] / "results.json"
    content = json.loads(path.read_text())
    content["tasks"]["colours"]["task"]["data"]["fingerprint"] = "another"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"e1 was measured on other data than .*e0"):
        compare.compare(folders)
    content["tasks"] = {"other": content["tasks"]["colours"]}
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="no task in common"):
        compare.compare(folders)


def test_report_published_scores_are_marked(folders: list[Path]) -> None:
    page = Page(folders[1] / "report.html")
    words = " ".join(page.text.split())
    assert "accuracySomeone's65.23 %published a paper" in words
    assert "accuracymodel 1100.00 %measured here" in words
    assert "Mind <the> step. Published on 500 samples, measured on 40: the scores are not comparable." in words
    assert "65.23" not in (folders[1] / "figures.csv").read_text()


def test_pages_in_chromium_are_drawn_and_reachable_by_keyboard(folders: list[Path], tmp_path: Path) -> None:
    """Check both pages in light and dark, wide and narrow. Keys reach everything that scrolls or opens."""
    compare.run(compare.CompareCommand(results=tuple(map(str, folders)), out=str(tmp_path / "out")))
    with Browser() as browser:
        for path, num_controls in ((folders[1] / "report.html", 7), (tmp_path / "out" / "compare.html", 1)):
            check_drawn(browser, path.as_uri(), tmp_path)
            assert len(check_keyboard(browser)) == num_controls
