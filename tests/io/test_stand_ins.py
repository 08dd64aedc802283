"""Pointers of git-lfs and other stand-ins: every reader names them instead of a damaged file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bclip_fast.data.image_files import read_rgb
from bclip_fast.data.shards import verify as shards
from bclip_fast.data.shards.format import read_description
from bclip_fast.data.shards.writer import ShardWriter
from bclip_fast.data.storage import LocalStorage, ReadConfig
from bclip_fast.errors import UserError
from bclip_fast.eval import results
from bclip_fast.eval.datasets.arrays import open_medmnist
from bclip_fast.eval.datasets.pairs import PairDataset
from bclip_fast.eval.datasets.table import CsvDataset
from bclip_fast.ingest import safe_xml
from bclip_fast.ingest import verify as ingest
from bclip_fast.ingest.articles import Package, SourceError
from bclip_fast.ingest.tar_archives import open_archive
from bclip_fast.io import stand_ins
from bclip_fast.io.json_files import read_object
from bclip_fast.model.safe_load import read_checkpoint
from bclip_fast.model.tokenizer import Tokenizer
from bclip_fast.ops import record_files
from bclip_fast.pretrained.sources import Folder
from bclip_fast.train import checkpoint

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 783734177\n"


@pytest.mark.parametrize(
    ("start", "reason"),
    [
        (POINTER, "is a git-lfs pointer, not the file: run git lfs pull"),
        (b"# xet version 0\nfilesize = 5\nhash = 'a'\n", "is a Xet pointer"),
        (b"\xef\xbb\xbf\n<!DOCTYPE html>\n<html>", "is a web page"),
        (b"<HTML><head>", "is a web page"),
        (b"<!-- error -->\n<html>", "is a web page"),
        (b'<?xml version="1.0"?>\n<Error><Code>AccessDenied</Code>', "is the error message of a storage server"),
        (b"", "is empty"),
        (bytes(stand_ins.NUM_BYTES), "holds only zeros"),
    ],
)
def test_describe_names_a_stand_in(start: bytes, reason: str) -> None:
    assert reason in str(stand_ins.describe(start))
    assert stand_ins.describe(b"\x80" + start) is None


@pytest.mark.parametrize(
    "start", [b"PK\x03\x04", b"\xff\xd8\xff", b'{"a": 1}', b"<article>", b"path,label\n", b"html page"]
)
def test_describe_other_files_is_none(start: bytes) -> None:
    assert stand_ins.describe(start) is None


def torch_file(path: Path) -> object:
    return read_checkpoint(path, legacy=True)


def medmnist(path: Path) -> object:
    return open_medmnist(path, "test", "its page")


def index_of_shards(path: Path) -> object:
    return LocalStorage(path.parent, ReadConfig()).json(path.name)


def shard(path: Path) -> object:
    return LocalStorage(path.parent, ReadConfig()).read(path.name, 512, 4096)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("w.safetensors", read_checkpoint),
        ("w.bin", read_checkpoint),
        ("w.pth", torch_file),
        ("tokenizer.json", Tokenizer.from_file),
        ("vocab.txt", Tokenizer.from_file),
        ("config.json", read_object),
        ("x.jpg", lambda path: read_rgb(path.read_bytes(), lambda: str(path))),
        ("x.dcm", lambda path: read_rgb(path.read_bytes(), lambda: str(path))),
        ("x.index.json", index_of_shards),
        ("dataset.json", lambda path: read_description(LocalStorage(path.parent, ReadConfig()))),
        ("x.tar", shard),
        ("data.csv", lambda path: CsvDataset(path, "test")),
        ("pathmnist.npz", medmnist),
        ("results.json", results.read),
        ("record.json", record_files.load),
    ],
)
@pytest.mark.parametrize("content", [POINTER, b"<!doctype html><title>Sign in</title>"], ids=["lfs", "page"])
def test_readers_name_stand_ins(tmp_path: Path, name: str, read: Callable[[Path], Any], content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{name}.*(git-lfs pointer|web page), not the file") as error:
        read(path)
    assert "\n" not in str(error.value)


def test_caption_that_is_a_pointer_raises(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(POINTER)
    with pytest.raises(UserError, match=r"a.txt, the text of a.png, is a git-lfs pointer"):
        PairDataset(tmp_path)


def test_verification_names_stand_ins(tmp_path: Path) -> None:
    from shard_samples import samples

    with ShardWriter(tmp_path / "data") as writer:
        for sample in samples(2):
            writer.write(sample, "train")
    name = next((tmp_path / "data").rglob("*.tar")).stem
    for file, verify in ((f"{name}.tar", shards.verify), ("manifest.parquet", ingest.verify)):
        path = tmp_path / "data" / file
        content = path.read_bytes()
        path.write_bytes(POINTER)
        assert f"{file} is a git-lfs pointer, not the file: run git lfs pull" in verify(tmp_path / "data")
        path.write_bytes(content)
    assert not shards.verify(tmp_path / "data")


def test_damaged_checkpoint_of_a_run_names_the_pointer(tmp_path: Path) -> None:
    from bclip_fast.train.engine.optimizer import OptimizerState

    state = {"w": torch.zeros(2)}
    checkpoint.save(tmp_path, checkpoint.Checkpoint(1, state, OptimizerState(1, {}, {}), {}, {}))
    folder = next(path for path in tmp_path.iterdir() if path.is_dir())
    assert checkpoint.verify(folder) is None
    for name in ("model.safetensors", "manifest.json"):
        (folder / name).write_bytes(POINTER)
        assert checkpoint.verify(folder) == f"{name} is a git-lfs pointer, not the file: run git lfs pull"


def test_unfinished_download_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no w.bin$"):
        Folder(tmp_path).get(["w.bin"])
    for name in ("w.bin.part", ".cache/huggingface/download/abc=.0123.incomplete"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"PK")
        with pytest.raises(UserError, match=rf"holds no w.bin, but an unfinished download of it, .*{path.name}"):
            Folder(tmp_path).get(["w.bin"])
        path.unlink()


def test_complete_files_are_read(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(2)}, tmp_path / "w.safetensors")
    assert read_checkpoint(tmp_path / "w.safetensors").keys() == {"w"}
    np.savez(tmp_path / "pathmnist.npz", test_images=np.zeros((2, 4, 4, 3), np.uint8), test_labels=np.zeros((2, 1)))
    assert len(medmnist(tmp_path / "pathmnist.npz")) == 2


def test_ingest_names_pointers_of_articles_and_archives(tmp_path: Path) -> None:
    with pytest.raises(safe_xml.XmlError, match="broken XML: the file is a git-lfs pointer"):
        safe_xml.parse(POINTER)
    for name in ("a.tar", "a.tar.gz"):
        (tmp_path / name).write_bytes(POINTER)
        with pytest.raises(SourceError, match="broken archive: the file is a git-lfs pointer"):
            open_archive(Package("archive", str(tmp_path), name)).__enter__()
