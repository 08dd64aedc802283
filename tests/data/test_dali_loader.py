"""The DALI loader's batches equal those of `Loader`: samples, crops and resume exactly, pixels nearly."""

from __future__ import annotations

import dataclasses
import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from damage import spoil
from foreign_tars import encoded, pixels, write_tar
from loaders import have_same_samples
from PIL import Image
from run_results import bad_sample_lines, loss_curve
from synthetic import tiny_run, write_shards

from bclip_fast.data.batch import Batch
from bclip_fast.data.loader import Loader
from bclip_fast.data.sampler import ShardSampler
from bclip_fast.data.shards.filtered import FilteredDataset
from bclip_fast.data.shards.format import Sample
from bclip_fast.data.shards.reader import ShardDataset
from bclip_fast.data.shards.tar_dataset import TarDataset
from bclip_fast.data.shards.writer import ShardWriter
from bclip_fast.data.transform import Preprocess, PreprocessConfig
from bclip_fast.train.config import DataConfig
from bclip_fast.train.trainer import train

pytest.importorskip("nvidia.dali", reason="DALI is not installed: pip install 'bclip_fast[dali]'")
from bclip_fast.data.dali_loader import DaliLoader

# Limits for the difference between DALI's floating-point resampling and Pillow's fixed-point resampling, in levels of
# 255. Measured values: mean 0.10 to 0.31, 99th percentile 1 to 4.
MAX_MEAN, MAX_P99 = 0.35, 4


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> ShardDataset:
    """Smooth images: wide, high, smaller and larger than the result, some grey, one with an EXIF orientation."""
    generator = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("data") / "shards"
    with ShardWriter(folder, max_shard_bytes=200_000) as writer:
        for i in range(36):
            height, width = int(generator.integers(40, 400)), int(generator.integers(40, 400))
            noise = Image.fromarray(generator.integers(0, 256, (9, 9, 3), dtype=np.uint8))
            image = noise.resize((width, height), Image.Resampling.BICUBIC)
            exif = Image.Exif()
            exif[0x112] = 6 if i == 5 else 1
            data = io.BytesIO()
            image.convert("L" if i % 7 == 3 else "RGB").save(data, "JPEG", quality=90, exif=exif)
            writer.write(Sample(f"image{i}", data.getvalue(), f"caption {i}"), "train")
    return ShardDataset(folder)


def make_loader(cls: type[Loader], dataset: ShardDataset, rank: int = 0, world_size: int = 1, **changes: Any) -> Any:
    sampler = ShardSampler(
        dataset.shard_sizes, dataset.fingerprint, batch_size=8, seed=1, rank=rank, world_size=world_size
    )
    config = PreprocessConfig(size=96, **changes.pop("preprocess", {}))
    return cls(dataset, lambda texts: [[len(text)] for text in texts], sampler, Preprocess(config), **changes)


def assert_near(batch: Batch, expected: Batch) -> None:
    assert batch.keys == expected.keys
    assert batch.epoch == expected.epoch
    assert torch.equal(batch.ids, expected.ids)
    assert batch.images.shape == expected.images.shape
    assert batch.images.dtype == torch.uint8
    difference = (batch.images.int() - expected.images.int()).abs().float()
    for key, row in zip(batch.keys, difference, strict=True):
        assert row.mean() <= MAX_MEAN, key
        assert row.quantile(0.99) <= MAX_P99, key


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"crop_scale": (0.2, 0.6)},
        {"augment": False},
        {"augment": False, "preprocess": {"resize_mode": "squash"}},
        {"preprocess": {"interpolation": "bilinear"}},
    ],
    ids=["crops", "small crops", "evaluation", "squash", "bilinear"],
)
def test_both_loaders_give_the_same_batches(
    dataset: ShardDataset, changes: dict[str, Any], caplog: pytest.LogCaptureFixture
):
    with (
        make_loader(DaliLoader, dataset, **dict(changes)) as dali,
        make_loader(Loader, dataset, **dict(changes)) as native,
    ):
        for _ in range(9):
            assert_near(next(dali), next(native))
    assert "DALI failed a batch" not in caplog.text


def test_resume_at_any_batch_is_exact(dataset: ShardDataset):
    """On two ranks, pixels are equal bit for bit, no matter which batches DALI decoded before."""
    for rank in range(2):
        with make_loader(DaliLoader, dataset, rank, 2) as source:
            states, batches = [], []
            for _ in range(6):
                states.append(source.state_dict())
                batches.append(next(source))
        with make_loader(DaliLoader, dataset, rank, 2, num_threads=1) as source:
            for stop in (3, 0, 5, 1, 4, 2):
                source.load_state_dict(states[stop])
                assert have_same_samples([next(source)], [batches[stop]])
        # The other loader continues from the same state.
        with make_loader(Loader, dataset, rank, 2) as source:
            source.load_state_dict(states[4])
            assert_near(batches[4], next(source))


def test_damaged_images_are_replaced_after_dali_fails(
    dataset: ShardDataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    folder = shutil.copytree(dataset.root, tmp_path / "shards")
    # A truncated JPEG, bytes that are not a JPEG, a wrong offset in the index, and a changed bit that DALI decodes.
    kinds = [(4, "pixels"), (11, "header"), (20, "place"), (30, "bit")]
    keys = {spoil(folder, index, kind) for index, kind in kinds}
    damaged = ShardDataset(folder)
    with make_loader(DaliLoader, damaged) as dali, make_loader(Loader, damaged) as native:
        for _ in range(9):
            batch, expected = next(dali), next(native)
            assert_near(batch, expected)
            assert batch.bad == expected.bad
            keys -= {bad.key for bad in batch.bad}
    assert not keys
    assert "DALI failed a batch" in caplog.text


def test_filter_selects_the_same_samples(dataset: ShardDataset):
    chosen = FilteredDataset(dataset, "key > 'image2' and key < 'image7'")
    with make_loader(DaliLoader, chosen) as dali, make_loader(Loader, chosen) as native:
        batches = [(next(dali), next(native)) for _ in range(4)]
    for batch, expected in batches:
        assert_near(batch, expected)
    keys = {key for batch, _ in batches for key in batch.keys}
    assert len(chosen) == 20
    assert len(keys) >= 16
    assert all("image2" < key < "image7" for key in keys)


def test_training_with_dali_gives_nearly_the_same_losses(tmp_path: Path):
    shards = write_shards(tmp_path / "shards")
    spoil(shards, 7)
    settings = DataConfig(str(shards), shuffle_block=32)
    native = train(tiny_run(tmp_path / "native", shards, data=settings))
    dali = train(tiny_run(tmp_path / "dali", shards, data=dataclasses.replace(settings, loader="dali")))
    keys = [[line["key"] for line in bad_sample_lines(run)] for run in (native, dali)]
    assert keys[0] == keys[1] != []
    torch.testing.assert_close(loss_curve(dali), loss_curve(native), rtol=0, atol=0.05)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_gives_nearly_the_same_pixels(dataset: ShardDataset):
    with make_loader(DaliLoader, dataset, device_id=0) as dali, make_loader(Loader, dataset) as native:
        for _ in range(9):
            batch = next(dali)
            assert batch.images.device.type == "cuda"
            assert_near(dataclasses.replace(batch, images=batch.images.cpu()), next(native))


def test_other_formats_are_decoded_beside_dali(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """DALI gets the JPEG files, and Pillow decodes PNG and turned files to the same pixels as for `Loader`."""
    monkeypatch.setenv("BCLIP_CACHE", str(tmp_path / "cache"))
    exif = Image.Exif()
    exif[0x112] = 6
    files = []
    for i in range(16):
        options: dict[str, Any] = {"kind": "PNG"} if i % 3 == 0 else {"exif": exif} if i % 3 == 1 else {"quality": 95}
        files += [(f"{i}.{'png' if i % 3 == 0 else 'jpg'}", encoded(pixels(i), **options)), (f"{i}.txt", b"a caption")]
    tars = TarDataset(str(write_tar(tmp_path / "a.tar", files)))
    with make_loader(Loader, tars) as ours, make_loader(DaliLoader, tars) as theirs:
        expected, actual = next(ours), next(theirs)
    assert expected.keys == actual.keys
    assert not actual.bad
    for key, left, right in zip(expected.keys, expected.images, actual.images, strict=True):
        is_jpeg = int(key.partition("/")[2]) % 3 == 2
        difference = (left.int() - right.int()).abs().float()
        assert difference.mean() <= (MAX_MEAN if is_jpeg else 0)
