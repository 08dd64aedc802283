"""Every input is read, or named with its reason, and the rest goes on: names, suffixes, links, archives, versions."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest
from articles import (
    article_xml,
    encode_image,
    manifest_rows,
    noise_image,
    red_image,
    reject_rows,
    write_articles,
    write_files,
    write_tar,
)
from ingest_runs import run_build
from PIL import Image

from bclip_fast.ingest import extract
from bclip_fast.ingest.build import build
from bclip_fast.ingest.config import IngestConfig
from bclip_fast.ingest.discovery import discover
from bclip_fast.ingest.image_formats import may_be_image
from bclip_fast.ingest.image_names import ImageNames
from bclip_fast.io.file_names import comparable, printable

ODD = os.fsdecode(b"f\xff.jpg")


def test_names_that_are_not_utf8_are_read_in_folders_and_archives(tmp_path):
    folder = tmp_path / "in" / os.fsdecode(b"d\xff")
    xml = article_xml(("f\u00ff", "by its Latin-1 name"), ("g", "good"), ("h", "broken"), number=1)
    broken = os.fsdecode(b"H\xfe")
    files = {os.fsdecode(b"x\xff.nxml"): xml, ODD: noise_image(1), "g.jpg": noise_image(2), broken: b"x"}
    write_files(folder, files)
    write_files(tmp_path / "in/other", {os.fsdecode(b"y\xff.xml"): b"<html/>", os.fsdecode(b"z\xff.zip"): b""})
    write_files(tmp_path / "in/zips", {os.fsdecode(b"z\xff.zip"): b""})
    write_tar(tmp_path / "in" / os.fsdecode(b"p\xff.tar"), {"a/" + name: data for name, data in files.items()}, "w")
    inner = article_xml(("f\u00ff", "in an archive"), number=2)
    write_tar(tmp_path / "in/q.tar.gz", {os.fsdecode(b"x\xff.nxml"): inner, ODD: noise_image(3)})
    captions, rejects = run_build(tmp_path / "in", tmp_path / "out")
    assert captions == {"PMC1_f1": "by its Latin-1 name", "PMC1_f2": "good", "PMC2_f1": "in an archive"}
    assert manifest_rows(tmp_path / "out")["PMC1_f1"]["file"] == "f\\xff.jpg"
    assert sorted((file, reason.partition(":")[0]) for _, file, reason in rejects) == [
        ("d\\xff/x\\xff.nxml", "repeated article"),
        ("h", "image missing"),
        ("h", "image missing"),
        ("other/y\\xff.xml", "not a JATS article"),
        ("zips/z\\xff.zip", "archive of a format that is not read; make a tar of it"),
    ]


@pytest.mark.parametrize(
    "name", [b"a.jpg", b"\xff", "caf\u00e9".encode(), "caf\u00e9".encode("latin-1"), b"\xc3\xff\xa9"]
)
def test_printable_name_is_text_and_comparable_finds_latin1(name):
    decoded = os.fsdecode(name)
    assert printable(decoded).encode()
    assert ("\\x" in printable(decoded)) == (name not in (b"a.jpg", "caf\u00e9".encode()))
    assert comparable(os.fsdecode("caf\u00e9".encode("latin-1"))) == comparable("cafe\u0301") == "caf\u00e9"


JP2 = b"\x00\x00\x00\x0cjP  \r\n\x87\n"
FOREIGN = {
    "a.jp2": (JP2, "JPEG 2000"),
    "b.avif": (b"\x00\x00\x00\x20ftypavif", "AVIF"),
    "c.heic": (b"\x00\x00\x00\x18ftypheic", "HEIC"),
    "d.svg": (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
    "e.eps": (b"%!PS-Adobe-3.0 EPSF-3.0", "PostScript"),
    "f.jxl": (b"\xff\x0a\x00", "JPEG XL"),
    "g.jpg": (b"%PDF-1.4", "PDF"),
    "h.emf": (b"\x01\x00\x00\x00" + bytes(36) + b" EMF", "EMF"),
    "i.psd": (b"8BPS\x00\x01", "Photoshop"),
    "j.tif": (JP2, "JPEG 2000"),
}


def test_content_decides_the_format_and_the_reason_names_it(tmp_path):
    own = {
        "k.jfif": ("JPEG", 1), "l.JPE": ("JPEG", 2), "m": ("JPEG", 3), "n.1.g001": ("JPEG", 4), "o.jp2": ("JPEG", 5),
        "p.gif": ("PNG", 6), "q.dib": ("BMP", 7),
    }  # fmt: skip
    files = {name: data for name, (data, _) in FOREIGN.items()}
    for name, (kind, seed) in own.items():
        files[name] = encode_image(Image.open(io.BytesIO(noise_image(seed))), kind)
    hrefs = [*FOREIGN, *own]
    xml = article_xml(*((href, f"figure of {href}") for href in hrefs), ("data", "no image"), number=1)
    write_files(tmp_path / "in", {"x.nxml": xml, **files, "data.csv": b"1,2", "film.mp4": b"x"})
    captions, rejects = run_build(tmp_path / "in", tmp_path / "out")
    assert list(captions.values()) == [f"figure of {name}" for name in own]
    expected = [(name, f"image in a format that is not read: {kind}") for name, (_, kind) in FOREIGN.items()]
    assert [row[1:] for row in rejects] == [*expected, ("data", "image missing")]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a/b.jpg", True), ("a.b/c", True), ("x.g001", True), ("x.12", True), ("x.JP2", True), ("x.mp4", False),
     ("x.csv", False), ("x.pdf", False), ("x.s001", False), (".jpg", False)],
)  # fmt: skip
def test_names_that_may_be_images(name, expected):
    assert may_be_image(name) == expected


def image_of(width: int, height: int, kind: str) -> bytes:
    return encode_image(Image.open(io.BytesIO(noise_image(9))).resize((width, height)), kind)


@pytest.mark.parametrize(
    ("files", "chosen"),
    [
        ({"a.tif": (80, 60), "b.png": (80, 60), "c.jpg": (26, 14)}, "b.png"),
        ({"a.jpg": (80, 60), "a.gif": (26, 14)}, "a.jpg"),
        ({"a.jpg": (26, 14), "a.tif": (80, 60)}, "a.tif"),
        ({"a.jpg": (79, 59), "a.tif": (80, 60)}, "a.jpg"),
        ({"a.jpg": (26, 14), "a.tif": None, "b.gif": (40, 30)}, "b.gif"),
        ({"a.jpg": None, "a.tif": (80, 60)}, "a.tif"),
    ],
)
def test_largest_usable_version_of_an_image_is_taken(tmp_path, files, chosen):
    kinds = {"tif": "TIFF", "jpg": "JPEG", "png": "PNG", "gif": "GIF"}
    # None: a file with a good header, and truncated pixels.
    data = {
        name: image_of(*(size or (400, 300)), kinds[name[2:]])[: None if size else 300] for name, size in files.items()
    }
    hrefs = "".join(f'<graphic xlink:href="{name[0]}"/>' for name in sorted({name[0]: name for name in files}))
    xml = article_xml(("a", "Kidney."), number=1).replace(
        b'<graphic xlink:href="a"/>', f"<alternatives>{hrefs}</alternatives>".encode()
    )
    write_files(tmp_path / "in", {"x.nxml": xml, **data})
    captions, rejects = run_build(tmp_path / "in", tmp_path / "out", max_short_side=16)
    assert (list(captions.values()), rejects) == (["Kidney."], [])
    assert manifest_rows(tmp_path / "out")["PMC1_f1"]["file"] == chosen


def test_find_all_returns_thumbnails_last_and_formats_not_read_behind():
    names = ImageNames(["a.jp2", "a.tif", "a.jpg", "t.jpg", "a"])
    assert names.find_all(["t", "a"], thumbnails=["t"]) == ["a.jpg", "a.tif", "a", "a.jp2", "t.jpg"]


def test_links_archives_and_images_that_are_not_read_are_named(tmp_path):
    root = write_articles(tmp_path / "in", 2, num_figures=1)
    outside = write_articles(tmp_path / "outside", 1, num_figures=1)
    (root / "linked").symlink_to(outside)
    (root / "again").symlink_to(root / "1")
    (root / "nowhere").symlink_to(tmp_path / "missing")
    write_files(root, {"packed/a.zip": b"", "packed/b.tar.bz2": b"", "packed/x.nxml.gz": b"", "1/supplement.zip": b""})
    write_files(root, {"images/a.jpg": red_image(), "images/b.png": red_image(), "1/sub/c.jpg": red_image()})
    write_tar(
        root / "t/bundle.tar", {"p.tar.gz": b"", "a/x.nxml": article_xml(("f", "t"), number=7), "a/s.zip": b""}, "w"
    )
    captions, rejects = run_build(root, tmp_path / "out")
    assert list(captions) == ["PMC1_f1", "PMC2_f1"]
    assert sorted(row[1:] for row in rejects) == [
        ("again", "link to a folder: the source has it as 1"),
        ("f", "image missing"),
        ("images", "images without an article: 2 files"),
        ("linked", "link to a folder: not followed; give its target as another source"),
        ("packed/a.zip", "archive of a format that is not read; make a tar of it"),
        ("packed/b.tar.bz2", "archive of a format that is not read; make a tar of it"),
        ("packed/x.nxml.gz", "archive of a format that is not read; make a tar of it"),
        ("t/bundle.tar/p.tar.gz", "archive inside an archive: not read"),
    ]


def test_hidden_files_of_folders_and_archives_are_left_out_and_counted(tmp_path, caplog):
    root = tmp_path / ".data"  # the root itself may be hidden
    article = {"x.nxml": article_xml(("f", "seen"), number=1), "f.jpg": noise_image(1)}
    hidden = {f".ipynb_checkpoints/{name}": data for name, data in article.items()}
    hidden |= {f"sub/@eaDir/{name}": data for name, data in article.items()}
    hidden |= {"._x.nxml": b"Mac OS X", "Thumbs.db": b"", ".trash/old.zip": b""}
    write_files(root / "1", article | hidden)
    packed = {"a/x.nxml": article_xml(("f", "packed"), number=2), "a/f.jpg": noise_image(2), "a/._f.jpg": b"Mac OS X"}
    for name, mode in (("t.tar", "w"), ("u.tar.gz", "w:gz")):
        write_tar(root / name, {"._x.nxml": b"Mac OS X", "__MACOSX/a/x.nxml": b"", **packed}, mode)
    with caplog.at_level("INFO"):
        packages = list(discover(root))
    assert [(package.kind, package.name, package.items, package.first) for package in packages] == [
        ("archive", "t.tar", (), 0),
        ("archive", "u.tar.gz", (), -1),
        ("folder", "1", ("1/x.nxml",), 0),
    ]
    assert "left out 5 hidden files and folders: 1/._x.nxml" in caplog.text
    (root / "u.tar.gz").unlink()
    captions, rejects = run_build(root, tmp_path / "out")
    assert captions == {"PMC1_f1": "seen", "PMC2_f1": "packed"}
    assert rejects == [("", "t.tar", "hidden files left out: 3")]


def test_hard_links_in_an_archive_are_read(tmp_path):
    link = tarfile.TarInfo("b/g.jpg")
    link.type, link.linkname = tarfile.LNKTYPE, "a/f.jpg"
    path = tmp_path / "in/p.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        for name, data in {"a/f.jpg": noise_image(1), "b/x.nxml": article_xml(("g", "linked"), number=1)}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        tar.addfile(link)
    assert run_build(tmp_path / "in", tmp_path / "out") == ({"PMC1_f1": "linked"}, [])


def test_set_of_articles_gives_pairs_and_names_missing_articles(tmp_path):
    first, second = (article_xml((f"g{number}", f"Of {number}."), number=number) for number in (1, 2))
    anonymous = article_xml(("g1", "Without id."))
    broken = article_xml(*[("g", "x")] * 2001, number=4)
    reply = b'<Reply Id="3" error="not available"/>'
    files = {"g1.jpg": noise_image(1), "g2.jpg": noise_image(2)}
    content = b"<pmc-articleset>" + first + reply + anonymous + broken + second + b"</pmc-articleset>"
    write_files(tmp_path / "in", {"set.xml": content, **files})
    captions, rejects = run_build(tmp_path / "in", tmp_path / "out")
    assert sorted(captions.values()) == ["Of 1.", "Of 2.", "Without id."]
    assert rejects == [
        ("", "set.xml", "article missing in the set: 3 not available"),
        ("", "set.xml#3", "more than 2000 figures"),
    ]


def test_fault_of_this_program_in_one_article_leaves_the_others(tmp_path, monkeypatch):
    real = extract.read_article

    def read_article(element):
        article = real(element)
        if article.pmcid == "PMC2":
            raise KeyError("tag")
        return article

    monkeypatch.setattr(extract, "read_article", read_article)
    captions, rejects = run_build(write_articles(tmp_path / "in", 3, num_figures=1), tmp_path / "out")
    assert list(captions) == ["PMC1_f1", "PMC3_f1"]
    assert rejects == [("", "2/x.nxml", "internal error: KeyError 'tag'")]


def test_error_of_a_build_without_pairs_names_the_first_reject(tmp_path):
    write_files(tmp_path / "in", {"x.nxml": article_xml(("f", "no image"), number=1)})
    with pytest.raises(ValueError, match=r"rejects: 1 image missing \(the first: f: image missing\)$"):
        build(IngestConfig(str(tmp_path / "in"), tmp_path / "out", workers=1))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list every folder")
def test_folder_that_cannot_be_listed_is_named(tmp_path):
    root = write_articles(tmp_path / "in", 2, num_figures=1)
    Path(root, "2").chmod(0)
    try:
        build(IngestConfig(str(root), tmp_path / "out", workers=1))
    finally:
        Path(root, "2").chmod(0o755)
    assert [row[2:] for row in reject_rows(tmp_path / "out")] == [("2", "folder cannot be listed: Permission denied")]
