"""Tests of `bclip quickstart` on 20 small synthetic articles."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bclip_fast.errors import UserError
from bclip_fast.quickstart import QuickstartConfig, run
from bclip_fast.search.searcher import OpenConfig, Searcher

ARTICLE = """<?xml version="1.0"?>
<article xmlns:xlink="http://www.w3.org/1999/xlink"><front><article-meta>
<article-id pub-id-type="pmc">{number}</article-id></article-meta></front><body>
<fig id="f1"><label>Figure 1</label><caption><p>{first}</p></caption><graphic xlink:href="a{number}"/></fig>
<fig id="f2"><label>Figure 2</label><caption><p>{second}</p></caption><graphic xlink:href="b{number}.jpg"/></fig>
</body></article>"""


@pytest.fixture(scope="module")
def articles(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("articles")
    random = np.random.default_rng(0)
    for number in range(1, 21):
        home = folder / f"PMC{number}"
        home.mkdir()
        for letter, level in (("a", 60), ("b", 200)):
            pixels = random.integers(level - 40, level + 40, (90, 120, 3)).astype(np.uint8)
            out = io.BytesIO()
            Image.fromarray(pixels).save(out, "JPEG")
            (home / f"{letter}{number}.jpg").write_bytes(out.getvalue())
        text = ARTICLE.format(
            number=number, first=f"A dark smear, slide {number}.", second=f"A bright smear, plate {number}."
        )
        (home / f"PMC{number}.nxml").write_text(text)
    return folder


def test_run_articles_give_report_and_resume(articles, tmp_path, capsys):
    config = QuickstartConfig(out=tmp_path / "q", articles=articles, epochs=2)
    run(config)
    printed = capsys.readouterr().out.splitlines()
    report = Path(printed[-2].removeprefix("Report: "))
    assert report == (tmp_path / "q/report.html").resolve() and report.stat().st_size > 10_000
    assert printed[-1] == f"Search the images: bclip serve {tmp_path / 'q/index'}"
    assert f"bclip serve {tmp_path / 'q/index'}" in report.read_text(encoding="utf-8")
    assert len(Searcher(OpenConfig(folder=str(tmp_path / "q/index"))).text("a red square", k=2)) == 2
    results = json.loads((tmp_path / "q/results.json").read_text())
    figures = results["tasks"]["retrieval"]["figures"]
    assert {figure["name"] for figure in figures} >= {"image to text R@5", "text to image R@5"}
    assert all(figure["chance"] > 0 for figure in figures)
    assert (tmp_path / "q/run/metrics.jsonl").read_text().count('"loss"') >= 2
    # A second run keeps the finished folder. An interrupted run resumes without a new dataset or training.
    before = (tmp_path / "q/results.json").stat().st_mtime_ns
    run(config)
    assert (tmp_path / "q-2/results.json").is_file() and (tmp_path / "q/results.json").stat().st_mtime_ns == before
    model = next((tmp_path / "q-2/run/model").glob("*.safetensors"))
    trained = model.stat().st_mtime_ns
    (tmp_path / "q-2/results.json").unlink()
    with caplog_at_info() as lines:
        run(config)
    assert (tmp_path / "q-2/results.json").is_file() and model.stat().st_mtime_ns == trained, lines


def test_run_too_few_articles_is_refused(articles, tmp_path):
    few = tmp_path / "few"
    few.mkdir()
    (few / "PMC1").symlink_to(articles / "PMC1")
    with pytest.raises(UserError, match="held out"):
        run(QuickstartConfig(out=tmp_path / "q", articles=few / "PMC1"))


class caplog_at_info(logging.Handler):
    """Collects the package's log lines for the message of a failed assertion."""

    def __enter__(self) -> list[str]:
        self.lines: list[str] = []
        logging.getLogger("bclip_fast").addHandler(self)
        return self.lines

    def __exit__(self, *_: object) -> None:
        logging.getLogger("bclip_fast").removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
