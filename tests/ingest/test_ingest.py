"""From articles on disk to a dataset: pairing, splits, crashes, errors, and the same bytes every time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from articles import article_xml, manifest_rows, noise_image, read_tree, red_image, reject_rows, write_files
from ingest_runs import ROOT, run_build

from bclip_fast.config import parse, to_toml
from bclip_fast.errors import UserError
from bclip_fast.ingest.assign import Splits
from bclip_fast.ingest.build import build
from bclip_fast.ingest.config import IngestConfig


def test_build_figures_find_their_images(tmp_path):
    write_files(
        tmp_path / "in/a",
        {
            "x.nxml": article_xml(
                ("plain", "without suffix"), ("with.tif", "other suffix"), ("EXACT.PNG", "other case"),
                ("info:doi/10.1/journal.pone.1.g001", "address"), ("sub/deep", "subfolder"), ("space%20d", "escaped"),
                ("missing", "no file"), ("plain", ""), ("../b/other", "elsewhere"), ("/etc/hostname", "absolute"),
                ("broken", "bad image"), number=5,
            ),
            "plain.jpg": red_image(), "plain.gif": red_image("GIF"), "with.jpg": red_image(),
            "exact.png": red_image("PNG"), "pone.1.g001.tif": red_image("TIFF"), "sub/deep.jpg": red_image(),
            "space d.jpg": red_image(), "broken.jpg": b"<html>", "other.jpg": red_image(),
        },
    )  # fmt: skip
    write_files(tmp_path / "in/b", {"y.xml": article_xml(("other", "in b")), "other.jpg": red_image()})
    captions, rejects = run_build(tmp_path / "in", tmp_path / "out")
    keys_in_b = [key for key in captions if not key.startswith("PMC5")]
    assert captions == {
        "PMC5_f1": "without suffix", "PMC5_f2": "other suffix", "PMC5_f3": "other case", "PMC5_f4": "address",
        "PMC5_f5": "subfolder", "PMC5_f6": "escaped", keys_in_b[0]: "in b",
    }  # fmt: skip
    assert rejects == [
        ("F7", "missing", "image missing"),
        ("F8", "plain", "no caption"),
        ("F9", "../b/other", "unsafe href"),
        ("F10", "/etc/hostname", "unsafe href"),
        ("F11", "broken.jpg", "image in a format that is not read: HTML"),
    ]
    rows = manifest_rows(tmp_path / "out")
    assert rows["PMC5_f1"]["file"] == "plain.jpg"  # the JPEG, not its thumbnail
    assert (rows["PMC5_f4"]["source_format"], rows["PMC5_f4"]["label"]) == ("TIFF", "Figure 4")


def test_build_several_graphics_give_pairs_except_versions_of_one(tmp_path):
    xml = b"""<article xmlns:xlink="http://www.w3.org/1999/xlink"><body><fig id="F"><caption><p>All.</p></caption>
      <graphic xlink:href="a"/><graphic xlink:href="b"><caption><p>Own.</p></caption></graphic>
      <graphic xlink:href="a.tif"/><graphic xlink:href="c"/>
      <alternatives><graphic xlink:href="d.gif"/><graphic xlink:href="d2.png"/></alternatives></fig>
      <fig id="G"><caption><p>None.</p></caption></fig>
      <supplementary-material><fig id="S"><caption><p>S</p></caption><graphic xlink:href="a"/></fig>
      </supplementary-material></body></article>"""
    images = {
        "a.jpg": red_image(), "a.tif": red_image("TIFF"), "b.jpg": red_image(),
        "d.gif": red_image("GIF"), "d2.png": red_image("PNG"),
    }  # fmt: skip
    write_files(tmp_path / "in", {"x.xml": xml, **images})
    captions, rejects = run_build(tmp_path / "in", tmp_path / "out")
    assert [(key.split("_", 1)[1], text) for key, text in captions.items()] == [
        ("f1_1", "All."),
        ("f1_2", "All. Own."),
        ("f1_5", "All."),
    ]
    assert rejects == [
        ("F", "c", "image missing"),
        ("G", "", "no graphic in the XML"),
        ("S", "", "inside supplementary-material"),
    ]
    assert {row["file"] for row in manifest_rows(tmp_path / "out").values()} == {"a.jpg", "b.jpg", "d2.png"}


def test_split_of_article_depends_on_id_and_seed(tmp_path):
    splits = Splits(0, val_fraction=0.2, test_fraction=0.3)
    counts = Counter(splits.of(f"PMC{i}") for i in range(5000))
    assert abs(counts["val"] - 1000) < 100
    assert abs(counts["test"] - 1500) < 100
    # Recorded once: a new release must put an article into the same split.
    expected = ["train", "test", "test", "val", "test", "test", "test", "train"]
    assert [splits.of(f"PMC{i}") for i in range(8)] == expected
    for i in range(12):
        figures = [(f"f{j}", f"text {j}") for j in range(3)]
        images = {f"f{j}.jpg": noise_image(3 * i + j) for j in range(3)}
        write_files(tmp_path / f"in/{i}", {"x.nxml": article_xml(*figures, number=i + 1), **images})
    captions, _ = run_build(tmp_path / "in", tmp_path / "out", val_fraction=0.2, test_fraction=0.3)
    assert len(captions) == 36
    article_splits = {(row["article"], row["split"]) for row in manifest_rows(tmp_path / "out").values()}
    assert len(article_splits) == 12
    assert {split for _, split in article_splits} == {"train", "val", "test"}


CRASHING_BUILD = """
import os, sys
from pathlib import Path
from bclip_fast.ingest import build, extract
real = extract.process
def process(package, options):
    if package.name == "3":
        os._exit(11)
    return real(package, options)
extract.process = process
if __name__ == "__main__":
    build.build(build.IngestConfig(sys.argv[1], Path(sys.argv[2]), workers=2))
"""


def test_build_crash_of_worker_rejects_only_its_package(tmp_path):
    root, out = tmp_path / "in", tmp_path / "out"
    for i in range(1, 7):
        files = {"x.nxml": article_xml(("f", f"article {i}"), number=i), "f.jpg": red_image()}
        write_files(root / str(i), files)
    script = tmp_path / "crash.py"
    script.write_text(CRASHING_BUILD)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    command = [sys.executable, str(script), str(root), str(out)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert sorted(manifest_rows(out)) == [f"PMC{i}_f1" for i in (1, 2, 4, 5, 6)]
    assert [row[2:] for row in reject_rows(out)] == [("3/x.nxml", "crash while reading the package")]


def test_build_errors_are_one_line_and_leave_nothing(tmp_path):
    write_files(tmp_path / "empty", {"readme.txt": b"x"})
    write_files(tmp_path / "none", {"x.nxml": article_xml(("f", "no image"))})
    cases = [
        (tmp_path / "nowhere", tmp_path / "out", "is not a folder"),
        (tmp_path / "empty", tmp_path / "out", "has no article"),
        (tmp_path / "none", tmp_path / "out", "no figure-caption pair in 1 articles; rejects: 1 image missing"),
        (tmp_path / "none", tmp_path / "none/out", "lies inside"),
    ]
    for articles, out, words in cases:
        with pytest.raises(UserError, match=words) as caught:
            build(IngestConfig(str(articles), out, workers=1))
        assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "none"]
    write_files(tmp_path / "none", {"f.jpg": red_image()})
    run_build(tmp_path / "none", tmp_path / "out")
    with pytest.raises(UserError, match="already holds"):
        run_build(tmp_path / "none", tmp_path / "out")
    run_build(tmp_path / "none", tmp_path / "out", overwrite=True)


def test_config_flags_are_parsed_and_checked():
    config = parse(IngestConfig, ["in", "-o", "out", "--max_short_side", "0"], prog="bclip ingest build")
    assert config == IngestConfig("in", Path("out"), max_short_side=0)
    assert "max_short_side = 0" in to_toml(config)
    for flags in (["--jpeg_quality", "0"], ["--val_fraction", "0.6", "--test_fraction", "0.5"], ["--workers", "-1"]):
        with pytest.raises(UserError, match="out of range"):
            parse(IngestConfig, ["in", "-o", "out", *flags], prog="bclip ingest build")
    # Before the articles are read.
    with pytest.raises(UserError, match="reads the column kind_p, which needs --kinds"):
        IngestConfig("in", Path("out"), filter="year > 2000 and p > 0.5")
    assert IngestConfig("in", Path("out"), filter="year > 2000 and p > 0.5", kinds=True).kinds


def test_token_counts_equal_those_of_the_model(shared_data):
    from bclip_fast.ingest.extract import _token_counter
    from bclip_fast.model.tokenizer import Tokenizer

    rows = (shared_data / "pmc_articles/pairs.jsonl").read_text().splitlines()[::2]
    captions = [json.loads(row)["caption"] for row in rows]
    for name in ("vocab.txt", "tokenizer.json"):
        path = shared_data / "vocab/pubmedbert" / name
        expected = [len(ids) for ids in Tokenizer.from_file(path, 4096).encode(captions)]
        assert [_token_counter(str(path))(caption) for caption in captions] == expected


def test_build_real_articles_pairs_every_figure_with_an_image(shared_data, tmp_path, caplog):
    articles = shared_data / "pmc_articles"
    pairs = [json.loads(line) for line in (articles / "pairs.jsonl").read_text().splitlines()]
    options = {"max_short_side": 64, "val_fraction": 0.1, "test_fraction": 0.1}
    with caplog.at_level("INFO", logger="bclip_fast.ingest.build"):
        captions, rejects = run_build(articles, tmp_path / "one", **options)
    assert len(captions) == len(pairs) == 558
    assert Counter(reason.partition(":")[0] for _, _, reason in rejects) == {
        "image missing": 68,
        "outside a figure": 39,
        "image of a formula": 11,
        "image in running text": 1,
    }
    assert "155 articles, 558 pairs" in caplog.text
    assert "68 image missing" in caplog.text
    rows = manifest_rows(tmp_path / "one").values()
    assert Counter((row["figure"], row["file"]) for row in rows) == Counter(
        (pair["figure_id"], Path(pair["image"]).name) for pair in pairs
    )
    # Two processes write the same bytes.
    run_build(articles, tmp_path / "two", workers=2, **options)
    assert read_tree(tmp_path / "one") == read_tree(tmp_path / "two")
