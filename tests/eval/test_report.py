"""The report: it shows all metrics, escapes the data, and loads or runs nothing."""

from __future__ import annotations

import base64
import dataclasses
import importlib
import io
import json
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

import image_layouts
import pytest
from browser import Browser, check_drawn, check_keyboard
from colours import colour_model, jpeg, write_shards
from page import Page
from PIL import Image

from bclip_fast import pretrained
from bclip_fast.errors import UserError
from bclip_fast.eval import EvalCommand, evaluate, protocols, report, run
from bclip_fast.eval import results as results_module
from bclip_fast.eval.datasets import open_dataset
from bclip_fast.html import chart
from bclip_fast.html import page as html_page

ATTACK = "\"><script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)> {{ 7*7 }} ]]> <!-- 'x'"


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """24 pairs with malicious captions and labels."""
    return write_shards(
        tmp_path / "shards", 24, lambda i, name: f"{ATTACK} {name} {'!' * i}", lambda i, name: {"colour": f"{name}<b>"}
    )


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, 201):
            record = {
                "step": step,
                "loss": 3 * math.exp(-step / 50) + 0.5,
                "lr": 1e-3 * step / 200,
                "logit_scale": 14.3,
            }
            record["loss"] = math.nan if step == 7 else record["loss"]
            file.write(json.dumps(record) + "\n")
            if step % 100 == 0:
                file.write(json.dumps({"step": step, "validation/recall": step / 400}) + "\n")
        file.write('{"step": 201, "lo')
    (folder / "config.toml").write_text("batch_size = 32\n")
    return folder


@pytest.fixture
def results(shards: Path) -> dict[str, Any]:
    return evaluate(colour_model(), ["retrieval", "zero_shot"], data=str(shards), label=("colour",), progress=False)


@pytest.fixture
def page(results: dict[str, Any], shards: Path, run_folder: Path, tmp_path: Path) -> Page:
    report.write(tmp_path / "report.html", results, {"retrieval": open_dataset(str(shards), "val")}, run_folder)
    return Page(tmp_path / "report.html")


def test_report_captions_and_labels_are_escaped(page: Page) -> None:
    assert not page.stack, f"not closed: {page.stack}"
    assert ATTACK in page.text
    assert "&lt;script&gt;alert(1)" in page.source
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "b>", "iframe", "object", "embed", "link", "form", "base"}
    assert "red<b>" in page.text
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)


def test_report_loads_nothing(page: Page) -> None:
    for tag, attributes in page.elements:
        for name in ("src", "href", "action", "data", "poster", "srcset", "xlink:href", "background"):
            if name in attributes:
                assert tag == "img"
                assert name == "src"
                assert str(attributes[name]).startswith("data:image/jpeg;base64,")
    css = page.source[page.source.index("<style>") : page.source.index("</style>")]
    assert "url(" not in css
    assert "@import" not in css
    policy = [attributes["content"] for attributes in page.all("meta") if "http-equiv" in attributes]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_report_every_metric_has_its_chance_baseline(page: Page, results: dict[str, Any]) -> None:
    words = " ".join(page.text.split())
    for result in results["tasks"].values():
        for metric in result["figures"]:
            value, chance = (html_page.format_score(metric[key], metric["unit"]) for key in ("value", "chance"))
            spread = html_page.format_spread(metric)
            assert (
                f"{metric['name']}{value}{spread}{chance}{html_page.format_ratio(metric)}{metric['chance_is']}" in words
            )
    assert results["tasks"]["retrieval"]["task"]["data"]["fingerprint"][:16] in page.text


def test_report_images_are_small_jpegs_with_alternative_texts(page: Page, results: dict[str, Any]) -> None:
    images = page.all("img")
    num_missed = sum(
        not any(hit["right"] for hit in query["hits"])
        for query in results["tasks"]["retrieval"]["gallery"]["text_to_image"]
    )
    assert len(images) == 6 * 5 + num_missed + 6
    for attributes in images:
        assert attributes["alt"]
        data = base64.b64decode(str(attributes["src"]).partition(",")[2])
        with Image.open(io.BytesIO(data)) as image:
            assert image.format == "JPEG"
            assert max(image.size) <= html_page.THUMBNAIL_SIZE
    num_correct = sum("the correct image" in str(attributes["alt"]).lower() for attributes in images)
    assert num_correct == 6, "the image of each caption is shown and marked, among the hits or after them"


def test_report_tables_have_headers_and_charts_have_names(page: Page) -> None:
    assert all(attributes.get("scope") in ("col", "row", "rowgroup") for attributes in page.all("th"))
    names = [attributes.get("aria-label") or "" for attributes in page.all("svg")]
    kinds = ["Training loss", "Learning rate", "Logit scale", "Validation", "zero shot", "reliability"]
    assert [name.split(":")[0] for name in names] == kinds
    assert names[0].endswith("to 0.5549 at step 200")
    assert "chance, ln 32" in page.text
    assert "1 step not finite" in page.text
    assert page.all("html") == [{"lang": "en"}]
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {attributes["aria-labelledby"] for attributes in page.all("section")} <= set(ids)


def test_report_confusion_matrix_equals_the_results(page: Page, results: dict[str, Any]) -> None:
    confusion = results["tasks"]["zero_shot/colour"]["confusion"]
    shares = [str(attributes["style"]) for attributes in page.all("td") if "--share" in str(attributes.get("style"))]
    assert shares == [f"--share:{count / sum(row):.3f}" for row in confusion for count in row]


def test_report_image_that_only_open_clip_reads_is_named(tmp_path: Path) -> None:
    planes = image_layouts.deep(image_layouts.COLOURS.transpose(2, 0, 1), "u2")
    files = {
        "a.jpg": jpeg((200, 40, 40)),
        "b.tif": image_layouts.tiff(planes, photometric="rgb", planarconfig="separate"),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        (tmp_path / name).with_suffix(".txt").write_text(f"a red {name}")
    options = {"data": str(tmp_path), "image_conversion": "open_clip", "progress": False}
    results = evaluate(colour_model(), ["retrieval"], **options)
    report.write(tmp_path / "report.html", results, {"retrieval": open_dataset(str(tmp_path), "all")})
    text = (tmp_path / "report.html").read_text()
    assert text.count("<img ") == 3
    assert text.count("image b.tif cannot be decoded: TIFF of 16+16+16-bit") == 3


def test_report_opens_with_pictures_a_search_box_and_the_next_steps(
    results: dict[str, Any], shards: Path, tmp_path: Path
) -> None:
    data = dict.fromkeys(results["tasks"], open_dataset(str(shards), "val"))
    path, steps = tmp_path / "report.html", [("Do <this>", "bclip eval 'RUN'")]
    report.write(path, results, data, search=f"index{ATTACK}", steps=steps)
    page = Page(path)
    text = path.read_text(encoding="utf-8")
    assert page.text.index("Do <this>") < page.text.index("What the model sees") < page.text.index("95 % interval")
    assert [form["action"] for form in page.all("form")] == ["http://127.0.0.1:8000/"]
    assert "form-action http://127.0.0.1:8000" in text and "<script" not in text
    samples = results["tasks"]["zero_shot/colour"]["samples"]
    scores = {name.removeprefix("score of "): row for name, row in samples.items() if name.startswith("score of ")}
    examples = [attributes for attributes in page.all("img") if "Sample " in str(attributes["alt"])]
    assert len(examples) == 6
    for attributes in examples:
        row = samples["key"].index(str(attributes["alt"]).split()[1].rstrip(","))
        best = max(scores, key=lambda name: scores[name][row])
        assert (
            f"{best} ✓" in page.text
            if best == samples["label"][row]
            else f"correct: {samples['label'][row]}" in page.text
        )
        assert f"{100 * scores[best][row]:.0f} %" in page.text


def test_report_without_data_and_run_has_only_metrics(results: dict[str, Any], tmp_path: Path) -> None:
    report.write(tmp_path / "r.html", results)
    page = Page(tmp_path / "r.html")
    assert not page.all("img")
    assert len(page.all("svg")) == 2, "the ROC curve and the reliability of zero-shot classification"
    assert "balanced accuracy" in page.text


def test_report_invalid_metrics_file_names_the_line(run_folder: Path, results: dict[str, Any], tmp_path: Path) -> None:
    path = run_folder / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2}\nnot json\n{"step": 2, "loss": 1}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl, line 2: not JSON"):
        report.write(tmp_path / "r.html", results, None, run_folder)
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize(
    "values", [[1.0], [2.0, 2.0], [0.0, 0.0], [-1e-9, 1e-9], [1e12, 3.0], [float(i % 13) for i in range(5000)]]
)
def test_line_chart_stays_inside_its_frame(values: list[float]) -> None:
    steps = list(range(1, len(values) + 1))
    drawing = str(chart.line_chart({"": (steps, values)}, title="t", smooth=True, reference=(values[0], "level")))
    assert "nan" not in drawing
    assert "inf" not in drawing
    points = [
        tuple(map(float, point.split(",")))
        for group in re.findall(r'points="([^"]*)"', drawing)
        for point in group.split()
    ]
    assert len(points) <= 2 * chart.MAX_POINTS
    for x, y in points:
        assert chart.LEFT - 0.1 <= x <= chart.WIDTH - chart.RIGHT + 0.1
        assert chart.TOP - 0.1 <= y <= chart.HEIGHT - chart.BOTTOM + 0.1


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1, "1"),
        (0.00025, "2.5e-4"),
        (12345, "12.35k"),
        (2e6, "2M"),
        (3.14159, "3.142"),
        (0.05, "0.05"),
        (-40, "-40"),
    ],
)
def test_number_formats_axis_labels(value: float, text: str) -> None:
    assert chart.number(value) == text


def test_command_writes_results_and_report_into_the_run(
    shards: Path, run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pretrained, "load", lambda name, *, device="cpu": colour_model())
    command = EvalCommand(model=str(run_folder), data=str(shards), label=("colour",), progress=False)
    run(command)
    out = run_folder / "eval" / "shards-val"
    results = json.loads((out / "results.json").read_text())
    assert results["model"]["path"] == str(run_folder)
    assert all(
        {"value", "chance", "num_samples"} <= set(m) for task in results["tasks"].values() for m in task["figures"]
    )
    assert set(results["tasks"]) == {"retrieval", "zero_shot/colour"}
    assert Page(out / "report.html").all("svg")
    assert sorted(os.listdir(out)) == [
        "figures.csv", "per-class.csv", "reliability.csv", "report.html", "results.json", "samples",
    ]  # fmt: skip
    assert "zero_shot/colour" in capsys.readouterr().out
    with pytest.raises(UserError, match="does not exist"):
        run(EvalCommand(model=str(run_folder), data=str(shards / "none")))


def test_command_prints_scores_that_cannot_be_written(
    shards: Path, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pretrained, "load", lambda name, *, device="cpu": colour_model())
    (tmp_path / "file").write_text("")
    command = EvalCommand(model=str(run_folder), data=str(shards), label=("colour",), progress=False, cache="none")
    with pytest.raises(UserError, match="cannot write .*results.json"):
        run(dataclasses.replace(command, out=str(tmp_path / "file" / "out")))
    assert "zero_shot/colour" in capsys.readouterr().out
    # A later task that fails leaves the scores of the earlier ones on the screen.
    monkeypatch.setitem(protocols.PROTOCOLS, "zero_shot", lambda inputs: results_module.read(tmp_path))
    with pytest.raises(UserError, match="not a file of bclip eval"):
        run(command)
    assert "retrieval" in capsys.readouterr().out
    assert not (run_folder / "eval").exists()
    # Scores that cannot be printed are written.
    monkeypatch.undo()
    monkeypatch.setattr(pretrained, "load", lambda name, *, device="cpu": colour_model())
    monkeypatch.setattr("rich.console.Console.print", lambda *_: (_ for _ in ()).throw(BrokenPipeError("closed")))
    run(command)
    assert (run_folder / "eval" / "shards-val" / "report.html").is_file()


def test_default_folders_of_other_models_and_data_differ(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.import_module("bclip_fast.eval.evaluate"), "load_model", lambda *_: colour_model())
    monkeypatch.chdir(tmp_path)
    others = tmp_path / "others" / "shards"
    shutil.copytree(shards, others)

    def evaluate_into(model: str, data: Path = shards, split: str = "val") -> set[str]:
        before = set(map(str, Path("runs").rglob("results.json")))
        command = EvalCommand(model=model, data=str(data), task=("retrieval",), progress=False, cache="none")
        run(dataclasses.replace(command, split=split))
        return set(map(str, Path("runs").rglob("results.json"))) - before

    assert evaluate_into("a/b") == {"runs/eval/a-b/shards-val/results.json"}
    assert evaluate_into("a/b") == set(), "the same evaluation replaces its results"
    assert all(len(evaluate_into(model)) == 1 for model in ("a-b", "模型一", "模型二", "a:b"))
    assert len(evaluate_into("a/b", others)) == 1


def test_report_keyboard_reaches_all_controls(page: Page, tmp_path: Path) -> None:
    """Tab reaches everything that scrolls or opens, in order. Arrows scroll a table, and Enter opens the prompts."""
    address = (tmp_path / "report.html").as_uri()
    with Browser() as browser:
        check_drawn(browser, address, tmp_path)
        for width in (400, 1400):
            browser.open(address, width=width)
            names = [one["name"] for one in check_keyboard(browser)]
            assert names[0] == "All metrics"
            assert "Prompts" in names
            assert names[-2:] == ["Environment", "Settings"]
        browser.open(address, width=400)
        browser.press("Tab")
        for _ in range(3):
            browser.press("ArrowRight")
        browser.ask("new Promise(done => setTimeout(done, 400))", wait=True)
        assert browser.ask("document.activeElement.scrollLeft") > 0
        while browser.ask("document.activeElement.tagName") != "SUMMARY":
            browser.press("Tab")
        browser.press("Enter")
        assert browser.ask("document.activeElement.parentElement.open")
