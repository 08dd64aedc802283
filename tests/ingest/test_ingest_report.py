"""`bclip ingest verify` and `bclip ingest report`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from articles import article_xml, noise_image, write_files

from bclip_fast.cli import main
from bclip_fast.ingest.build import build
from bclip_fast.ingest.config import IngestConfig
from bclip_fast.ingest.verify import verify


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    for number in range(1, 13):
        texts = [("a", "&lt;script>alert(1)&lt;/script> &amp; more"), ("b", "word " * 300), ("missing", "x")]
        files = {f"{name}.jpg": noise_image(10 * number + i) for i, name in enumerate("ab")}
        write_files(tmp_path / f"in/{number}", {"x.nxml": article_xml(*texts, number=number), **files})
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "word", "more"]))
    options = {"workers": 1, "test_fraction": 0.3, "val_fraction": 0.1, "tokenizer": tmp_path / "vocab.txt"}
    build(IngestConfig(str(tmp_path / "in"), tmp_path / "out", **options))
    return tmp_path / "out"


def rewrite_table(path: Path, change) -> None:
    rows = pq.read_table(path).to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, schema=pq.read_schema(path)), path)


def test_verify_intact_dataset_reports_no_problems(dataset, capsys):
    assert main(["ingest", "verify", str(dataset)]) == 0
    assert "no problems found" in capsys.readouterr().out


def copy_from_other_split(column: str):
    """Return a function that copies a value from a row of another split into the first row."""

    def change(rows: list[dict]) -> None:
        rows[0][column] = next(row[column] for row in rows if row["split"] != rows[0]["split"])

    return change


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("manifest", copy_from_other_split("article"), r"article PMC\d+: in split \w+ and in"),
        ("manifest", copy_from_other_split("phash"), "1 cases of similar images in different splits"),
        ("manifest", copy_from_other_split("source_sha256"), "1 cases of similar images in different splits"),
        ("manifest", lambda rows: rows[0].update(phash="no"), "invalid perceptual hash or split"),
        ("manifest", lambda rows: rows.pop(), "its rows differ"),
        ("rejects", lambda rows: rows.pop(), "counts of its reasons differ"),
    ],
    ids=["article", "hash", "source", "invalid hash", "missing row", "missing reject"],
)
def test_verify_changed_table_names_the_problem(dataset, file, change, words):
    rewrite_table(dataset / f"{file}.parquet", change)
    (problem,) = verify(dataset)
    assert re.search(words, problem)


def test_verify_command_prints_number_of_problems(dataset, capsys):
    description = json.loads((dataset / "dataset.json").read_text())
    description["ingest"]["pairs"] += 1
    (dataset / "dataset.json").write_text(json.dumps(description))
    assert main(["ingest", "verify", str(dataset)]) == 1
    assert "1 problems" in capsys.readouterr().out


def test_report_is_complete_and_harmless(dataset):
    assert main(["ingest", "report", str(dataset), "--gallery", "5"]) == 0
    page = (dataset / "report.html").read_text()
    assert page.count("<figure ") == page.count("data:image/jpeg;base64,") == 5
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "default-src 'none'" in page
    assert not re.search(r"(?:src|href)=\"(?!data:)", page)
    for words in (
        "image missing",
        "not stated",
        "of the captions fit in 77 tokens",
        "Licences",
        "Years",
        "Languages of the captions",
        "no mark",
    ):
        assert words in page
    assert re.search(r"<td>articles</td><td class=\"num\">12</td>", page)
    # Half of the captions have 300 words, which exceeds both limits.
    assert page.count("50.0% of the captions fit in") == 2


def test_report_of_a_damaged_dataset_is_an_error_in_one_line(dataset, capsys):
    manifest = dataset / "manifest.parquet"
    table = pq.read_table(manifest)

    def message() -> str:
        assert main(["ingest", "report", str(dataset)]) == 2
        return capsys.readouterr().err

    pq.write_table(table.drop_columns(["shard"]), manifest)
    assert "can't be read: 'shard'" in message()
    manifest.write_bytes(b"PAR1")
    assert "manifest.parquet or a shard that it names can't be read" in message()
    manifest.unlink()
    assert "manifest.parquet or a shard that it names can't be read" in message()
    assert not (dataset / "report.html").exists()
