"""Shards carry checksums: every reader notices a changed bit of any member, and old shards get checksums."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
from damage import entry_of, flip_bit, spoil
from loaders import loader, take
from shard_samples import samples, write_dataset
from synthetic import write_shards

from bclip_fast.data.image_files import decode_as_loaders
from bclip_fast.data.shards import reader as reader_module
from bclip_fast.data.shards.checksum import crc32c
from bclip_fast.data.shards.format import Sample
from bclip_fast.data.shards.reader import BadSample, ShardDataset
from bclip_fast.data.shards.verify import add_checksums, verify
from bclip_fast.data.shards.writer import ShardWriter
from bclip_fast.data.storage import ReadConfig
from bclip_fast.errors import UserError
from bclip_fast.eval.datasets.shards import ShardEvalDataset
from bclip_fast.ingest.verify import VerifyConfig
from bclip_fast.ingest.verify import run as run_verify


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "dataset")


def without_checksums(folder: Path) -> None:
    """Make the files those of an earlier release."""
    for path in folder.glob("*.json"):
        content = json.loads(path.read_text())
        content.pop("checksum", None)
        for sample in content.get("samples", []):
            del sample["crc32c"]
        path.write_text(json.dumps(content))


def test_crc32c_equals_published_values():
    """RFC 3720, B.4, and the check value of the CRC catalogue. The portable code gives the same."""
    values = {b"123456789": 0xE3069283, bytes(32): 0x8A9136AA, b"\xff" * 32: 0x62A8AB43, bytes(range(32)): 0x46DD794E}
    values |= {b"": 0}
    data = os.urandom(1000)
    lengths = [*range(40), 1000]
    assert all(crc32c(key) == value for key, value in values.items())
    program = "import sys; from bclip_fast.data.shards.checksum import crc32c; data = bytes.fromhex(sys.argv[1]); "
    program += f"print([crc32c(data[:n]) for n in {lengths}])"
    environment = {**os.environ, "BCLIP_CPU_ISA": "plain"}
    printed = subprocess.run(
        [sys.executable, "-c", program, data.hex()], env=environment, capture_output=True, text=True, check=True
    )
    assert json.loads(printed.stdout) == [crc32c(data[:n]) for n in lengths]


@pytest.mark.parametrize("member", ["jpg", "txt", "json"])
def test_every_reader_names_a_changed_bit(dataset: Path, member: str, tmp_path: Path):
    before = ShardDataset(dataset)[0]
    name = flip_bit(dataset, member)
    system = fsspec.filesystem("memory")
    for path in dataset.iterdir():
        system.pipe_file(f"/changed/{path.name}", path.read_bytes())
    try:
        evaluated = ShardEvalDataset(dataset, "train")
        # Without checksums, all of these accept the sample.
        readers = {
            "item": lambda: ShardDataset(dataset)[0],
            "iteration": lambda: list(ShardDataset(dataset)),
            "URL": lambda: ShardDataset("memory://changed")[0],
            "evaluation": lambda: evaluated.image(0),
        }
        if member == "txt":
            readers["caption"] = lambda: ShardDataset(dataset).caption(0)
            readers["captions of an evaluation"] = ShardEvalDataset(dataset, "train").captions
        for read in readers.values():
            with pytest.raises(BadSample, match=rf"train-000000\.tar: {name} is damaged: its CRC-32C is \w{{8}}, but"):
                read()
        for root in (str(dataset), "memory://changed"):
            first, second = ShardDataset(root).fetch([0, 1])()
            assert isinstance(first, BadSample)
            assert second == [sample for i, sample in enumerate(samples()) if i % 5][1]
            num_captions = len(list(ShardDataset(root).captions()))
            assert num_captions == len(ShardDataset(dataset)) - (member == "txt" or "://" in root)
        # After the first error, an evaluation leaves the sample out.
        assert evaluated.key(0) == before.key
        assert len(evaluated.captions()) == len(evaluated)
        assert len(evaluated.label_kinds) == 0
    finally:
        system.rm("/changed", recursive=True)
    problems = verify(dataset)
    assert any(f"{name}: its CRC-32C differs from the index" in problem for problem in problems)


def test_changed_bit_of_scan_decodes_without_an_error(tmp_path: Path):
    """The reason for the checksums: no decoder can notice this damage."""
    folder = write_shards(tmp_path / "shards", num_samples=16, num_val=0)
    expected = ShardDataset(folder)[3].image
    spoil(folder, 3, "bit")
    without_checksums(folder)
    damaged = ShardDataset(folder)[3].image
    assert decode_as_loaders(damaged).tobytes() != decode_as_loaders(expected).tobytes()


def test_loader_replaces_a_changed_bit(tmp_path: Path):
    folder = write_shards(tmp_path / "shards", num_samples=40, num_val=0)
    key = spoil(folder, 3, "bit")
    with loader(ShardDataset(folder)) as source:
        batches = take(source, 5)
    [bad] = [bad for batch in batches for bad in batch.bad]
    assert (bad.key, bad.index) == (key, 3)
    assert f"{key}.jpg is damaged: its CRC-32C is " in bad.reason
    assert all(key not in batch.keys for batch in batches)


def test_exchanged_shards_of_equal_layout_are_noticed(tmp_path: Path):
    """Two shards with the same offsets and sizes, of which the tar files or the indices were exchanged."""
    image = samples(1)[0].image
    with ShardWriter(tmp_path / "shards", max_shard_bytes=1) as writer:
        for key in "ab":
            writer.write(Sample(key, image, f"caption of {key}"), "train")
    for suffix, words in ((".tar", r"train-000000\.tar: b\.txt is damaged"), (".index.json", "name or hash differ")):
        folder = shutil.copytree(tmp_path / "shards", tmp_path / suffix)
        first, second = (folder / f"train-00000{number}{suffix}" for number in (0, 1))
        content = first.read_bytes()
        assert len(content) == len(second.read_bytes())
        first.write_bytes(second.read_bytes())
        second.write_bytes(content)
        with pytest.raises(UserError, match=words):
            ShardDataset(folder)[0]


@pytest.mark.parametrize("change", [{}, {"crc32c": [1]}, {"crc32c": [1, 2, "x"]}, {"crc32c": [-1, 2, 3]}], ids=str)
def test_index_without_its_checksums_is_corrupt(dataset: Path, change: dict[str, object]):
    path = dataset / "train-000000.index.json"
    content = json.loads(path.read_text())
    del content["samples"][0]["crc32c"]
    content["samples"][0].update(change)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="corrupt index"):
        ShardDataset(dataset)[0]


def test_unknown_checksum_is_refused(dataset: Path):
    path = dataset / "dataset.json"
    path.write_text(path.read_text().replace('"crc32c"', '"other"'))
    with pytest.raises(UserError, match="checksum='other'.*this release checks 'crc32c'"):
        ShardDataset(dataset)


def test_old_shards_load_and_say_once_that_they_have_no_checksums(dataset: Path, caplog: pytest.LogCaptureFixture):
    expected, fingerprint = list(ShardDataset(dataset)), ShardDataset(dataset).fingerprint
    without_checksums(dataset)
    reader_module._say_no_checksums.cache_clear()
    with caplog.at_level(logging.WARNING, "bclip_fast"):
        for split in ("train", "val", "train"):
            ShardDataset(dataset, split)
    assert caplog.text.count("has no checksums") == 1
    assert verify(dataset) == []
    assert list(ShardDataset(dataset)) == expected

    # The command adds them. Tar files and fingerprint stay, so runs resume.
    tars = {path.name: path.read_bytes() for path in dataset.glob("*.tar")}
    assert run_verify(VerifyConfig(dataset, add_checksums=True)) == 0
    assert {path.name: path.read_bytes() for path in dataset.glob("*.tar")} == tars
    assert (list(ShardDataset(dataset)), ShardDataset(dataset).fingerprint) == (expected, fingerprint)
    assert not add_checksums(dataset)
    flip_bit(dataset, "json")
    with pytest.raises(BadSample, match="is damaged"):
        ShardDataset(dataset)[0]


def test_added_checksums_equal_written_ones(dataset: Path, tmp_path: Path):
    old = shutil.copytree(dataset, tmp_path / "old")
    without_checksums(old)
    assert add_checksums(old)
    for path in dataset.glob("*.json"):
        assert (old / path.name).read_bytes() == path.read_bytes()


def test_damaged_shard_gets_no_checksums(dataset: Path):
    without_checksums(dataset)
    flip_bit(dataset, "jpg")
    before = {path.name: path.read_bytes() for path in dataset.glob("dataset.json")}
    with pytest.raises(UserError, match=r"train-000000\.tar is missing, or its SHA-256 differs from its index"):
        add_checksums(dataset)
    assert {path.name: path.read_bytes() for path in dataset.glob("dataset.json")} == before


def test_damaged_copy_of_a_remote_shard_is_read_again_from_the_url(
    dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    system = fsspec.filesystem("memory")
    for path in dataset.iterdir():
        system.pipe_file(f"/origin/{path.name}", path.read_bytes())
    try:
        remote = ShardDataset("memory://origin", read=ReadConfig(cache_dir=str(tmp_path / "cache")))
        expected = list(remote)
        entry = entry_of(dataset)
        for path in (tmp_path / "cache").glob("*.tar"):
            data = bytearray(path.read_bytes())
            data[entry["txt"][0]] ^= 1
            path.write_bytes(data)
        fresh = ShardDataset("memory://origin", read=ReadConfig(cache_dir=str(tmp_path / "cache")))
        assert fresh.caption(0) == expected[0].caption
        assert fresh.fetch([0, 1])() == expected[:2]
        assert "a second read was intact" in caplog.text
        # Damage at the origin is a bad sample.
        data = bytearray((dataset / "train-000000.tar").read_bytes())
        data[entry["txt"][0]] ^= 1
        system.pipe_file("/origin/train-000000.tar", bytes(data))
        assert isinstance(fresh.fetch([0])()[0], BadSample)
    finally:
        system.rm("/origin", recursive=True)
