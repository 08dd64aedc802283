"""`bclip ingest check` says what becomes of articles and images, and why."""

from __future__ import annotations

import json
import os

import pytest
from articles import article_xml, encode_image, noise_image, red_image, write_articles, write_files, write_tar
from jats_pieces import HEAD
from PIL import Image

from bclip_fast.cli import main
from bclip_fast.errors import UserError
from bclip_fast.ingest.check import CheckConfig, explain, run

PERMISSIONS = (
    '<permissions><license xlink:href="https://creativecommons.org/licenses/by/4.0/">'
    "<license-p>No commercial use.</license-p></license></permissions>"
)
ARTICLE = f"""{HEAD.replace(">", ' xml:lang="pt">')}<front><article-meta><article-id pub-id-type="pmc">1</article-id>
  <title-group><article-title>On the liver</article-title></title-group>{PERMISSIONS}</article-meta></front><body>
  <fig-group><caption><p>Both.</p></caption><fig id="F1"><label>Figura 1</label>
  <caption xml:lang="pt"><p>Corte.</p></caption>
  <caption xml:lang="en"><p>Section.</p></caption><graphic xlink:href="f"/></fig></fig-group>
  <fig id="F2"><caption><p>Mapa.</p></caption><graphic xlink:href="g.jp2"/><graphic xlink:href="h"/></fig>
  <p><graphic xlink:href="loose"/></p></body></article>""".encode()
FILES = {
    "x.nxml": ARTICLE,
    "f.tif": encode_image(Image.new("CMYK", (1200, 800)), "TIFF"),
    "g.jp2": b"\x00\x00\x00\x0cjP  \r\n\x87\n",
}


def lines_of(path, **options) -> list[str]:
    return list(explain(path, CheckConfig((path,), **options)))


def test_check_of_an_article_explains_captions_licence_images_and_rejects(tmp_path):
    write_files(tmp_path / "a", FILES)
    assert lines_of(tmp_path / "a/x.nxml") == [
        "x.nxml: PMC1, 2 figures: On the liver",
        "  licence: CC BY-NC (address: CC BY; words: no commercial use)",
        "    address: https://creativecommons.org/licenses/by/4.0/",
        "    words: No commercial use.",
        "    accepted with --license noncommercial or all",
        "  figure 1 (id F1, Figura 1)",
        "    caption of the group, pt, followed by the English version: Both.",
        "    caption, pt, followed by the English version: Corte. Section.",
        "    image 1: f",
        "    f.tif: TIFF of mode CMYK, 1200 x 800 pixels; encoded as RGB JPEG of 576 x 384 pixels: "
        "pair f1: Both. Corte. Section.",
        "  figure 2 (id F2)",
        "    caption, pt: Mapa.",
        "    image 1: g.jp2",
        "    image 2: h",
        "    g.jp2: rejected: image in a format that is not read: JPEG 2000",
        "    h: rejected: image missing",
        "  loose: rejected: outside a figure: body",
    ]
    refused = lines_of(tmp_path / "a/x.nxml", license="commercial")
    reason = "licence not commercial: CC BY-NC (address: CC BY; words: no commercial use)"
    assert refused[-1] == f"  x.nxml: rejected: {reason}"


def test_check_of_images_says_how_they_are_converted(tmp_path):
    write_files(
        tmp_path, {"a.jpg": noise_image(1), "b": red_image("PNG"), "c.avif": b"\x00\x00\x00\x20ftypavif", "d": b""}
    )
    assert [line for name in ["a.jpg", "b", "c.avif", "d"] for line in lines_of(tmp_path / name)] == [
        "a.jpg: JPEG of mode RGB, 64 x 48 pixels; its bytes are kept",
        "b: PNG of mode RGB, 32 x 24 pixels; encoded as RGB JPEG of 32 x 24 pixels",
        "c.avif: rejected: image in a format that is not read: AVIF",
        "d: rejected: not an image of a known format",
    ]


def test_check_of_folders_packages_and_mirrors_names_every_input(tmp_path, bucket):
    root = write_articles(tmp_path / "in", 1, num_figures=1)
    write_files(root, {os.fsdecode(b"bad/\xff.xml"): b"<article>", "zips/a.zip": b""})
    write_tar(root / "p.tar", {"x.nxml": article_xml(("f", "in a tar"), number=5), "f.jpg": noise_image(3)}, "w")
    lines = lines_of(root)
    assert "1/x.nxml: PMC1, 1 figures: no title" in lines
    assert "p.tar/x.nxml: PMC5, 1 figures: no title" in lines
    assert "zips/a.zip: rejected: archive of a format that is not read; make a tar of it" in lines
    assert any(line.startswith("  bad/\\xff.xml: rejected: broken XML") for line in lines)
    assert lines_of(root / "p.tar")[0] == "p.tar/x.nxml: PMC5, 1 figures: no title"
    (tmp_path / "cut.tar").write_bytes(b"x" * 2000)
    assert lines_of(tmp_path / "cut.tar")[0].startswith("cut.tar: rejected: broken archive")
    (tmp_path / "empty").mkdir()
    assert lines_of(tmp_path / "empty") == [f"{tmp_path}/empty: rejected: no article in the folder"]
    bucket.put_article(3, license_code="CC BY-NC")
    for key, data in bucket.objects.items():
        write_files(tmp_path / "mirror", {key: data})
    mirror = lines_of(tmp_path / "mirror")
    assert mirror[:2] == ["PMC3.1/PMC3.1.xml: PMC3, 2 figures: no title", "  licence: CC BY-NC"]
    assert json.dumps(mirror)


def test_check_command_prints_and_refuses_a_missing_path(tmp_path, capsys):
    write_files(tmp_path / "a", FILES)
    assert main(["ingest", "check", str(tmp_path / "a/x.nxml"), "--license", "commercial"]) == 0
    assert "rejected: licence not commercial" in capsys.readouterr().out
    with pytest.raises(UserError, match="no such file"):
        run(CheckConfig((tmp_path / "nowhere",)))
