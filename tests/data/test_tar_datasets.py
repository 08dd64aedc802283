"""Tar files of others: the same samples as webdataset, the index in the cache, URLs, and loaders."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
import threading
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from foreign_tars import encoded, pixels, write_tar, write_tars
from loaders import loader, take
from PIL import Image

from bclip_fast.data.image_files import read_rgb
from bclip_fast.data.sampler import ShardSampler
from bclip_fast.data.shards import tar_cache, tar_index
from bclip_fast.data.shards.mixed import MixedDataset, open_dataset
from bclip_fast.data.shards.tar_dataset import TarDataset, verify_tars
from bclip_fast.data.shards.tar_paths import expand_braces
from bclip_fast.data.sources import as_sources
from bclip_fast.data.splits import MissingSplit
from bclip_fast.data.storage import ReadConfig
from bclip_fast.data.transform import Preprocess, PreprocessConfig, random_resized_crop_box
from bclip_fast.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BCLIP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "shards"


JPEG, TEXT = encoded(pixels(0)), b"a caption"

# The files of a tar, and the samples that we and webdataset read: key and caption.
LAYOUTS: dict[str, tuple[list[tuple[str, bytes]], list[tuple[str, str]]]] = {
    "plain": ([("0.jpg", JPEG), ("0.txt", TEXT), ("1.jpg", JPEG), ("1.txt", b"two")],
              [("0", "a caption"), ("1", "two")]),
    "captions first": ([("0.txt", TEXT), ("0.json", b"{}"), ("0.jpg", JPEG)], [("0", "a caption")]),
    "folders": ([("a/0.jpg", JPEG), ("a/0.txt", TEXT), ("b/0.jpg", JPEG), ("b/0.txt", b"two")],
                [("a/0", "a caption"), ("b/0", "two")]),
    "more files": ([("0.cls", b"3"), ("0.jpg", JPEG), ("0.seg.png", JPEG), ("0.txt", TEXT)], [("0", "a caption")]),
    "upper case": ([("X.JPG", JPEG), ("X.TXT", TEXT)], [("X", "a caption")]),
    "incomplete": ([("0.jpg", JPEG), ("1.txt", TEXT), ("2.jpg", JPEG), ("2.txt", b"two"), ("__meta__", b"x")],
                   [("2", "two")]),
    "again": ([("0.jpg", JPEG), ("0.txt", TEXT), ("1.jpg", JPEG), ("1.txt", b"two"), ("0.jpg", JPEG),
               ("0.txt", b"three")], [("0", "a caption"), ("1", "two"), ("0", "three")]),
    "other formats": ([("0.png", encoded(pixels(1), "PNG")), ("0.txt", TEXT), ("1.webp", encoded(pixels(2), "WEBP")),
                       ("1.txt", b"two")], [("0", "a caption"), ("1", "two")]),
    "long names": ([(f"{'d' * 120}/{'k' * 90}.jpg", JPEG), (f"{'d' * 120}/{'k' * 90}.txt", TEXT)],
                   [(f"{'d' * 120}/{'k' * 90}", "a caption")]),
    "names that escape": ([("../../0.jpg", JPEG), ("../../0.txt", TEXT), ("/1.jpg", JPEG), ("/1.txt", b"two")],
                          [("../../0", "a caption"), ("/1", "two")]),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_samples_are_those_of_webdataset(tmp_path: Path, layout: str):
    webdataset = pytest.importorskip("webdataset")
    files, expected = LAYOUTS[layout]
    path = write_tar(tmp_path / "data" / "00000.tar", files)
    ours = [(sample.key.removeprefix("00000/"), sample.image, sample.caption) for sample in TarDataset(str(path))]
    assert [(key.partition("#")[0], caption) for key, _, caption in ours] == expected
    assert len({key for key, *_ in ours}) == len(ours)
    items = webdataset.WebDataset([str(path)], shardshuffle=False)
    kinds = ("jpg", "png", "webp")
    theirs = [
        (item["__key__"], next(item[kind] for kind in kinds if kind in item), item["txt"].decode())
        for item in items
        if "txt" in item and any(kind in item for kind in kinds)
    ]
    assert theirs == [(key.partition("#")[0], *rest) for key, *rest in ours]


def test_dots_in_keys_are_kept(tmp_path: Path):
    """webdataset finds no image here, because it takes all after the first dot as the extension."""
    names = ["PMC1.2_f1", "PMC1.2_f2", "PMC1.3_f1"]
    path = write_tar(
        tmp_path / "a.tar",
        [(f"{name}.{kind}", content) for name in names for kind, content in (("jpg", JPEG), ("txt", name.encode()))],
    )
    dataset = TarDataset(str(path))
    assert [(sample.key, sample.caption) for sample in dataset] == [(f"a/{name}", name) for name in names]


def test_caption_of_json(tmp_path: Path):
    folder = write_tars(tmp_path / "data", 20, captions="long_caption")
    with pytest.raises(UserError, match=r"20 groups of files without a caption, the first 00000.tar/000000000; their "
                                        r"JSON has the keys long_caption, url; set caption_key"):  # fmt: skip
        TarDataset(str(folder))
    with pytest.raises(UserError, match=r"keys long_caption, url"):
        TarDataset(str(folder), caption_key="short")
    dataset = TarDataset(str(folder), caption_key="long_caption")
    assert [dataset[i].caption for i in (0, 19)] == [dataset.caption(i) for i in (0, 19)] == ["caption 0", "caption 19"]
    assert dataset[3].meta == {"long_caption": "caption 3", "url": "https://example.org"}
    assert list(dataset.captions()) == [f"caption {i}" for i in range(20)]
    assert [dataset.caption_bytes(i) for i in (0, 19)] == [9, 10]
    # The key `caption` needs no setting, and a .txt comes first.
    write_tar(tmp_path / "b.tar", {"0.jpg": JPEG, "0.json": b'{"caption": "json"}', "1.jpg": JPEG, "1.txt": b"text",
                                   "1.json": b'{"caption": "json"}'})  # fmt: skip
    assert list(TarDataset(str(tmp_path / "b.tar")).captions()) == ["json", "text"]
    assert list(TarDataset(str(tmp_path / "b.tar"), caption_key="caption").captions()) == ["json", "json"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a-{000..002}.tar", ["a-000.tar", "a-001.tar", "a-002.tar"]),
        ("{a,b}/{8..11}.tar", [f"{folder}/{i}.tar" for folder in "ab" for i in (8, 9, 10, 11)]),
        ("{08..11}.tar", ["08.tar", "09.tar", "10.tar", "11.tar"]),
        ("plain.tar", ["plain.tar"]),
    ],
)
def test_braces_expand_as_in_webdataset(pattern: str, expected: list[str]):
    braceexpand = pytest.importorskip("braceexpand")
    assert expand_braces(pattern) == expected == list(braceexpand.braceexpand(pattern))


@pytest.mark.parametrize(
    "pattern", ["{00..01.tar", "{a}.tar", "{5..1}.tar", "{a,{b,c}}.tar", "00}.tar", "{0..99999999}.tar"]
)
def test_wrong_braces_are_named(tmp_path: Path, pattern: str):
    with pytest.raises(UserError, match=re.escape(pattern) if "99" not in pattern else "not a range"):
        TarDataset(str(tmp_path / pattern))


def test_paths_name_tar_files(tmp_path: Path):
    folder = write_tars(tmp_path / "data", 40)
    write_tars(tmp_path / "data" / "more" / "deep", 8, first=40)
    whole = TarDataset(str(folder))
    assert whole.shard_sizes == [8] * 6
    assert [whole[i].key for i in (0, 47)] == ["00000/000000000", "more/deep/00000/000000007"]
    (tmp_path / "empty").mkdir()
    part = TarDataset(f"{folder}/{{00001..00003}}.tar")
    assert [sample.caption for sample in part] == [f"caption {i}" for i in range(8, 32)]
    assert [sample.caption for sample in TarDataset(f"{folder}/00001.tar")] == [f"caption {i}" for i in range(8, 16)]
    for path, message in [
        (f"{folder}/{{00003..00005}}.tar", "00005.tar does not exist"),
        (f"{folder}/{{00001,00001}}.tar", "names 00001.tar twice"),
        (f"{folder}/{{0,../1}}.tar", "is not a .tar file below"),
        (str(tmp_path / "none"), "no such folder"),
        (str(tmp_path / "empty"), "dataset.json is missing"),
    ]:
        with pytest.raises(UserError, match=message):
            open_dataset(path, "train")


def test_names_tell_the_split(tmp_path: Path):
    for name, first in (("cc3m-train", 0), ("cc3m-validation", 8)):
        write_tar(tmp_path / "named" / f"{name}-0000.tar", {"0.jpg": JPEG, "0.txt": f"{first}".encode()})
    write_tars(tmp_path / "folders" / "train", 8)
    write_tars(tmp_path / "folders" / "test", 8)
    write_tars(tmp_path / "plain", 8)
    assert [TarDataset(str(tmp_path / "named"), split).caption(0) for split in ("train", "val")] == ["0", "8"]
    assert len(TarDataset(str(tmp_path / "folders"), "test")) == 8
    assert len(TarDataset(str(tmp_path / "folders"), "all")) == 16
    with pytest.raises(MissingSplit, match="has no split 'val'; its splits are test, train"):
        TarDataset(str(tmp_path / "folders"), "val")
    with pytest.raises(
        MissingSplit, match="no split 'val': the names of its tar files tell no split; use the split train"
    ):
        TarDataset(str(tmp_path / "plain"), "val")


def test_index_is_made_once_and_only_in_the_cache(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    folder = write_tars(tmp_path / "data", 24)
    before = sorted(path.name for path in folder.rglob("*"))
    names: list[str] = []
    make = tar_cache.index_tar

    def counted(storage: Any, name: str, *rest: Any) -> Any:
        names.append(name)
        return make(storage, name, *rest)

    monkeypatch.setattr(tar_cache, "index_tar", counted)
    first = TarDataset(str(folder))
    assert sorted(names) == ["00000.tar", "00001.tar", "00002.tar"]
    assert sorted(path.name for path in folder.rglob("*")) == before
    assert len(list(cache.glob("*.safetensors"))) == 3
    second = TarDataset(f"{folder}/{{00000..00002}}.tar")
    assert (len(names), second.fingerprint) == (3, first.fingerprint)
    # Another content, another time, a damaged index and another key of captions each need a new index.
    write_tars(folder, 24, first=100)
    changed = TarDataset(str(folder))
    assert (len(names), changed[0].caption) == (6, "caption 100")
    assert changed.fingerprint != first.fingerprint
    os.utime(folder / "00001.tar", ns=(0, 0))
    assert TarDataset(str(folder)).fingerprint == changed.fingerprint
    assert names[6:] == ["00001.tar"]
    # A truncated file, and a file with a changed byte of an array.
    for damage in (lambda data: data[:-30], lambda data: data[:-30] + bytes([data[-30] ^ 1]) + data[-29:]):
        count = len(names)
        for path in cache.glob("*.safetensors"):
            path.write_bytes(damage(path.read_bytes()))
        assert TarDataset(str(folder)).fingerprint == changed.fingerprint
        assert len(names) == count + 3
    with pytest.raises(UserError, match="24 groups of files without a caption, .*; a caption is the key 'x'"):
        TarDataset(str(folder), caption_key="x")
    assert len(names) == 16
    # The fingerprint follows the content, not the place.
    shutil.copytree(folder, tmp_path / "moved")
    assert TarDataset(str(tmp_path / "moved")).fingerprint == changed.fingerprint


def test_processes_share_the_work_on_indexes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A lock belongs to an open file, so threads compete for it as processes do."""
    folder = write_tars(tmp_path / "data", 32)
    names: list[str] = []
    make, barrier = tar_cache.index_tar, threading.Barrier(4)

    def counted(storage: Any, name: str, *rest: Any) -> Any:
        names.append(name)
        return make(storage, name, *rest)

    monkeypatch.setattr(tar_cache, "index_tar", counted)
    fingerprints = []

    def use() -> None:
        barrier.wait()
        fingerprints.append(TarDataset(str(folder)).fingerprint)

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(names) == [f"0000{i}.tar" for i in range(4)]
    assert len(fingerprints) == 4
    assert len(set(fingerprints)) == 1


def test_unwritable_cache_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = write_tars(tmp_path / "data", 8)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BCLIP_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot be written to .*file/shards: .*set BCLIP_CACHE"):
        TarDataset(str(folder))


def test_url_gives_the_same_samples(tmp_path: Path):
    folder = write_tars(tmp_path / "data", 24)
    local = list(TarDataset(str(folder)))
    system = fsspec.filesystem("memory")
    for path in folder.iterdir():
        system.pipe_file(f"/foreign/x/{path.name}", path.read_bytes())
    try:
        for url, read in [
            ("memory://foreign/x", ReadConfig()),
            ("memory://foreign/x/{00000..00002}.tar", ReadConfig(cache_dir=str(tmp_path / "copies"))),
        ]:
            dataset = open_dataset(url, "train", read)
            assert isinstance(dataset, TarDataset)
            samples = dataset.fetch(range(24))()
            assert samples == local
            assert list(dataset.captions()) == [f"caption {i}" for i in range(24)]
            assert dataset.fingerprint == TarDataset(str(folder)).fingerprint
        assert len(list((tmp_path / "copies").glob("*.tar"))) == 3
        with pytest.raises(UserError, match=r"memory://foreign/x/00007.tar does not exist"):
            open_dataset("memory://foreign/x/{00000,00007}.tar", "train")
    finally:
        system.rm("/foreign", recursive=True)


def test_dataset_survives_pickling(tmp_path: Path):
    dataset = TarDataset(str(write_tars(tmp_path / "data", 8)))
    assert list(pickle.loads(pickle.dumps(dataset))) == list(dataset)


def turned(image: np.ndarray) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(image, quality=95, exif=exif)


def test_loader_decodes_every_format(tmp_path: Path):
    """PNG, WebP, TIFF, grey, palettes, CMYK and turned JPEG files give the pixels that evaluation sees."""
    images = {
        "0.png": encoded(pixels(0), "PNG"), "1.webp": encoded(pixels(1), "WEBP", lossless=True),
        "2.tif": encoded(pixels(2), "TIFF"), "3.jpg": encoded(pixels(3), mode="CMYK", quality=95),
        "4.png": encoded(pixels(4), "PNG", "P"), "5.jpeg": encoded(pixels(5), mode="L", quality=95),
        "6.jpg": turned(pixels(6)), "7.jpg": encoded(pixels(7), quality=95), "8.gif": encoded(pixels(8), "GIF"),
        "9.png": b"\x89PNG\r\n\x1a\n damaged",
    }  # fmt: skip
    files = [(name.partition(".")[0] + "." + kind, content) for name, data in images.items()
             for kind, content in ((name.partition(".")[2], data), ("txt", name.encode()))]  # fmt: skip
    dataset = TarDataset(str(write_tar(tmp_path / "a.tar", files)))
    preprocess = Preprocess(PreprocessConfig(size=24))
    by_key = {f"a/{name.partition('.')[0]}": (number, data) for number, (name, data) in enumerate(images.items())}
    for augment in (False, True):
        with loader(dataset, augment=augment, num_threads=1) as source:
            batches = take(source, 3)
        rows = [row for batch in batches for row in zip([batch.epoch] * 8, batch.keys, batch.images, strict=True)]
        for epoch, key, image in rows:
            number, data = by_key[key]
            rgb = read_rgb(data, lambda: "")
            if augment:
                top, left, height, width = random_resized_crop_box(rgb.height, rgb.width, 1, epoch, number)
                rgb = rgb.crop((left, top, left + width, top + height)).resize((24, 24), Image.Resampling.BICUBIC)
                assert torch.equal(image, torch.from_numpy(np.array(rgb)))
            else:
                assert torch.equal(image, preprocess.to_uint8(rgb))
        assert {record.key for batch in batches for record in batch.bad} == {"a/9"}
        assert {key for _, key, _ in rows} == by_key.keys() - {"a/9"}
    assert verify_tars(str(tmp_path / "a.tar")) == [
        "a.tar: sample a/9: its image cannot be decoded: Truncated File Read"
    ]


def test_tar_files_are_a_member_of_a_mixture(tmp_path: Path):
    write_tars(tmp_path / "json", 16, captions="text")
    write_tars(tmp_path / "txt", 48, first=100)
    listed = [{"path": str(tmp_path / "txt"), "weight": 3},
              {"path": f"{tmp_path}/json/{{00000..00001}}.tar", "weight": 1, "caption_key": "text"}]  # fmt: skip
    dataset = open_dataset(as_sources(listed, "data.shards"), "train")
    assert isinstance(dataset, MixedDataset)
    assert dataset.names == ["txt", "json"]
    sampler = ShardSampler(dataset.shard_sizes, dataset.fingerprint, batch_size=8, mixture=dataset.mixture)
    captions = [dataset[sampler.sample(0, position)].caption for position in range(64)]
    assert sum(int(caption.split()[1]) < 100 for caption in captions) == 16
    assert len({sample.key for sample in dataset}) == 64
    with pytest.raises(UserError, match="dataset json: .*set caption_key"):
        open_dataset(as_sources([{"path": str(tmp_path / name), "weight": 1} for name in ("txt", "json")], ""), "train")


def test_index_of_large_tar_reads_each_byte_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Members lie across the pieces in which a tar file is read."""
    monkeypatch.setattr("bclip_fast.data.shards.tar_members._PIECE", 1024)
    folder = write_tars(tmp_path / "data", 8)
    small = TarDataset(str(folder))
    assert [sample.caption for sample in small] == [f"caption {i}" for i in range(8)]
    content = (folder / "00000.tar").read_bytes()
    index = tar_index.index_tar(small.storage, "00000.tar", len(content), "")
    assert index.sha256 == hashlib.sha256(content).hexdigest()
    assert json.dumps(index.reasons) == "{}"
