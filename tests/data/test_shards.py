"""Shards: our reader and others return the written samples, damage has a name, and failed writes leave nothing."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from articles import read_tree
from shard_samples import jpeg, samples, split_of, write_dataset

from bclip_fast.data.shards.format import Sample
from bclip_fast.data.shards.reader import ShardDataset
from bclip_fast.data.shards.verify import verify
from bclip_fast.data.shards.writer import ShardWriter
from bclip_fast.errors import UserError


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "dataset")


def test_dataset_returns_samples_in_order(dataset):
    for split in ("train", "val"):
        expected = [sample for i, sample in enumerate(samples()) if split_of(i) == split]
        reader = ShardDataset(dataset, split)
        assert len(reader) == sum(reader.shard_sizes) == len(expected)
        assert list(reader) == expected
        assert [reader.caption(i) for i in range(len(reader))] == [sample.caption for sample in expected]
        assert reader[-1] == expected[-1]
        with pytest.raises(IndexError):
            reader[len(reader)]
    assert len(ShardDataset(dataset).shard_sizes) > 2
    assert verify(dataset) == []


def test_writer_second_run_gives_same_files(dataset, tmp_path):
    assert read_tree(write_dataset(tmp_path / "again")) == read_tree(dataset)


def test_fingerprint_depends_on_content_of_split(dataset, tmp_path):
    train, val = ShardDataset(dataset), ShardDataset(dataset, "val")
    assert train.fingerprint != val.fingerprint
    with ShardWriter(tmp_path / "other", max_shard_bytes=9000) as writer:
        for i, sample in enumerate(samples()):
            caption = "another" if i == 19 else sample.caption
            writer.write(Sample(sample.key, sample.image, caption, sample.meta), split_of(i))
    assert ShardDataset(tmp_path / "other").fingerprint != train.fingerprint
    assert ShardDataset(tmp_path / "other", "val").fingerprint == val.fingerprint


def test_index_agrees_with_tarfile(dataset):
    for path in dataset.glob("*.tar"):
        index = json.loads(path.with_name(path.stem + ".index.json").read_text())
        with tarfile.open(path) as tar:
            members = [(info.name, info.offset_data, info.size, info.mtime) for info in tar]
        expected = [
            (f"{entry['key']}.{member}", *entry[member], 0)
            for entry in index["samples"]
            for member in ("jpg", "txt", "json")
        ]
        assert members == expected


def test_gnu_tar_reads_shard(dataset):
    path = sorted(dataset.glob("*.tar"))[0]
    listed = subprocess.run(["tar", "tf", str(path)], capture_output=True, text=True, check=True)
    assert listed.stderr == ""
    assert len(listed.stdout.split()) % 3 == 0


def test_webdataset_reads_shards(dataset):
    webdataset = pytest.importorskip("webdataset")
    urls = [str(path) for path in sorted(dataset.glob("train-*.tar"))]
    items = list(webdataset.WebDataset(urls, shardshuffle=False))
    expected = list(ShardDataset(dataset))
    assert [(item["__key__"], item["jpg"], item["txt"].decode()) for item in items] == [
        (sample.key, sample.image, sample.caption) for sample in expected
    ]


def test_manifest_has_a_row_for_each_sample(dataset):
    rows = pq.read_table(dataset / "manifest.parquet").to_pylist()
    assert [row["key"] for row in rows] == [sample.key for sample in samples()]
    row = rows[6]
    reader = ShardDataset(dataset, row["split"])
    earlier_shards = [int(path.stem.split("-")[1]) for path in dataset.glob("train-*.tar") if path.stem < row["shard"]]
    position = sum(reader.shard_sizes[number] for number in earlier_shards) + row["position"]
    assert (reader[position].key, reader[position].caption) == (row["key"], row["caption"])
    assert (row["number"], row["half"], json.loads(row["parts"])) == (6, 3.0, [6, {"a": None}])
    assert json.loads(row["meta"]) == samples()[6].meta


def test_dataset_reads_in_threads_after_pickling_and_after_fork(dataset):
    reader = ShardDataset(dataset)
    expected = list(reader)
    with ThreadPoolExecutor(8) as pool:
        order = [i % len(reader) for i in range(400)]
        assert all(sample == expected[i] for i, sample in zip(order, pool.map(reader.__getitem__, order), strict=True))
    assert list(pickle.loads(pickle.dumps(reader))) == expected
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe()
    process = context.Process(target=lambda: send.send(list(reader) == expected))
    process.start()
    assert receive.poll(30)
    assert receive.recv()
    process.join()


@pytest.mark.parametrize(
    ("sample", "words"),
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
def test_writer_invalid_sample_is_refused_and_leaves_nothing(tmp_path, sample, words):
    with pytest.raises(UserError, match=words):
        write_train_and_val(tmp_path / "out", samples(1)[0], sample)
    assert list(tmp_path.iterdir()) == []


def write_train_and_val(out: Path, train: Sample, val: Sample) -> None:
    with ShardWriter(out) as writer:
        writer.write(train, "train")
        writer.write(val, "val")


def write_and_fail(out: Path, **options) -> None:
    with ShardWriter(out, **options) as writer:
        writer.write(samples(1)[0], "train")
        raise RuntimeError


def test_writer_exception_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError):
        write_and_fail(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="has no samples"), ShardWriter(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_writer_replaces_finished_dataset_only_with_overwrite(dataset):
    fingerprint = ShardDataset(dataset).fingerprint
    with pytest.raises(UserError, match="already holds"):
        ShardWriter(dataset)
    with pytest.raises(RuntimeError):
        write_and_fail(dataset, overwrite=True)
    assert ShardDataset(dataset).fingerprint == fingerprint
    with ShardWriter(dataset, overwrite=True) as writer:
        writer.write(samples(1)[0], "train")
    assert len(ShardDataset(dataset)) == 1
    assert verify(dataset) == []
    assert [path.name for path in dataset.parent.iterdir()] == [dataset.name]


def test_writer_never_replaces_other_files(tmp_path):
    (tmp_path / "precious").write_text("x")
    with pytest.raises(UserError, match="not a dataset"):
        ShardWriter(tmp_path, overwrite=True)


KILLED_WRITER = """
import os, sys
sys.path.insert(0, {support!r})
from pathlib import Path
from bclip_fast.data.shards.writer import ShardWriter
from shard_samples import samples
with ShardWriter(Path({out!r}), max_shard_bytes=9000) as writer:
    for sample in samples():
        writer.write(sample, "train")
        if len(writer._keys) == 15:
            os.kill(os.getpid(), 9)
"""


def test_writer_killed_leaves_no_dataset_and_next_run_cleans_up(tmp_path):
    out = tmp_path / "dataset"
    root = Path(__file__).parents[2]
    code = KILLED_WRITER.format(support=str(root / "tests/support"), out=str(out))
    process = subprocess.run([sys.executable, "-c", code], cwd=root)
    assert process.returncode == -9
    assert not out.exists()
    assert list(tmp_path.iterdir()) != []
    write_dataset(out)
    assert verify(out) == []
    assert list(tmp_path.iterdir()) == [out]


def test_second_writer_of_dataset_is_refused(tmp_path):
    with ShardWriter(tmp_path / "out") as writer:
        with pytest.raises(UserError, match="another process"), ShardWriter(tmp_path / "out"):
            pass
        writer.write(samples(1)[0], "train")
    assert len(ShardDataset(tmp_path / "out")) == 1


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1024)


def flip_bit(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: (d / "dataset.json").unlink(), "dataset.json is missing"),
        (lambda d: (d / "dataset.json").write_text("{"), "dataset.json: cannot be read"),
        (lambda d: (d / "dataset.json").write_text("{}"), "does not describe a dataset"),
        (lambda d: (d / "train-000001.tar").unlink(), "train-000001.tar is missing"),
        (lambda d: truncate(d / "train-000001.tar"), r"train-000001.tar has \d+ bytes.*truncated"),
        (lambda d: (d / "train-000001.index.json").unlink(), "train-000001.index.json is missing"),
        (lambda d: (d / "train-000001.index.json").write_text("{"), "train-000001.index.json: cannot be read"),
        (lambda d: (d / "train-000001.index.json").write_text("{}"), "train-000001.index.json: corrupt index"),
        (
            lambda d: (d / "train-000001.index.json").write_bytes((d / "train-000000.index.json").read_bytes()),
            "name or hash differ",
        ),
        (lambda d: flip_bit(d / "train-000001.tar", 3), "not at the offset in the index"),
    ],
)
def test_dataset_damage_is_named(dataset, damage, words):
    damage(dataset)
    with pytest.raises(UserError, match=words):
        list(ShardDataset(dataset))


def test_shifted_index_is_detected(dataset):
    path = dataset / "train-000000.index.json"
    index = json.loads(path.read_text())
    index["samples"][0]["jpg"][0] += 64
    index["samples"][0]["jpg"][1] -= 64
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match="not at the offset in the index"):
        ShardDataset(dataset)[0]
    assert any("not at the offset in the index" in problem for problem in verify(dataset))


def test_missing_folder_or_split_is_named(dataset):
    with pytest.raises(UserError, match="no such folder"):
        ShardDataset(dataset / "nowhere")
    with pytest.raises(UserError, match="no split 'test'; it has train, val"):
        ShardDataset(dataset, "test")


def test_verify_lists_every_kind_of_damage(dataset):
    image = json.loads((dataset / "train-000000.index.json").read_text())["samples"][0]["jpg"]
    flip_bit(dataset / "train-000000.tar", image[0] + 1)  # the first marker of the JPEG
    truncate(dataset / "train-000001.tar")
    (dataset / "val-000000.index.json").unlink()
    (dataset / "train-000009.tar").write_bytes(b"")
    (dataset / "._train-000000.tar").write_bytes(b"")  # hidden, so it is no problem
    table = pq.read_table(dataset / "manifest.parquet")
    pq.write_table(table.slice(1), dataset / "manifest.parquet")
    problems = "\n".join(verify(dataset))
    for words in (
        "train-000000.tar: its SHA-256",
        "key_1.jpg: cannot be decoded",
        "train-000001.tar: its SHA-256",
        "val-000000.index.json is missing",
        "train-000009.tar: dataset.json does not list it",
        "manifest.parquet: its rows",
    ):
        assert words in problems
    assert "._train" not in problems


def test_threads_open_the_same_shard_at_once(tmp_path):
    """Several threads open a file, but only one descriptor enters the cache. The others must stay open too."""
    with ShardWriter(tmp_path / "many", max_shard_bytes=1) as writer:
        for sample in samples(12):
            writer.write(sample, "train")
    with ThreadPoolExecutor(4) as pool:
        for _ in range(30):
            fresh = ShardDataset(tmp_path / "many")
            list(pool.map(lambda i, dataset=fresh: dataset[i].key, [number % 12 for number in range(48)]))
