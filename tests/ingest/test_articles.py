"""Packages of articles. Unusable, hostile and oversized files become rejects with a reason."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
import tarfile

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
from ingest_runs import ENVIRONMENT, run_build
from PIL import Image

from bclip_fast.ingest import articles, discovery, tar_archives
from bclip_fast.ingest.build import build
from bclip_fast.ingest.config import IngestConfig


def symbolic_link(name: str, target: str) -> tarfile.TarInfo:
    link = tarfile.TarInfo(name)
    link.type, link.linkname = tarfile.SYMTYPE, target
    return link


def test_packages_unusable_members_and_archives_become_rejects(tmp_path):
    good = {"PMC1/x.nxml": article_xml(("f", "from a package"), number=1), "PMC1/f.jpg": red_image()}
    random_bytes = os.urandom(50_000)
    root = tmp_path / "in"
    write_tar(root / "1_good.tar.gz", good)
    plain = {"./x.xml": article_xml(("f", "plain"), number=2), "./f.png": red_image("PNG")}
    write_tar(root / "2_plain.tar", plain, "w")
    cut = {"x.nxml": article_xml(("f", "cut"), number=3), "f.jpg": red_image(), "z.pdf": random_bytes}
    write_tar(root / "3_cut.tar.gz", cut)
    os.truncate(root / "3_cut.tar.gz", 30_000)
    write_tar(root / "4_cut.tar", cut, "w")
    os.truncate(root / "4_cut.tar", 512 * 3)
    (root / "5_not.tgz").write_bytes(random_bytes)
    device, outside = tarfile.TarInfo("g.jpg"), tarfile.TarInfo("../../evil.jpg")
    device.type = tarfile.CHRTYPE
    outside.size = 10
    odd = article_xml(("f", "link"), ("g", "device"), ("evil", "outside"), ("h", "good"), number=6)
    extra = (symbolic_link("f.jpg", "/etc/hostname"), device, outside)
    write_tar(root / "6_odd.tar.gz", {"x.nxml": odd, "h.jpg": red_image()}, extra=extra)
    write_tar(root / "7_none.tar", {"f.jpg": red_image()}, "w")
    captions, rejects = run_build(root, tmp_path / "out")
    assert captions == {"PMC1_f1": "from a package", "PMC2_f1": "plain", "PMC6_f4": "good"}
    assert [(figure, file, reason.partition(":")[0]) for figure, file, reason in rejects] == [
        ("", "3_cut.tar.gz", "broken archive"),
        ("", "4_cut.tar", "broken archive"),
        ("", "5_not.tgz", "broken archive"),
        ("F1", "f", "image missing"),
        ("F2", "g", "image missing"),
        ("F3", "evil", "image missing"),
        ("", "6_odd.tar.gz/f.jpg", "not a regular file"),
        ("", "6_odd.tar.gz/g.jpg", "not a regular file"),
        ("", "6_odd.tar.gz/../../evil.jpg", "unsafe name in an archive"),
        ("", "7_none.tar", "no article in the package"),
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_truncated_tar_at_any_length_gives_no_pair(tmp_path):
    root = tmp_path / "in"
    write_files(root, {"0.nxml": article_xml(("g", "other"), number=9), "g.jpg": red_image()})
    write_tar(root / "x.tar", {"a.nxml": article_xml(("f", "cut"), number=1), "f.jpg": red_image()}, "w")
    complete = (root / "x.tar").read_bytes()
    for length in range(0, 512 * 6, 256):
        (root / "x.tar").write_bytes(complete[:length])
        captions, rejects = run_build(root, tmp_path / f"out{length}")
        assert list(captions) == ["PMC9_f1"]
        assert [row[1] for row in rejects] == ["x.tar"]


def test_archives_over_the_limits_become_rejects(tmp_path, monkeypatch):
    monkeypatch.setattr(articles, "MAX_IMAGE_BYTES", 1 << 20)
    monkeypatch.setattr(tar_archives, "MAX_IMAGE_BYTES", 1 << 20)
    monkeypatch.setattr(tar_archives, "MAX_ARCHIVE_BYTES", 64 << 20)
    root = tmp_path / "in"
    xml = article_xml(("f", "too large an image"), ("g", "good"), number=1)
    write_tar(root / "a.tar.gz", {"x.nxml": xml, "f.jpg": bytes(2 << 20), "g.jpg": red_image()})
    # A decompression bomb, and an archive whose header claims more bytes than it has.
    huge = tarfile.TarInfo("video.mp4")
    huge.size = 1 << 30
    for name, megabytes in (("b.tar.gz", 65), ("b2.tar.gz", 1)):
        with gzip.open(root / name, "wb", 1) as file:
            file.write(huge.tobuf())
            for _ in range(megabytes):
                file.write(bytes(1 << 20))
    header = tarfile.TarInfo("long")
    header.type, header.size = tarfile.XHDTYPE, 8 << 30
    (root / "c.tar").write_bytes(header.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    captions, rejects = run_build(root, tmp_path / "out")
    assert captions == {"PMC1_f2": "good"}
    assert rejects == [
        ("F1", "f.jpg", "larger than 1 MiB"),
        ("", "b.tar.gz", "archive larger than 0 GiB"),
        ("", "b2.tar.gz", "broken archive: truncated"),
        ("", "c.tar", "broken archive: a header claims too many bytes"),
    ]


def test_broken_repeated_and_linked_articles_become_rejects(tmp_path):
    root = tmp_path / "in"
    (tmp_path / "secret.jpg").write_bytes(red_image())
    write_files(
        root,
        {
            "a/1.nxml": article_xml(("f", "first"), number=1),
            "a/f.jpg": red_image(),
            "b/1.nxml": article_xml(("f", "again"), number=1),
            "b/f.jpg": red_image(),
            "c/broken.nxml": b"<article><body>",
            "d/other.xml": b"<html/>",
            "e/link.nxml": article_xml(("s", "link"), number=2),
        },
    )
    (root / "e/s.jpg").symlink_to(tmp_path / "secret.jpg")
    (root / "e/out.xml").symlink_to("/etc/hostname")
    os.mkfifo(root / "e/pipe.xml")
    captions, rejects = run_build(root, tmp_path / "out")
    assert captions == {"PMC1_f1": "first"}
    assert sorted((figure, file, reason.partition(":")[0]) for figure, file, reason in rejects) == [
        ("", "b/1.nxml", "repeated article"),
        ("", "c/broken.nxml", "broken XML"),
        ("", "d/other.xml", "not a JATS article"),
        ("", "e/out.xml", "link out of the source folder"),
        ("", "e/pipe.xml", "not a regular file"),
        ("F1", "s.jpg", "link out of the source folder"),
    ]


def test_large_plain_archive_becomes_several_units_of_work(tmp_path, monkeypatch):
    monkeypatch.setattr(discovery, "XMLS_PER_UNIT", 4)
    monkeypatch.setattr(tar_archives, "XMLS_PER_UNIT", 4)
    loose = write_articles(tmp_path / "loose", 10)
    files = {f"{path.parent.name}/{path.name}": path.read_bytes() for path in sorted(loose.glob("*/*"))}
    write_tar(tmp_path / "bulk/all.tar", files, "w")
    write_tar(tmp_path / "zipped/all.tar.gz", files)
    assert [package.first for package in discovery.discover(tmp_path / "bulk")] == [0, 4, 8]
    assert len(list(discovery.discover(tmp_path / "zipped"))) == 1
    for name in ("loose", "bulk", "zipped"):
        build(IngestConfig(str(tmp_path / name), tmp_path / f"out-{name}", workers=1, test_fraction=0.2))
    rows = [manifest_rows(tmp_path / f"out-{name}") for name in ("loose", "bulk", "zipped")]
    assert rows[0] == rows[1] == rows[2]
    assert len(rows[0]) == 20


HOSTILE_BUILD = """
import sys, time
from pathlib import Path
from bclip_fast.ingest.build import build
from bclip_fast.ingest.config import IngestConfig
start = time.process_time()
build(IngestConfig(sys.argv[1], Path(sys.argv[2]), workers=1, val_fraction=0, test_fraction=0))
print(time.process_time() - start)
print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))
"""


def test_hostile_articles_become_rejects_in_bounded_memory_and_time(tmp_path):
    root = tmp_path / "in"
    entities = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 12))
    xmls = {
        "bomb": f'<!DOCTYPE article [<!ENTITY l0 "ha">{entities}]><article><p>&l11;</p></article>'.encode(),
        "external": b'<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><article>&x;</article>',
        "nested": b"<article>" + b"<p>" * 10_000_000,
    }
    write_files(root, {f"{name}/x.nxml": data for name, data in xmls.items()})
    with (root / "nested/y.nxml").open("wb") as file:  # a sparse file of 1 GiB
        file.write(b"<article>" + b"<p>" * 1_000_000)
        file.truncate(1 << 30)
    figures = [("../../../etc/passwd", "out"), ("html", "page"), ("link", "link"), ("large", "bomb"), ("ok", "good")]
    bomb = encode_image(Image.new("1", (20_000, 20_000)), "PNG")
    files = {"html.jpg": b"<html>404</html>", "ok.jpg": noise_image(1), "large.png": bomb}
    write_files(root / "odd", {"x.nxml": article_xml(*figures, number=1), **files})
    (root / "odd/link.jpg").symlink_to("/etc/passwd")
    extra = (tarfile.TarInfo("../../../tmp/evil.nxml"), symbolic_link("evil.jpg", "/etc/passwd"))
    write_tar(root / "t.tar", {"a/x.nxml": article_xml(("evil", "t"), number=2)}, "w", extra=extra)
    command = [sys.executable, "-c", HOSTILE_BUILD, str(root), str(tmp_path / "out")]
    process = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:]
    seconds, kilobytes = map(float, process.stdout.split())
    assert seconds < 60
    assert kilobytes < 1 << 20
    assert list(manifest_rows(tmp_path / "out")) == ["PMC1_f5"]
    rejects = reject_rows(tmp_path / "out")
    reasons = {figure or file: reason for _, figure, file, reason in rejects}
    assert reasons["bomb/x.nxml"] == reasons["external/x.nxml"] == "declares entities of its own"
    assert reasons["nested/x.nxml"] == "more than 2000000 tags"
    assert reasons["nested/y.nxml"] == "larger than 32 MiB"
    assert reasons["t.tar/../../../tmp/evil.nxml"] == "unsafe name in an archive"
    assert reasons["t.tar/evil.jpg"] == "not a regular file"
    assert [reason for article, _, _, reason in rejects if article == "PMC1"] == [
        "unsafe href",
        "image in a format that is not read: HTML",
        "link out of the source folder",
        "image of too many pixels",
    ]


@pytest.mark.parametrize(
    ("image_names", "expected"),
    [
        (["a/f.jpg", "a/sub/g.jpg", "b/h.jpg", "top.jpg"], {"a/": ["f.jpg", "sub/g.jpg"], "b/": ["h.jpg"]}),
        (["c/f.jpg"], {"a/": [], "b/": []}),
    ],
)
def test_assign_images_nearest_folder_with_xml_gets_them(image_names, expected):
    assert articles.assign_images(["a/x.nxml", "b/y.nxml"], image_names) == expected
