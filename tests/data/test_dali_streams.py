"""The loader with DALI on a GPU copies its batches on a separate stream: a simulated GPU without DALI's decoder."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from fake_cuda import DEFAULT_STREAM, DeviceTensor, FakeCuda, fake_cuda
from synthetic import write_shards

from bclip_fast.data.dali_loader import DaliLoader
from bclip_fast.data.sampler import ShardSampler
from bclip_fast.data.shards.reader import ShardDataset
from bclip_fast.data.transform import Preprocess, PreprocessConfig

SIZE = 24


class Pipeline:
    """In place of DALI's pipeline. The pixels of an image are the length of its file, modulo 256."""

    def feed_input(self, name: str, arrays: list[np.ndarray]) -> None:
        if name == "jpegs":
            self.lengths = [len(array) % 256 for array in arrays]

    def run(self) -> tuple[Any]:
        pixels = torch.tensor(self.lengths, dtype=torch.uint8)[:, None, None, None].expand(-1, SIZE, SIZE, 3)
        return (types.SimpleNamespace(as_tensor=lambda: DeviceTensor(pixels.clone())),)


class SimulatedLoader(DaliLoader):
    """A loader whose threads see the simulated GPU."""

    gpu: FakeCuda

    def _build(self) -> Any:
        return Pipeline()

    def _allocate(self, *arguments: Any) -> Any:
        with self.gpu:
            return super()._allocate(*arguments)

    def _fill(self, *arguments: Any) -> Any:
        with self.gpu:
            return super()._fill(*arguments)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> ShardDataset:
    return ShardDataset(write_shards(tmp_path_factory.mktemp("data") / "shards", 32, 4))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    def feed(source: Any, target: DeviceTensor, cuda_stream: Any) -> None:
        feeds.append(cuda_stream)
        target.copy_(source)

    feeds: list[Any] = []
    for name in ("nvidia", "nvidia.dali", "nvidia.dali.plugin", "nvidia.dali.plugin.pytorch"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["nvidia.dali.plugin.pytorch"].feed_ndarray = feed  # type: ignore[attr-defined]
    with fake_cuda() as fake:
        fake.feeds = feeds  # type: ignore[attr-defined]
        SimulatedLoader.gpu = fake
        yield fake


def make_loader(dataset: ShardDataset, micro_batch_size: int) -> SimulatedLoader:
    sampler = ShardSampler(
        dataset.shard_sizes, dataset.fingerprint, batch_size=8, micro_batch_size=micro_batch_size, seed=1
    )
    preprocess = Preprocess(PreprocessConfig(size=SIZE))
    return SimulatedLoader(
        dataset, lambda texts: [[1] for _ in texts], sampler, preprocess, device_id=0, pin_memory=True
    )


def expected_pixels(dataset: ShardDataset, keys: list[str]) -> list[int]:
    read: Any = dataset.fetch(range(sum(dataset.shard_sizes)))()
    samples = {sample.key: len(sample.image) % 256 for sample in read}
    return [samples[key] for key in keys]


def test_feeder_copies_and_waits_only_on_its_stream(dataset: ShardDataset, gpu: FakeCuda) -> None:
    with make_loader(dataset, 0) as loader:
        for _ in range(3):
            batch = next(loader)
            assert "default" not in {transfer.stream for transfer in gpu.transfers}
            images: Any = batch.images
            assert images.device == torch.device("cuda", 0)
            # The allocator may not give the memory to another tensor while the trainer's stream reads it.
            assert images.allocated_on is loader._stream
            assert images.recorded_streams == [DEFAULT_STREAM]
            assert images.memory[:, 0, 0, 0].tolist() == expected_pixels(dataset, batch.keys)
    assert set(gpu.feeds) == {loader._stream}  # type: ignore[attr-defined]
    assert "wait" in {transfer.kind for transfer in gpu.transfers}
    assert {transfer.stream for transfer in gpu.transfers} == {loader._stream.name}


def test_micro_batches_come_in_pinned_host_memory(dataset: ShardDataset, gpu: FakeCuda) -> None:
    """GradCache keeps them on the host, so the trainer need not copy them there in the middle of a step."""
    with make_loader(dataset, 4) as loader:
        for _ in range(3):
            batch = next(loader)
            assert not isinstance(batch.images, DeviceTensor)
            assert gpu.is_pinned(batch.images)
            assert gpu.is_pinned(batch.ids)
            assert batch.images[:, 0, 0, 0].tolist() == expected_pixels(dataset, batch.keys)
    assert {transfer.stream for transfer in gpu.transfers} == {loader._stream.name}
