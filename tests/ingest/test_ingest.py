"""From articles on disk to shards: pairing, rejects with their reasons, hostile packages, the same bytes every time."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from bclip_fast.config import parse, to_toml
from bclip_fast.data.shards.verify import verify
from bclip_fast.errors import UserError
from bclip_fast.ingest import articles as source
from bclip_fast.ingest import build as ingest
from bclip_fast.ingest.articles import SourceError
from bclip_fast.ingest.assign import Splits
from bclip_fast.ingest.build import IngestConfig, build
from bclip_fast.ingest.image_names import ImageNames


def image(colour: str = "red", kind: str = "JPEG", size: tuple[int, int] = (32, 24)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, kind)
    return buffer.getvalue()


def noise(seed: int, size: tuple[int, int] = (64, 48)) -> bytes:
    """An image that resembles no other."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (24, 32, 3), np.uint8)
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def article(*figures: tuple[str, str], number: int | None = None) -> bytes:
    """An article with figures (href, caption)."""
    identity = f'<article-id pub-id-type="pmc">{number}</article-id>' if number else ""
    body = "".join(
        f'<fig id="F{i}"><label>Figure {i}</label>{f"<caption><p>{text}</p></caption>" if text else ""}'
        f'<graphic xlink:href="{href}"/></fig>'
        for i, (href, text) in enumerate(figures, 1)
    )
    return (
        f'<article xmlns:xlink="http://www.w3.org/1999/xlink"><front><article-meta>{identity}</article-meta></front>'
        f"<body>{body}</body></article>"
    ).encode()


def put(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def pack(path: Path, files: dict[str, bytes], mode: str = "w:gz", extra: tuple[tarfile.TarInfo, ...] = ()) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for info in extra:
            tar.addfile(info, io.BytesIO(bytes(info.size)) if info.isreg() else None)
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def run(articles: Path, out: Path, **options) -> tuple[dict[str, str], list[tuple[str, str, str]]]:
    """Caption by key, and (figure, file, reason) of the rejects."""
    options = {"workers": 1, "val_fraction": 0.0, "test_fraction": 0.0, **options}
    build(IngestConfig(str(articles), out, **options))
    assert verify(out) == []
    rows = pq.read_table(out / "manifest.parquet").to_pylist()
    # Shards are shuffled: by article (as they were found: those of a package number its ids), figure, graphic.
    captions = {row["key"]: row["caption"] for row in sorted(rows, key=place_of)}
    rejects = pq.read_table(out / "rejects.parquet").to_pylist()
    return captions, [(row["figure"], row["file"], row["reason"]) for row in rejects]


def place_of(row: dict) -> tuple:
    return [int(part) for part in re.findall(r"\d+", row["key"].split("_", 1)[0])][:1], row["figure_number"], row["key"]


def test_figures_find_their_images(tmp_path):
    put(
        tmp_path / "in/a",
        {
            "x.nxml": article(
                ("plain", "without suffix"), ("with.tif", "other suffix"), ("EXACT.PNG", "other case"),
                ("info:doi/10.1/journal.pone.1.g001", "address"), ("sub/deep", "subfolder"), ("space%20d", "escaped"),
                ("missing", "no file"), ("plain", ""), ("../b/other", "elsewhere"), ("/etc/hostname", "absolute"),
                ("broken", "bad image"), number=5,
            ),
            "plain.jpg": image(), "plain.gif": image(kind="GIF"), "with.jpg": image(), "exact.png": image(kind="PNG"),
            "pone.1.g001.tif": image(kind="TIFF"), "sub/deep.jpg": image(), "space d.jpg": image(),
            "broken.jpg": b"<html>", "other.jpg": image(),
        },
    )  # fmt: skip
    put(tmp_path / "in/b", {"y.xml": article(("other", "its own")), "other.jpg": image()})
    captions, rejects = run(tmp_path / "in", tmp_path / "out")
    second = [key for key in captions if not key.startswith("PMC5")]
    assert captions == {
        "PMC5_f1": "without suffix", "PMC5_f2": "other suffix", "PMC5_f3": "other case", "PMC5_f4": "address",
        "PMC5_f5": "subfolder", "PMC5_f6": "escaped", second[0]: "its own",
    }  # fmt: skip
    assert rejects == [
        ("F7", "missing", "image missing"),
        ("F8", "plain", "no caption"),
        ("F9", "../b/other", "unsafe href"),
        ("F10", "/etc/hostname", "unsafe href"),
        ("F11", "broken.jpg", "not an image of a known format"),
    ]
    rows = {row["key"]: row for row in pq.read_table(tmp_path / "out/manifest.parquet").to_pylist()}
    assert rows["PMC5_f1"]["file"] == "plain.jpg"  # the JPEG, not its thumbnail
    assert (rows["PMC5_f4"]["source_format"], rows["PMC5_f4"]["label"]) == ("TIFF", "Figure 4")


def test_several_graphics_are_pairs_and_versions_of_one_are_not(tmp_path):
    xml = b"""<article xmlns:xlink="http://www.w3.org/1999/xlink"><body><fig id="F"><caption><p>All.</p></caption>
      <graphic xlink:href="a"/><graphic xlink:href="b"><caption><p>Own.</p></caption></graphic>
      <graphic xlink:href="a.tif"/><graphic xlink:href="c"/>
      <alternatives><graphic xlink:href="d.gif"/><graphic xlink:href="d2.png"/></alternatives></fig>
      <fig id="G"><caption><p>None.</p></caption></fig>
      <supplementary-material><fig id="S"><caption><p>S</p></caption><graphic xlink:href="a"/></fig>
      </supplementary-material></body></article>"""
    files = {
        "a.jpg": image(),
        "a.tif": image(kind="TIFF"),
        "b.jpg": image(),
        "d.gif": image(kind="GIF"),
        "d2.png": image(kind="PNG"),
    }
    put(tmp_path / "in", {"x.xml": xml, **files})
    captions, rejects = run(tmp_path / "in", tmp_path / "out")
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
    files = {row["file"] for row in pq.read_table(tmp_path / "out/manifest.parquet").to_pylist()}
    assert files == {"a.jpg", "b.jpg", "d2.png"}


@pytest.mark.parametrize(
    "names, href, expected",
    [
        (["a/x.jpg", "b/x.jpg"], "a/x", "a/x.jpg"),
        (["a/x.jpg", "b/x.jpg"], "x", "ambiguous href"),
        (["x.jpg", "b/x.jpg"], "x", "x.jpg"),
        (["x.jpg", "X.jpg"], "X.tif", "X.jpg"),
        (["xy.jpg", "xY.jpg"], "XY", "ambiguous href"),
        (["x.1.jpg", "x.10.jpg"], "x.1", "x.1.jpg"),
        (["x.tif.jpg"], "x.tif", "x.tif.jpg"),
        (["x.jpg"], "http://example.org/../x", "x.jpg"),
        (["x.jpg"], "..\\x", "unsafe href"),
        (["x.jpg"], "%2e%2e/x", "unsafe href"),
        (["x.jpg"], "./x.gif", "x.jpg"),
        (["x.jpg"], "", "image missing"),
        (["x.jpg"], ".jpg", "image missing"),
        ([], "x", "image missing"),
    ],
)
def test_href_resolution(names, href, expected):
    try:
        found = ImageNames(names).find([href])
    except SourceError as error:
        found = str(error)
    assert found == expected


def test_packages_are_read_in_place_and_bad_ones_are_recorded(tmp_path):
    good = {"PMC1/x.nxml": article(("f", "from a package"), number=1), "PMC1/f.jpg": image()}
    noise = os.urandom(50_000)
    root = tmp_path / "in"
    pack(root / "1_good.tar.gz", good)
    pack(root / "2_plain.tar", {"./x.xml": article(("f", "plain"), number=2), "./f.png": image(kind="PNG")}, "w")
    pack(root / "3_cut.tar.gz", {"x.nxml": article(("f", "cut"), number=3), "f.jpg": image(), "z.pdf": noise})
    os.truncate(root / "3_cut.tar.gz", 30_000)
    pack(root / "4_cut.tar", {"x.nxml": article(("f", "cut"), number=4), "f.jpg": image(), "z.pdf": noise}, "w")
    os.truncate(root / "4_cut.tar", 512 * 3)
    (root / "5_not.tgz").write_bytes(noise)
    link, device = tarfile.TarInfo("f.jpg"), tarfile.TarInfo("g.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
    device.type = tarfile.CHRTYPE
    outside = tarfile.TarInfo("../../evil.jpg")
    outside.size = 10
    odd = article(("f", "link"), ("g", "device"), ("evil", "outside"), ("h", "good"), number=6)
    pack(root / "6_odd.tar.gz", {"x.nxml": odd, "h.jpg": image()}, extra=(link, device, outside))
    pack(root / "7_none.tar", {"f.jpg": image()}, "w")
    captions, rejects = run(root, tmp_path / "out")
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


def test_every_cut_of_a_package_is_noticed(tmp_path):
    """A tar that ends anywhere, between two files too, gives no pair of it."""
    root = tmp_path / "in"
    put(root, {"0.nxml": article(("g", "other"), number=9), "g.jpg": image()})
    pack(root / "x.tar", {"a.nxml": article(("f", "cut"), number=1), "f.jpg": image()}, "w")
    whole = (root / "x.tar").read_bytes()
    for length in range(0, 512 * 6, 256):
        (root / "x.tar").write_bytes(whole[:length])
        captions, rejects = run(root, tmp_path / f"out{length}")
        assert list(captions) == ["PMC9_f1"] and [row[1] for row in rejects] == ["x.tar"]


def test_limits_of_packages(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "MAX_IMAGE_BYTES", 1 << 20)
    monkeypatch.setattr(source, "MAX_ARCHIVE_BYTES", 64 << 20)
    root = tmp_path / "in"
    xml = article(("f", "too large an image"), ("g", "good"), number=1)
    pack(root / "a.tar.gz", {"x.nxml": xml, "f.jpg": bytes(2 << 20), "g.jpg": image()})
    # A bomb, and an archive whose header claims what isn't there.
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
    captions, rejects = run(root, tmp_path / "out")
    assert captions == {"PMC1_f2": "good"}
    assert rejects == [
        ("F1", "f.jpg", "larger than 1 MiB"),
        ("", "b.tar.gz", "archive larger than 0 GiB"),
        ("", "b2.tar.gz", "broken archive: truncated"),
        ("", "c.tar", "broken archive: a header claims too many bytes"),
    ]


def test_broken_articles_links_and_repetitions_are_recorded(tmp_path):
    root = tmp_path / "in"
    (tmp_path / "secret.jpg").write_bytes(image())
    put(
        root,
        {
            "a/1.nxml": article(("f", "first"), number=1),
            "a/f.jpg": image(),
            "b/1.nxml": article(("f", "again"), number=1),
            "b/f.jpg": image(),
            "c/broken.nxml": b"<article><body>",
            "d/other.xml": b"<html/>",
            "e/link.nxml": article(("s", "link"), number=2),
        },
    )
    (root / "e/s.jpg").symlink_to(tmp_path / "secret.jpg")
    (root / "e/out.xml").symlink_to("/etc/hostname")
    os.mkfifo(root / "e/pipe.xml")
    captions, rejects = run(root, tmp_path / "out")
    assert captions == {"PMC1_f1": "first"}
    found = [(figure, file, reason.partition(":")[0]) for figure, file, reason in rejects]
    assert sorted(found) == [
        ("", "b/1.nxml", "repeated article"),
        ("", "c/broken.nxml", "broken XML"),
        ("", "d/other.xml", "not a JATS article"),
        ("", "e/out.xml", "link out of the source folder"),
        ("", "e/pipe.xml", "not a regular file"),
        ("F1", "s.jpg", "link out of the source folder"),
    ]


def test_the_split_is_of_the_article_and_of_stable_hash(tmp_path):
    splits = Splits(0, val_fraction=0.2, test_fraction=0.3)
    found = Counter(splits.of(f"PMC{i}") for i in range(5000))
    assert abs(found["val"] - 1000) < 100 and abs(found["test"] - 1500) < 100
    assert [splits.of(f"PMC{i}") for i in range(8)] == "train test test val test test test train".split()
    for i in range(12):
        figures = [(f"f{j}", f"text {j}") for j in range(3)]
        images = {f"f{j}.jpg": noise(3 * i + j) for j in range(3)}
        put(tmp_path / f"in/{i}", {"x.nxml": article(*figures, number=i + 1), **images})
    captions, _ = run(tmp_path / "in", tmp_path / "out", val_fraction=0.2, test_fraction=0.3)
    assert len(captions) == 36
    rows = pq.read_table(tmp_path / "out/manifest.parquet").to_pylist()
    splits = {(row["article"], row["split"]) for row in rows}
    assert len(splits) == 12 and {split for _, split in splits} == {"train", "val", "test"}


def test_a_crashing_worker_costs_its_package_only(tmp_path, monkeypatch):
    root = tmp_path / "in"
    for i in range(1, 7):
        put(root / str(i), {"x.nxml": article(("f", f"article {i}"), number=i), "f.jpg": image()})
    script = tmp_path / "crash.py"
    script.write_text(
        "import os, sys\n"
        "from pathlib import Path\n"
        "from bclip_fast.ingest import build, extract\n"
        "real = extract.process\n"
        "def process(package, options):\n"
        "    if package.name == '3':\n"
        "        os._exit(11)\n"
        "    return real(package, options)\n"
        "extract.process = process\n"
        "if __name__ == '__main__':\n"
        "    build.build(build.IngestConfig(sys.argv[1], Path(sys.argv[2]), workers=2))\n"
    )
    out = tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), str(tmp_path)])}
    done = subprocess.run(
        [sys.executable, str(script), str(root), str(out)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    keys = [row["key"] for row in pq.read_table(out / "manifest.parquet").to_pylist()]
    assert sorted(keys) == [f"PMC{i}_f1" for i in (1, 2, 4, 5, 6)]
    (reject,) = pq.read_table(out / "rejects.parquet").to_pylist()
    assert (reject["file"], reject["reason"]) == ("3/x.nxml", "crash while reading the package")


def test_errors_are_one_line_and_leave_nothing(tmp_path):
    put(tmp_path / "empty", {"readme.txt": b"x"})
    put(tmp_path / "none", {"x.nxml": article(("f", "no image"))})
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
    put(tmp_path / "none", {"f.jpg": image()})
    run(tmp_path / "none", tmp_path / "out")
    with pytest.raises(UserError, match="already holds"):
        run(tmp_path / "none", tmp_path / "out")
    run(tmp_path / "none", tmp_path / "out", overwrite=True)


def test_configuration_from_the_command_line_and_back(tmp_path):
    config = parse(IngestConfig, ["in", "-o", "out", "--max_short_side", "0"], prog="bclip ingest build")
    assert config == IngestConfig("in", Path("out"), max_short_side=0)
    assert "max_short_side = 0" in to_toml(config)
    for flags in (["--jpeg_quality", "0"], ["--val_fraction", "0.6", "--test_fraction", "0.5"], ["--workers", "-1"]):
        with pytest.raises(UserError, match="out of range"):
            parse(IngestConfig, ["in", "-o", "out", *flags], prog="bclip ingest build")


def test_tokens_are_counted_as_the_model_counts_them(shared_data):
    from bclip_fast.ingest.extract import _token_counter
    from bclip_fast.model.tokenizer import Tokenizer

    rows = (shared_data / "pmc_articles/pairs.jsonl").read_text().splitlines()[::2]
    captions = [json.loads(row)["caption"] for row in rows]
    for name in ("vocab.txt", "tokenizer.json"):
        path = shared_data / "vocab/pubmedbert" / name
        expected = [len(ids) for ids in Tokenizer.from_file(path, 4096).encode(captions)]
        assert [_token_counter(str(path))(caption) for caption in captions] == expected


def test_real_articles_every_figure_with_an_image_becomes_a_pair(shared_data, tmp_path, caplog):
    articles = shared_data / "pmc_articles"
    pairs = [json.loads(line) for line in (articles / "pairs.jsonl").read_text().splitlines()]
    options = {"max_short_side": 64, "val_fraction": 0.1, "test_fraction": 0.1}
    with caplog.at_level("INFO", logger=ingest.__name__):
        captions, rejects = run(articles, tmp_path / "one", **options)
    assert len(captions) == len(pairs) == 558
    assert Counter(reason for _, _, reason in rejects) == {"image missing": 68}
    assert "155 articles, 558 pairs" in caplog.text and "68 image missing" in caplog.text
    rows = pq.read_table(tmp_path / "one/manifest.parquet").to_pylist()
    assert Counter((row["figure"], row["file"]) for row in rows) == Counter(
        (pair["figure_id"], Path(pair["image"]).name) for pair in pairs
    )
    # Two processes and packages of a few articles each: not a byte differs.
    run(articles, tmp_path / "two", workers=2, **options)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "two").iterdir())
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
