"""`bclip ingest verify` and `bclip ingest report` on a dataset made for them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_ingest import article, noise, put

from bclip_fast.cli import main
from bclip_fast.ingest.build import IngestConfig, build
from bclip_fast.ingest.verify import verify


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    for number in range(1, 13):
        texts = [("a", "&lt;script>alert(1)&lt;/script> &amp; more"), ("b", "word " * 300), ("missing", "x")]
        files = {f"{name}.jpg": noise(10 * number + place) for place, name in enumerate("ab")}
        put(tmp_path / f"in/{number}", {"x.nxml": article(*texts, number=number), **files})
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "word", "more"]))
    options = {"workers": 1, "test_fraction": 0.3, "val_fraction": 0.1, "tokenizer": tmp_path / "vocab.txt"}
    build(IngestConfig(str(tmp_path / "in"), tmp_path / "out", **options))
    return tmp_path / "out"


def rewrite(path: Path, change) -> None:
    rows = pq.read_table(path).to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, schema=pq.read_schema(path)), path)


def test_a_good_dataset_is_well(dataset, capsys):
    assert main(["ingest", "verify", str(dataset)]) == 0
    assert "no problems found" in capsys.readouterr().out


def move(rows: list[dict]) -> None:
    rows[0]["article"] = next(row["article"] for row in rows if row["split"] != rows[0]["split"])


def copy_look(rows: list[dict]) -> None:
    rows[0]["phash"] = next(row["phash"] for row in rows if row["split"] != rows[0]["split"])


def copy_source(rows: list[dict]) -> None:
    rows[0]["source_sha256"] = next(row["source_sha256"] for row in rows if row["split"] != rows[0]["split"])


@pytest.mark.parametrize(
    "file, change, words",
    [
        ("manifest", move, r"article PMC\d+: in split \w+ and in"),
        ("manifest", copy_look, "1 cases of similar images in different splits"),
        ("manifest", copy_source, "1 cases of similar images in different splits"),
        ("manifest", lambda rows: rows[0].update(phash="no"), "invalid perceptual hash or split"),
        ("manifest", lambda rows: rows.pop(), "its rows are not those"),
        ("rejects", lambda rows: rows.pop(), "counts of its reasons differ"),
    ],
)
def test_verify_says_what_is_wrong(dataset, file, change, words):
    rewrite(dataset / f"{file}.parquet", change)
    problems = verify(dataset)
    assert len(problems) == 1 and re.search(words, problems[0]), problems


def test_verify_counts_and_exits(dataset, capsys):
    described = json.loads((dataset / "dataset.json").read_text())
    described["ingest"]["pairs"] += 1
    (dataset / "dataset.json").write_text(json.dumps(described))
    assert main(["ingest", "verify", str(dataset)]) == 1
    assert "1 problems" in capsys.readouterr().out


def test_the_report_is_whole_and_harmless(dataset):
    assert main(["ingest", "report", str(dataset), "--gallery", "5"]) == 0
    page = (dataset / "report.html").read_text()
    assert page.count("<figure ") == 5 and page.count("data:image/jpeg;base64,") == 5
    assert "<script" not in page and "&lt;script&gt;" in page
    assert "default-src 'none'" in page and not re.search(r"(?:src|href)=\"(?!data:)", page)
    for words in ("image missing", "not stated", "of the captions fit in 77 tokens", "Licences", "Years"):
        assert words in page
    assert re.search(r"<td>articles</td><td class=\"num\">12</td>", page)
    # Half of the captions have 300 words, which no limit here covers.
    assert page.count("50.0% of the captions fit in") == 2
