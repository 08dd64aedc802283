"""Batches of the loader: independent of threads, exact resume, documented pixels, errors, closing."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from loaders import have_same_samples, loader, take
from PIL import Image
from synthetic import write_shards
from torch import Tensor

from bclip_fast.data.batch import Batch
from bclip_fast.data.shards.reader import ShardDataset
from bclip_fast.data.transform import Preprocess, PreprocessConfig, random_resized_crop_box
from bclip_fast.ops import image as image_ops


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> ShardDataset:
    return ShardDataset(write_shards(tmp_path_factory.mktemp("data") / "shards", num_samples=40, num_val=1))


def test_batches_are_independent_of_threads(dataset: ShardDataset):
    with loader(dataset, num_threads=1, prefetch_batches=0) as one, loader(dataset, num_threads=3) as three:
        first, second = take(one, 11), take(three, 11)
    assert have_same_samples(first, second)
    assert first[0].images.shape == (8, 24, 24, 3)
    assert first[0].images.dtype == torch.uint8
    assert len(first[0].lengths) == 8
    assert len(first[0].ids) == sum(first[0].lengths)
    assert [batch.epoch for batch in first] == [0] * 5 + [1] * 5 + [2]
    # The same sample is cropped differently in the next epoch.
    pixels = [{key: image for batch in part for key, image in zip(batch.keys, batch.images, strict=True)}
              for part in (first[:5], first[5:10])]  # fmt: skip
    assert pixels[0].keys() == pixels[1].keys()
    assert len(pixels[0]) == 40
    assert sum(torch.equal(pixels[0][key], pixels[1][key]) for key in pixels[0]) < 5


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_resume_at_any_batch_and_world_size_is_exact(dataset: ShardDataset, world_size: int):
    with loader(dataset) as source:
        expected = take(source, 8)
    for stop in range(7):
        with loader(dataset) as source:
            take(source, stop)
            state = source.state_dict()
        assert state["samples"] == 8 * stop
        parts = []
        for rank in range(world_size):
            with loader(dataset, rank, world_size) as source:
                next(source)  # batches prefetched before load_state_dict must be discarded
                source.load_state_dict(state)
                parts.append(take(source, 8 - stop))
        joined = [
            Batch(torch.cat([b.images for b in ranks]), torch.cat([b.ids for b in ranks]),
                  [length for b in ranks for length in b.lengths], [key for b in ranks for key in b.keys],
                  ranks[0].epoch)
            for ranks in zip(*parts, strict=True)
        ]  # fmt: skip
        assert have_same_samples(joined, expected[stop:])


def test_pixels_equal_the_documented_transform(dataset: ShardDataset):
    by_key = {dataset[i].key: i for i in range(len(dataset))}
    preprocess = Preprocess(PreprocessConfig(size=24))
    with loader(dataset) as source, loader(dataset, augment=False) as plain:
        training, evaluation = next(source), next(plain)
    for row, key in enumerate(training.keys):
        image = Image.fromarray(image_ops.decode(dataset[by_key[key]].image).numpy())
        assert torch.equal(evaluation.images[row], preprocess.to_uint8(image))
        top, left, height, width = random_resized_crop_box(40, 48, 1, 0, by_key[key])
        crop = image.crop((left, top, left + width, top + height)).resize((24, 24), Image.Resampling.BICUBIC)
        assert torch.equal(training.images[row], torch.from_numpy(np.array(crop)))


def test_error_of_tokenizer_reaches_the_consumer(dataset: ShardDataset):
    def fail(captions: list[str]) -> Tensor:
        raise KeyError("no such token")

    with loader(dataset, tokenize=fail) as source, pytest.raises(KeyError, match="no such token"):
        next(source)


def test_close_ends_the_threads(dataset: ShardDataset):
    before = threading.active_count()
    with loader(dataset, num_threads=4, prefetch_batches=4) as source:
        next(source)
        assert threading.active_count() > before
    assert threading.active_count() == before
