"""Duplicates, splits and order; kills and engines that change no byte; memory that does not grow; hostile packages."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from test_ingest import article, noise, pack, put

from bclip_fast.data.shards.verify import verify
from bclip_fast.errors import UserError
from bclip_fast.ingest.assign import Splits
from bclip_fast.ingest.build import IngestConfig, build
from bclip_fast.ingest.duplicates import NEAR_BITS, near_pairs
from bclip_fast.ingest.parts import SPLITS
from bclip_fast.ingest.sanitize import perceptual_hash


def again(data: bytes, quality: int = 60, scale: float = 0.8) -> bytes:
    """The same picture in another file."""
    image = Image.open(io.BytesIO(data))
    size = round(image.width * scale), round(image.height * scale)
    buffer = io.BytesIO()
    image.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def articles_in(folder: Path, count: int, figures: int = 2) -> Path:
    for number in range(1, count + 1):
        texts = [(f"f{i}", f"Text {i} of {number}") for i in range(figures)]
        images = {f"f{i}.jpg": noise(100 * number + i) for i in range(figures)}
        put(folder / str(number), {"x.nxml": article(*texts, number=number), **images})
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def rows_of(out: Path) -> dict[str, dict]:
    return {row["key"]: row for row in pq.read_table(out / "manifest.parquet").to_pylist()}


def test_near_pairs_are_all_that_are_near_and_no_others():
    rng = np.random.default_rng(0)
    base = rng.integers(0, 2, (40, 256), np.uint8)
    rows = [base]
    for flips in (1, NEAR_BITS // 2, NEAR_BITS, NEAR_BITS + 1, 40):
        changed = base.copy()
        for row in changed:
            row[rng.permutation(256)[:flips]] ^= 1
        rows.append(changed)
    bits = np.concatenate(rows)
    hashes = np.unique(np.packbits(bits, axis=1).view("<u8"), axis=0)
    flat = np.unpackbits(hashes.view(np.uint8), axis=1).astype(int)
    distance = (flat[:, None] != flat[None]).sum(-1)
    expected = {(i, j) for i, j in zip(*np.nonzero(distance <= NEAR_BITS), strict=True) if i < j}
    found = list(zip(*(part.tolist() for part in near_pairs(hashes)), strict=True))
    assert set(found) == expected and len(found) == len(expected) > 100


def test_the_same_picture_is_near_and_another_is_not():
    def bits(data: bytes) -> int:
        return int(perceptual_hash(Image.open(io.BytesIO(data))), 16)

    for seed in range(5):
        data = noise(seed, (400, 300))
        assert (bits(data) ^ bits(again(data))).bit_count() <= NEAR_BITS
        assert (bits(data) ^ bits(noise(seed + 100, (400, 300)))).bit_count() > 60
    # Where there is nothing to see, no rounding error is seen.
    white = {perceptual_hash(Image.new("RGB", size, "white")) for size in ((64, 64), (301, 77), (1000, 33))}
    assert len(white) == 1


def test_duplicates_are_marked_and_what_resembles_test_images_leaves_train(tmp_path):
    splits = Splits(0, 0.2, 0.3)
    names = {split: [n for n in range(1, 60) if splits.of(f"PMC{n}") == split] for split in SPLITS}
    train, val, test = (names[split] for split in SPLITS)
    one, two, three, four = (noise(seed, (300, 200)) for seed in range(4))
    pictures = {
        train[0]: {"f": one}, train[1]: {"f": one}, train[2]: {"f": again(one)},
        test[0]: {"f": two, "g": three}, train[3]: {"f": again(two), "g": noise(9)}, train[4]: {"f": two},
        val[0]: {"f": again(three), "g": four}, train[5]: {"f": four}, train[6]: {"f": noise(10)},
    }  # fmt: skip
    for number, images in pictures.items():
        xml = article(*((name, f"Text {name}") for name in images), number=number)
        put(tmp_path / f"in/{number:03d}", {"x.nxml": xml, **{f"{name}.jpg": data for name, data in images.items()}})
    config = IngestConfig(str(tmp_path / "in"), tmp_path / "out", workers=1, val_fraction=0.2, test_fraction=0.3)
    build(config)
    rows = rows_of(tmp_path / "out")
    marks = {key: (row["duplicate"], row["duplicate_of"]) for key, row in rows.items() if row["duplicate"]}
    first = f"PMC{train[0]}_f1"
    assert marks == {f"PMC{train[1]}_f1": ("exact", first), f"PMC{train[2]}_f1": ("near", first)}
    rejects = {row["article"]: row["reason"] for row in pq.read_table(tmp_path / "out/rejects.parquet").to_pylist()}
    assert rejects == {
        f"PMC{train[3]}": f"near duplicate of a test image: PMC{test[0]}_f1",
        f"PMC{train[4]}": f"near duplicate of a test image: PMC{test[0]}_f1",
        f"PMC{val[0]}": f"near duplicate of a test image: PMC{test[0]}_f2",
        f"PMC{train[5]}": f"near duplicate of a val image: PMC{val[0]}_f2",
    }
    assert len(rows) == sum(map(len, pictures.values())) - 4
    told = json.loads((tmp_path / "out/dataset.json").read_text())["ingest"]
    assert (told["exact_duplicates"], told["near_duplicates"], told["pairs"]) == (1, 1, len(rows))


def test_shards_are_shuffled_by_the_seed_and_bounded_in_size(tmp_path):
    articles_in(tmp_path / "in", 40, figures=1)
    for number in range(1, 41):
        data = np.random.default_rng(number).integers(0, 255, (300, 300, 3), np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(data).save(buffer, "JPEG", quality=95)
        (tmp_path / f"in/{number}/f0.jpg").write_bytes(buffer.getvalue())
    orders = []
    for seed in (0, 0, 1):
        out = tmp_path / f"out{len(orders)}"
        options = {"test_fraction": 0.0, "val_fraction": 0.0, "max_shard_megabytes": 1, "seed": seed}
        build(IngestConfig(str(tmp_path / "in"), out, workers=1, **options))
        assert verify(out) == []
        tars = sorted(out.glob("*.tar"))
        assert len(tars) > 3 and all(path.stat().st_size <= 1 << 20 for path in tars)
        assert sum(path.stat().st_size > 800_000 for path in tars) >= len(tars) - 1
        rows = list(rows_of(out).values())
        orders.append([row["key"] for row in rows])
        for row in rows:
            with (out / f"{row['shard']}.tar").open("rb") as file:
                file.seek(row["offset"])
                assert file.read(3) == b"\xff\xd8\xff"
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] != sorted(orders[0]) and sorted(orders[0]) == sorted(orders[2])


def test_the_manifest_has_what_is_known(tmp_path):
    xml = (
        b'<article xmlns:xlink="http://www.w3.org/1999/xlink"><front><journal-meta><journal-title>J</journal-title>'
        b'</journal-meta><article-meta><article-id pub-id-type="pmc">5</article-id><article-id pub-id-type="doi">10.1/x'
        b"</article-id><title-group><article-title>On tests.</article-title></title-group><contrib-group>"
        b'<contrib contrib-type="author"><name><surname>Doe</surname><given-names>J</given-names></name></contrib>'
        b"</contrib-group><pub-date><year>2020</year></pub-date></article-meta></front><body>"
        b'<p>See <xref ref-type="fig" rid="F1">figure 1</xref> and <xref ref-type="fig" rid="F1">again</xref>.</p>'
        b'<fig id="F1"><label>1</label><caption><p>Cells</p></caption><graphic xlink:href="f"/></fig></body></article>'
    )
    put(tmp_path / "in", {"x.nxml": xml, "f.jpg": noise(1)})
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "cell", "##s"]
    (tmp_path / "vocab.txt").write_text("\n".join(vocab))
    config = IngestConfig(str(tmp_path / "in"), tmp_path / "out", workers=1, tokenizer=tmp_path / "vocab.txt")
    build(config)
    (row,) = rows_of(tmp_path / "out").values()
    assert row["citation"] == "Doe J. On tests. J. 2020. doi:10.1/x"
    assert json.loads(row["mentions"]) == ["See figure 1 and again."]
    assert (row["num_tokens"], row["width"], row["source_bytes"]) == (4, 64, len(noise(1)))
    assert len(row["phash"]) == len(row["source_sha256"]) == 64


BUILD = """
import sys
from pathlib import Path
from bclip_fast.ingest.build import IngestConfig, build
if __name__ == "__main__":
    build(IngestConfig(sys.argv[1], Path(sys.argv[2]), workers=int(sys.argv[3]), engine=sys.argv[4],
          test_fraction=0.2, max_shard_megabytes=1))
"""


def command(tmp_path: Path, source: Path, out: Path, workers: int = 2, engine: str = "local") -> list[str]:
    script = tmp_path / "build_it.py"
    script.write_text(BUILD)
    return [sys.executable, str(script), str(source), str(out), str(workers), engine]


@pytest.mark.slow
@pytest.mark.parametrize("num_kills", [3, pytest.param(20, marks=pytest.mark.long)])
def test_a_run_killed_at_any_moment_ends_with_the_same_bytes(tmp_path, num_kills):
    """kill -9 of the parent at random moments of one run; its workers and their fork server end by themselves."""
    source = articles_in(tmp_path / "in", 60)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    whole, out = tmp_path / "whole", tmp_path / "out"
    start = time.monotonic()
    subprocess.run(command(tmp_path, source, whole), env=environment, check=True, capture_output=True)
    seconds = time.monotonic() - start
    moments = random.Random(0)
    kills = 0
    while kills < num_kills:
        process = subprocess.Popen(
            command(tmp_path, source, out), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            process.wait(moments.uniform(0.3, 1.0) * seconds)
            # It was done before the moment came: the next one begins anew.
            assert process.returncode == 0 and tree(out) == tree(whole)
            shutil.rmtree(out)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            # All or nothing; the moment may lie between the last rename and the end of the process.
            if out.exists() and tree(out):
                assert tree(out) == tree(whole)
                shutil.rmtree(out)
    subprocess.run(command(tmp_path, source, out), env=environment, check=True, capture_output=True)
    assert tree(out) == tree(whole) and verify(out) == []
    assert not list(tmp_path.glob(".*"))
    deadline = time.monotonic() + 60
    while orphans := processes_of(tmp_path):
        assert time.monotonic() < deadline, orphans
        time.sleep(0.1)


def processes_of(folder: Path) -> list[str]:
    """Command lines that name the folder, as a fork server's and its workers' do of what started them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            found.append(path.read_text(errors="replace").replace("\0", " "))
    return [line for line in found if str(folder) in line]


@pytest.mark.parametrize("suffix", [".rows", ".images"])
@pytest.mark.parametrize("damage", ["zeros", "cut", "empty"])
def test_what_a_power_failure_spoils_is_done_again(tmp_path, monkeypatch, suffix, damage):
    from bclip_fast.ingest import build as ingest

    source = articles_in(tmp_path / "in", 6)
    config = IngestConfig(str(source), tmp_path / "out", workers=1, test_fraction=0.2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ingest, "make_plan", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        build(config)
    path = sorted((tmp_path / ".out.partial/work/parts").rglob(f"*{suffix}"))[2]
    data = path.read_bytes()
    half = len(data) // 2
    path.write_bytes({"zeros": data[:half] + bytes(len(data) - half), "cut": data[:half], "empty": b""}[damage])
    with pytest.raises(UserError, match="part 2 was damaged"):
        build(config)
    build(config)
    build(IngestConfig(str(source), tmp_path / "whole", workers=1, test_fraction=0.2))
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_a_changed_configuration_does_not_go_on_with_other_parts(tmp_path):
    source = articles_in(tmp_path / "in", 3)
    (tmp_path / ".out.partial/work").mkdir(parents=True)
    (tmp_path / ".out.partial/work/packages.jsonl").write_text("")
    (tmp_path / ".out.partial/work/signature.json").write_text(json.dumps({"seed": 5}))
    build(IngestConfig(str(source), tmp_path / "out", workers=1, test_fraction=0.0))
    assert len(rows_of(tmp_path / "out")) == 6


@pytest.mark.slow
def test_ray_and_this_process_write_the_same_bytes(tmp_path):
    """Takes 10 to 20 seconds: Ray starts a cluster of several programs, and its workers import ours."""
    pytest.importorskip("ray")
    source = articles_in(tmp_path / "in", 12)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    line = command(tmp_path, source, tmp_path / "ray", workers=1, engine="ray")
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    build(IngestConfig(str(source), tmp_path / "here", workers=1, test_fraction=0.2, max_shard_megabytes=1))
    assert tree(tmp_path / "here") == tree(tmp_path / "ray")


def test_one_plain_archive_is_many_units_of_work(tmp_path, monkeypatch):
    from bclip_fast.ingest import articles as source

    monkeypatch.setattr(source, "_XMLS_PER_ARCHIVE_UNIT", 4)
    loose = articles_in(tmp_path / "loose", 10)
    files = {f"{path.parent.name}/{path.name}": path.read_bytes() for path in sorted(loose.glob("*/*"))}
    pack(tmp_path / "bulk/all.tar", files, "w")
    pack(tmp_path / "zipped/all.tar.gz", files)
    assert [package.first for package in source.discover(tmp_path / "bulk")] == [0, 4, 8]
    assert len(list(source.discover(tmp_path / "zipped"))) == 1
    for name in ("loose", "bulk", "zipped"):
        build(IngestConfig(str(tmp_path / name), tmp_path / f"out-{name}", workers=1, test_fraction=0.2))
    rows = [rows_of(tmp_path / f"out-{name}") for name in ("loose", "bulk", "zipped")]
    assert rows[0] == rows[1] == rows[2] and len(rows[0]) == 20


HOSTILE = """
import resource, sys, time
from pathlib import Path
from bclip_fast.ingest.build import IngestConfig, build
start = time.process_time()
build(IngestConfig(sys.argv[1], Path(sys.argv[2]), workers=1, val_fraction=0, test_fraction=0))
print(time.process_time() - start)
print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))
"""


def test_hostile_articles_are_rejected_in_bounded_memory_and_cpu_time(tmp_path):
    root = tmp_path / "in"
    entities = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 12))
    xmls = {
        "bomb": f'<!DOCTYPE article [<!ENTITY l0 "ha">{entities}]><article><p>&l11;</p></article>'.encode(),
        "external": b'<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><article>&x;</article>',
        "nested": b"<article>" + b"<p>" * 10_000_000,
    }
    put(root, {f"{name}/x.nxml": data for name, data in xmls.items()})
    with (root / "nested/y.nxml").open("wb") as file:  # a gigabyte, most of it a hole
        file.write(b"<article>" + b"<p>" * 1_000_000)
        file.truncate(1 << 30)
    figures = [("../../../etc/passwd", "out"), ("html", "page"), ("link", "link"), ("large", "bomb"), ("ok", "good")]
    put(root / "odd", {"x.nxml": article(*figures, number=1), "html.jpg": b"<html>404</html>", "ok.jpg": noise(1)})
    (root / "odd/link.jpg").symlink_to("/etc/passwd")
    buffer = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(buffer, "PNG")
    (root / "odd/large.png").write_bytes(buffer.getvalue())
    climbing, link = tarfile.TarInfo("../../../tmp/evil.nxml"), tarfile.TarInfo("evil.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    pack(root / "t.tar", {"a/x.nxml": article(("evil", "t"), number=2)}, "w", extra=(climbing, link))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    line = [sys.executable, "-c", HOSTILE, str(root), str(tmp_path / "out")]
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    seconds, kilobytes = map(float, done.stdout.split())
    assert seconds < 60 and kilobytes < 1 << 20
    rejects = pq.read_table(tmp_path / "out/rejects.parquet").to_pylist()
    found = {row["figure"] or row["file"]: row["reason"] for row in rejects}
    assert [row["key"] for row in rows_of(tmp_path / "out").values()] == ["PMC1_f5"]
    assert found["bomb/x.nxml"] == found["external/x.nxml"] == "declares entities of its own"
    assert found["nested/x.nxml"] == "more than 2000000 tags"
    assert found["nested/y.nxml"] == "larger than 32 MiB"
    assert found["t.tar/../../../tmp/evil.nxml"] == "unsafe name in an archive"
    assert found["t.tar/evil.jpg"] == "not a regular file"
    reasons = [row["reason"] for row in rejects if row["article"] == "PMC1"]
    assert reasons == [
        "unsafe href",
        "not an image of a known format",
        "link out of the source folder",
        "image of too many pixels",
    ]


def test_an_interrupted_run_is_kept_and_an_impossible_one_is_not(tmp_path, monkeypatch):
    source = articles_in(tmp_path / "in", 3)
    from bclip_fast.ingest import build as ingest

    config = IngestConfig(str(source), tmp_path / "out", workers=1, test_fraction=0.0)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ingest, "write_shard", lambda task: (_ for _ in ()).throw(KeyboardInterrupt))
        build(config)
    assert (tmp_path / ".out.partial/work/plan.json").exists()
    build(config)
    assert len(rows_of(tmp_path / "out")) == 6 and not list(tmp_path.glob(".*"))
    with pytest.raises(UserError, match="is not a mirror"):
        build(IngestConfig(str(source), tmp_path / "other", prefix="PMC", workers=1))
    assert not list(tmp_path.glob(".*"))
