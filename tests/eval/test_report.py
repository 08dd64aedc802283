"""The report: nothing from the data runs or loads, and everything that was measured is on the page."""

from __future__ import annotations

import base64
import html.parser
import io
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, check_drawn, check_keyboard
from PIL import Image
from test_eval import COLOURS, ColourModel, jitter, jpeg, preprocess, tokenizer

from bclip_fast.data.shards.format import Sample
from bclip_fast.data.shards.writer import ShardWriter
from bclip_fast.errors import UserError
from bclip_fast.eval import EvalCommand, evaluate, report, run
from bclip_fast.eval.datasets import open_dataset
from bclip_fast.html import chart
from bclip_fast.html import page as html_page

ATTACK = "\"><script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)> {{ 7*7 }} ]]> <!-- 'x'"


class Page(html.parser.HTMLParser):
    """Collects the elements of a page, its text, and which elements are left open."""

    VOID = frozenset(("meta", "img", "br", "line", "circle", "polyline"))

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.stack: list[str] = []
        self.text = ""
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    root = tmp_path / "shards"
    names = list(COLOURS)
    with ShardWriter(root) as writer:
        for i in range(24):
            name = names[i % 4]
            caption = f"{ATTACK} {name} {'!' * i}"
            writer.write(Sample(f"s{i:03d}", jpeg(jitter(COLOURS[name], i)), caption, {"colour": f"{name}<b>"}), "val")
    return root


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
    triple = (ColourModel(), preprocess, tokenizer)
    return evaluate(triple, ["retrieval", "zero_shot"], data=str(shards), label=("colour",), progress=False)


@pytest.fixture
def page(results: dict[str, Any], shards: Path, run_folder: Path, tmp_path: Path) -> Page:
    report.write(tmp_path / "report.html", results, {"retrieval": open_dataset(str(shards), "val")}, run_folder)
    return Page(tmp_path / "report.html")


def test_captions_and_labels_are_text_and_nothing_else(page: Page) -> None:
    assert not page.stack, f"not closed: {page.stack}"
    assert ATTACK in page.text
    assert "&lt;script&gt;alert(1)" in page.source
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "b>", "iframe", "object", "embed", "link", "form", "base"}
    assert "red<b>" in page.text
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)


def test_the_page_loads_nothing_from_anywhere(page: Page) -> None:
    for tag, attributes in page.elements:
        for name in ("src", "href", "action", "data", "poster", "srcset", "xlink:href", "background"):
            if name in attributes:
                assert tag == "img" and name == "src" and str(attributes[name]).startswith("data:image/jpeg;base64,")
    css = page.source[page.source.index("<style>") : page.source.index("</style>")]
    assert "url(" not in css and "@import" not in css
    policy = [attributes["content"] for attributes in page.all("meta") if "http-equiv" in attributes]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_every_figure_stands_beside_its_chance(page: Page, results: dict[str, Any]) -> None:
    words = " ".join(page.text.split())
    for result in results["tasks"].values():
        for figure in result["figures"]:
            value, chance = (html_page.format_figure(figure[key], figure["unit"]) for key in ("value", "chance"))
            spread = html_page.format_spread(figure)
            assert (
                f"{figure['name']}{value}{spread}{chance}{html_page.format_ratio(figure)}{figure['chance_is']}" in words
            )
    assert results["tasks"]["retrieval"]["task"]["data"]["fingerprint"][:16] in page.text


def test_pictures_are_small_new_jpegs_with_alternative_texts(page: Page, results: dict[str, Any]) -> None:
    pictures = page.all("img")
    num_missed = sum(
        not any(hit["right"] for hit in query["hits"])
        for query in results["tasks"]["retrieval"]["gallery"]["text_to_image"]
    )
    assert len(pictures) == 6 * 5 + num_missed + 6
    for attributes in pictures:
        assert attributes["alt"]
        data = base64.b64decode(str(attributes["src"]).partition(",")[2])
        with Image.open(io.BytesIO(data)) as image:
            assert image.format == "JPEG" and max(image.size) <= html_page.THUMBNAIL_SIZE
    num_right = sum("the right image" in str(attributes["alt"]).lower() for attributes in pictures)
    assert num_right == 6, "each caption's own image is shown and marked, among the hits or after them"


def test_tables_have_headers_and_charts_have_names(page: Page) -> None:
    assert all(attributes.get("scope") in ("col", "row", "rowgroup") for attributes in page.all("th"))
    names = [attributes.get("aria-label") or "" for attributes in page.all("svg")]
    kinds = ["Training loss", "Learning rate", "Logit scale", "Validation", "zero shot"]
    assert [name.split(":")[0] for name in names] == kinds
    assert names[0].endswith("to 0.5549 at step 200")
    assert "chance, ln 32" in page.text and "1 step not finite" in page.text
    assert page.all("html") == [{"lang": "en"}]
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {attributes["aria-labelledby"] for attributes in page.all("section")} <= set(ids)


def test_confusion_matrix_on_the_page_is_that_of_the_results(page: Page, results: dict[str, Any]) -> None:
    confusion = results["tasks"]["zero_shot/colour"]["confusion"]
    shares = [str(attributes["style"]) for attributes in page.all("td") if "--share" in str(attributes.get("style"))]
    assert shares == [f"--share:{count / sum(row):.3f}" for row in confusion for count in row]


def test_a_report_without_data_or_run_has_figures_only(results: dict[str, Any], tmp_path: Path) -> None:
    report.write(tmp_path / "r.html", results)
    page = Page(tmp_path / "r.html")
    assert not page.all("img") and len(page.all("svg")) == 1 and "balanced accuracy" in page.text


def test_metrics_that_are_not_json_name_the_line(run_folder: Path, results: dict[str, Any], tmp_path: Path) -> None:
    path = run_folder / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2}\nnot json\n{"step": 2, "loss": 1}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl, line 2: not JSON"):
        report.write(tmp_path / "r.html", results, None, run_folder)
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize(
    "values", [[1.0], [2.0, 2.0], [0.0, 0.0], [-1e-9, 1e-9], [1e12, 3.0], [float(i % 13) for i in range(5000)]]
)
def test_charts_stay_inside_their_frame(values: list[float]) -> None:
    steps = list(range(1, len(values) + 1))
    drawing = str(chart.line_chart({"": (steps, values)}, title="t", smooth=True, reference=(values[0], "level")))
    assert "nan" not in drawing and "inf" not in drawing
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
def test_numbers_on_axes(value: float, text: str) -> None:
    assert chart.number(value) == text


def test_the_command_writes_both_files_into_the_run(
    shards: Path, run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bclip_fast import pretrained

    monkeypatch.setattr(pretrained, "load", lambda name, *, device="cpu": (ColourModel(), preprocess, tokenizer))
    command = EvalCommand(model=str(run_folder), data=str(shards), label=("colour",), progress=False)
    run(command)
    out = run_folder / "eval" / "shards-val"
    results = json.loads((out / "results.json").read_text())
    assert results["model"]["path"] == str(run_folder)
    assert all(
        {"value", "chance", "num_samples"} <= set(f) for task in results["tasks"].values() for f in task["figures"]
    )
    assert set(results["tasks"]) == {"retrieval", "zero_shot/colour"}
    assert Page(out / "report.html").all("svg")
    assert sorted(os.listdir(out)) == ["figures.csv", "per-class.csv", "report.html", "results.json", "samples"]
    assert "zero_shot/colour" in capsys.readouterr().out
    with pytest.raises(UserError, match="does not exist"):
        run(EvalCommand(model=str(run_folder), data=str(shards / "none")))


def test_the_page_without_a_mouse(page: Page, tmp_path: Path) -> None:
    """Tab meets all that scrolls or opens, in the order of the page; arrows scroll a table, Enter opens the prompts."""
    address = (tmp_path / "report.html").as_uri()
    with Browser() as browser:
        check_drawn(browser, address, tmp_path)
        for width in (400, 1400):
            browser.open(address, width=width)
            names = [one["name"] for one in check_keyboard(browser)]
            assert names[0] == "All figures" and "Prompts" in names and names[-2:] == ["Environment", "Settings"]
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
