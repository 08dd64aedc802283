"""Shards: what is written comes back, to other readers too; what is broken is named; nothing half-done remains."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from bclip_fast.data.shards.format import Sample
from bclip_fast.data.shards.reader import ShardDataset
from bclip_fast.data.shards.verify import verify
from bclip_fast.data.shards.writer import ShardWriter
from bclip_fast.errors import UserError


def jpeg(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 255, (24, 20 + number % 9, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def samples(count: int = 20) -> list[Sample]:
    return [
        Sample(f"key_{i}", jpeg(i), f"caption {i} \u03b1", {"number": i, "half": i / 2, "parts": [i, {"a": None}]})
        for i in range(count)
    ]


def split_of(i: int) -> str:
    return "val" if i % 5 == 0 else "train"


def write(out: Path, **options) -> Path:
    with ShardWriter(out, max_shard_bytes=9000, **options) as writer:
        for i, sample in enumerate(samples()):
            writer.write(sample, split_of(i))
    return out


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return write(tmp_path / "dataset")


def test_samples_come_back_in_order(dataset):
    for split in ("train", "val"):
        expected = [sample for i, sample in enumerate(samples()) if split_of(i) == split]
        found = ShardDataset(dataset, split)
        assert len(found) == sum(found.shard_sizes) == len(expected)
        assert list(found) == expected
        assert [found.caption(i) for i in range(len(found))] == [sample.caption for sample in expected]
        assert found[-1] == expected[-1]
        with pytest.raises(IndexError):
            found[len(found)]
    assert len(ShardDataset(dataset).shard_sizes) > 2
    assert verify(dataset) == []


def test_every_file_is_the_same_in_a_second_run(dataset, tmp_path):
    again = write(tmp_path / "again")
    names = sorted(path.name for path in dataset.iterdir())
    assert names == sorted(path.name for path in again.iterdir())
    assert [(dataset / name).read_bytes() for name in names] == [(again / name).read_bytes() for name in names]


def test_fingerprint_is_that_of_the_split_and_changes_with_its_content(dataset, tmp_path):
    train, val = ShardDataset(dataset), ShardDataset(dataset, "val")
    assert train.fingerprint != val.fingerprint
    with ShardWriter(tmp_path / "other", max_shard_bytes=9000) as writer:
        for i, sample in enumerate(samples()):
            caption = "another" if i == 19 else sample.caption
            writer.write(Sample(sample.key, sample.image, caption, sample.meta), split_of(i))
    assert ShardDataset(tmp_path / "other").fingerprint != train.fingerprint
    assert ShardDataset(tmp_path / "other", "val").fingerprint == val.fingerprint


def test_tarfile_and_the_index_agree(dataset):
    for path in dataset.glob("*.tar"):
        index = json.loads(path.with_name(path.stem + ".index.json").read_text())
        with tarfile.open(path) as tar:
            found = [(info.name, info.offset_data, info.size, info.mtime) for info in tar]
        expected = [
            (f"{entry['key']}.{member}", *entry[member], 0)
            for entry in index["samples"]
            for member in ("jpg", "txt", "json")
        ]
        assert found == expected


def test_gnu_tar_reads_a_shard(dataset):
    path = sorted(dataset.glob("*.tar"))[0]
    listed = subprocess.run(["tar", "tf", str(path)], capture_output=True, text=True, check=True)
    assert listed.stderr == "" and len(listed.stdout.split()) % 3 == 0


def test_webdataset_reads_the_shards(dataset):
    webdataset = pytest.importorskip("webdataset")
    urls = [str(path) for path in sorted(dataset.glob("train-*.tar"))]
    found = list(webdataset.WebDataset(urls, shardshuffle=False))
    expected = list(ShardDataset(dataset))
    assert [(item["__key__"], item["jpg"], item["txt"].decode()) for item in found] == [
        (sample.key, sample.image, sample.caption) for sample in expected
    ]


def test_manifest_has_a_row_a_sample(dataset):
    rows = pq.read_table(dataset / "manifest.parquet").to_pylist()
    assert [row["key"] for row in rows] == [sample.key for sample in samples()]
    row = rows[6]
    found = ShardDataset(dataset, row["split"])
    before = [int(path.stem.split("-")[1]) for path in dataset.glob("train-*.tar") if path.stem < row["shard"]]
    position = sum(found.shard_sizes[number] for number in before) + row["position"]
    assert found[position].key == row["key"] and found[position].caption == row["caption"]
    assert (row["number"], row["half"], json.loads(row["parts"])) == (6, 3.0, [6, {"a": None}])
    assert json.loads(row["meta"]) == samples()[6].meta


def test_reads_are_safe_between_threads_after_pickling_and_after_fork(dataset):
    found = ShardDataset(dataset)
    expected = list(found)
    with ThreadPoolExecutor(8) as pool:
        order = [i % len(found) for i in range(400)]
        assert all(sample == expected[i] for i, sample in zip(order, pool.map(found.__getitem__, order), strict=True))
    assert list(pickle.loads(pickle.dumps(found))) == expected
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe()
    process = context.Process(target=lambda: send.send(list(found) == expected))
    process.start()
    assert receive.poll(30) and receive.recv()
    process.join()


@pytest.mark.parametrize(
    "bad, words",
    [
        (Sample("a.b", jpeg(1), "x"), "A-Z"),
        (Sample("\u00e4", jpeg(1), "x"), "A-Z"),
        (Sample("k" * 91, jpeg(1), "x"), "90"),
        (Sample("key_0", jpeg(1), "x"), "was written before"),
        (Sample("new", jpeg(1), " \n"), "empty caption"),
        (Sample("new", b"<html>", "x"), "not a JPEG"),
        (Sample("new", jpeg(1), "\ud800"), "cannot be stored"),
        (Sample("new", jpeg(1), "x", {"a": float("nan")}), "cannot be stored"),
        (Sample("new", jpeg(1), "x", {"a": object()}), "cannot be stored"),
    ],
)
def test_a_bad_sample_is_refused_and_leaves_nothing(tmp_path, bad, words):
    with pytest.raises(UserError, match=words), ShardWriter(tmp_path / "out") as writer:
        writer.write(samples(1)[0], "train")
        writer.write(bad, "val")
    assert list(tmp_path.iterdir()) == []


def test_an_exception_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), ShardWriter(tmp_path / "out") as writer:
        writer.write(samples(1)[0], "train")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="has no samples"), ShardWriter(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_finished_dataset_is_replaced_only_on_demand(dataset):
    before = ShardDataset(dataset).fingerprint
    with pytest.raises(UserError, match="already holds"):
        ShardWriter(dataset)
    with pytest.raises(RuntimeError), ShardWriter(dataset, overwrite=True):
        raise RuntimeError
    assert ShardDataset(dataset).fingerprint == before
    with ShardWriter(dataset, overwrite=True) as writer:
        writer.write(samples(1)[0], "train")
    assert len(ShardDataset(dataset)) == 1 and verify(dataset) == []
    assert [path.name for path in dataset.parent.iterdir()] == [dataset.name]


def test_a_folder_of_something_else_is_never_replaced(tmp_path):
    (tmp_path / "precious").write_text("x")
    with pytest.raises(UserError, match="not a dataset"):
        ShardWriter(tmp_path, overwrite=True)


KILLED = """
import os, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from bclip_fast.data.shards.writer import ShardWriter
from test_shards import samples
with ShardWriter(Path({out!r}), max_shard_bytes=9000) as writer:
    for sample in samples():
        writer.write(sample, "train")
        if len(writer._keys) == 15:
            os.kill(os.getpid(), 9)
"""


def test_a_killed_run_leaves_no_dataset_and_is_cleared_by_the_next(tmp_path):
    out = tmp_path / "dataset"
    code = KILLED.format(tests=str(Path(__file__).parent), out=str(out))
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    assert done.returncode == -9
    assert not out.exists() and list(tmp_path.iterdir()) != []
    write(out)
    assert verify(out) == [] and list(tmp_path.iterdir()) == [out]


def test_two_writers_of_one_dataset_are_refused(tmp_path):
    with ShardWriter(tmp_path / "out") as writer:
        with pytest.raises(UserError, match="another process"), ShardWriter(tmp_path / "out"):
            pass
        writer.write(samples(1)[0], "train")
    assert len(ShardDataset(tmp_path / "out")) == 1


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1024)


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda d: (d / "dataset.json").unlink(), "dataset.json is missing"),
        (lambda d: (d / "dataset.json").write_text("{"), "dataset.json: cannot be read"),
        (lambda d: (d / "dataset.json").write_text("{}"), "does not describe a dataset"),
        (lambda d: (d / "train-000001.tar").unlink(), "train-000001.tar is missing"),
        (lambda d: cut(d / "train-000001.tar"), r"train-000001.tar has \d+ bytes.*truncated"),
        (lambda d: (d / "train-000001.index.json").unlink(), "train-000001.index.json is missing"),
        (lambda d: (d / "train-000001.index.json").write_text("{"), "train-000001.index.json: cannot be read"),
        (lambda d: (d / "train-000001.index.json").write_text("{}"), "train-000001.index.json: corrupt index"),
        (
            lambda d: (d / "train-000001.index.json").write_bytes((d / "train-000000.index.json").read_bytes()),
            "name or hash differ",
        ),
        (lambda d: flip(d / "train-000001.tar", 3), "not at the offset in the index"),
    ],
)
def test_damage_is_named(dataset, damage, words):
    damage(dataset)
    with pytest.raises(UserError, match=words):
        list(ShardDataset(dataset))


def test_a_shifted_index_is_noticed(dataset):
    path = dataset / "train-000000.index.json"
    index = json.loads(path.read_text())
    index["samples"][0]["jpg"][0] += 64
    index["samples"][0]["jpg"][1] -= 64
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match="not at the offset in the index"):
        ShardDataset(dataset)[0]
    assert any("not at the offset in the index" in problem for problem in verify(dataset))


def test_missing_folder_and_split_are_named(dataset):
    with pytest.raises(UserError, match="no such folder"):
        ShardDataset(dataset / "nowhere")
    with pytest.raises(UserError, match="no split 'test'; it has train, val"):
        ShardDataset(dataset, "test")


def test_verify_finds_every_kind_of_damage(dataset):
    image = json.loads((dataset / "train-000000.index.json").read_text())["samples"][0]["jpg"]
    flip(dataset / "train-000000.tar", image[0] + 1)  # the JPEG's first marker
    cut(dataset / "train-000001.tar")
    (dataset / "val-000000.index.json").unlink()
    (dataset / "train-000009.tar").write_bytes(b"")
    table = pq.read_table(dataset / "manifest.parquet")
    pq.write_table(table.slice(1), dataset / "manifest.parquet")
    found = "\n".join(verify(dataset))
    for words in (
        "train-000000.tar: its SHA-256",
        "key_1.jpg: cannot be decoded",
        "train-000001.tar: its SHA-256",
        "val-000000.index.json is missing",
        "train-000009.tar: dataset.json does not list it",
        "manifest.parquet: its rows",
    ):
        assert words in found


def test_threads_that_open_a_shard_at_once_each_read_it(tmp_path):
    """A descriptor that loses the race into the cache must not close before it was read."""
    with ShardWriter(tmp_path / "many", max_shard_bytes=1) as writer:
        for sample in samples(12):
            writer.write(sample, "train")
    with ThreadPoolExecutor(4) as pool:
        for _ in range(30):
            fresh = ShardDataset(tmp_path / "many")
            list(pool.map(lambda i: fresh[i].key, [number % 12 for number in range(48)]))  # noqa: B023
