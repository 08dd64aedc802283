"""Tensors on a simulated GPU in the parts of training that otherwise see only the host's: files, shards, constants."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fake_cuda import CPU, CUDA, DeviceTensor, FakeCuda, fake_cuda
from grad_cache_steps import micro_batches
from synthetic import tiny_model, tiny_run
from towers import RESNET_VISION

from bclip_fast.model.biomedclip import BiomedClip
from bclip_fast.ops.dispatch import use_backend
from bclip_fast.ops.image import CLIP_MEAN, CLIP_STD
from bclip_fast.train.ema import Ema
from bclip_fast.train.engine import deepspeed
from bclip_fast.train.engine.base import persistent_buffers
from bclip_fast.train.engine.deepspeed import DeepSpeedEngine
from bclip_fast.train.grad_cache import SpillBuffer
from bclip_fast.train.replay import Dump, read_dump, write_dump


@pytest.fixture
def gpu() -> Any:
    with fake_cuda() as fake:
        yield fake


@pytest.mark.parametrize("limit", [0, 1 << 30], ids=["file", "memory"])
def test_spill_buffer_keeps_images_of_gpu(gpu: FakeCuda, limit: int) -> None:
    """DALI may leave the images on the GPU. They come back in pinned memory, which the GPU reads without a wait."""
    batch, _ = micro_batches()[0]
    load = SpillBuffer(limit).add(replace(batch, images=batch.images.to(CUDA), ids=batch.ids.pin_memory()))
    loaded = load()
    assert torch.equal(loaded.images.cpu(), batch.images)
    assert torch.equal(loaded.ids, batch.ids)
    assert gpu.is_pinned(loaded.ids)
    assert isinstance(loaded.images, DeviceTensor) or gpu.is_pinned(loaded.images)


def test_spill_buffer_returns_pageable_memory_without_gpu() -> None:
    batch, _ = micro_batches()[0]
    loaded = SpillBuffer(0).add(batch)()
    assert torch.equal(loaded.images, batch.images)
    assert not loaded.images.is_pinned()


def test_dump_holds_images_of_gpu(gpu: FakeCuda, tmp_path: Path) -> None:
    batch, seed = micro_batches()[0]
    on_gpu = replace(batch, images=batch.images.to(CUDA))
    config = tiny_run(tmp_path, tmp_path)
    folder = write_dump(tmp_path, Dump(config, 1, 2.0, 3.0, 0.0, [(on_gpu, seed)], {"weight": torch.ones(2)}))
    (read, _), *_ = read_dump(folder).batches
    assert torch.equal(read.images, batch.images)


@pytest.mark.parametrize("offloaded", [False, True], ids=["shards on the GPU", "shards on the host"])
def test_ema_shards_are_gathered_on_gpu(gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch, offloaded: bool) -> None:
    """With offloaded parameters, ZeRO 3 and its EMA keep the shards on the host. NCCL sends only from a GPU."""

    def all_gather(parts: list[torch.Tensor], part: torch.Tensor) -> None:
        assert {tensor.device for tensor in (*parts, part)} == {CUDA}
        for rank, target in enumerate(parts):
            target.copy_(part + rank)

    monkeypatch.setattr(dist, "all_gather", all_gather)
    monkeypatch.setattr(deepspeed.distributed, "world_size", lambda: 2)
    shard = torch.arange(4.0).to(CPU if offloaded else CUDA)
    engine: Any = object.__new__(DeepSpeedEngine)
    engine._stage, engine.device, engine._shapes = 3, CUDA, {"weight": torch.Size([7])}
    engine.local_weights = lambda: {"weight": shard}
    ema = Ema(engine, 0.5, {})
    ema.update()
    gathered = ema.state()["weight"]
    assert gathered.device == CPU
    assert gathered.tolist() == [0, 1, 2, 3, 1, 2, 3]


MODELS = {"vit": tiny_model(), "resnet": replace(tiny_model(), vision=RESNET_VISION)}


def constants(model: BiomedClip) -> tuple[torch.Tensor, torch.Tensor]:
    visual: Any = model.visual
    normalization = visual.normalization if hasattr(visual, "normalization") else visual.patch_embed.normalization
    return normalization.mean.flatten(), normalization.std.flatten()


@pytest.mark.parametrize("name", MODELS)
def test_pixel_constants_are_exact_in_every_model_and_in_no_state(name: str) -> None:
    exact = torch.tensor(CLIP_MEAN), torch.tensor(CLIP_STD)
    model = BiomedClip(MODELS[name])
    assert not [key for key in model.state_dict() if "normalization" in key]
    assert persistent_buffers(model).keys() == {key for key, _ in model.named_buffers() if "normalization" not in key}
    with torch.device("meta"):
        empty = BiomedClip(MODELS[name])
    empty.load_state_dict(model.state_dict(), assign=True)
    for made in (model, model.bfloat16(), model.double(), empty, BiomedClip(MODELS[name]).to_empty(device="cpu")):
        assert all(map(torch.equal, constants(made), exact))
    model.visual.set_normalization((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert torch.equal(constants(model.half())[1], torch.tensor((0.4, 0.5, 0.6)))


@pytest.mark.parametrize("name", MODELS)
def test_image_tower_copies_nothing_from_host(name: str, gpu: FakeCuda) -> None:
    model = BiomedClip(MODELS[name]).to(CUDA)
    side = MODELS[name].vision.image_size
    images = torch.zeros((2, side, side, 3), dtype=torch.uint8, device=CUDA)
    gpu.clear()
    with use_backend("reference"):
        model.visual(images)
    assert gpu.transfers == []
