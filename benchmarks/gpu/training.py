"""Short trainings of the real model with DDP over NCCL on one rank, or of a tiny model over gloo in a rehearsal.

The engine wraps a model in DDP only for several ranks. So this module lets it see two ranks while it wraps the model.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from bclip_fast import distributed
from bclip_fast.benchmarks.cases import CAPTION_TOKENS, TINY
from bclip_fast.data.batch import Batch
from bclip_fast.loss import ClipLoss
from bclip_fast.model.biomedclip import BiomedClip, BiomedClipConfig
from bclip_fast.model.presets import preset
from bclip_fast.model.text import TextConfig
from bclip_fast.model.vision import VisionConfig
from bclip_fast.train import engine as engines
from bclip_fast.train.engine import Engine, EngineConfig
from bclip_fast.train.grad_cache import GradCache
from bclip_fast.train.schedule import OptimConfig
from bclip_fast.train.spill import SpillBuffer
from bclip_fast.train.step_timer import StepTimer

ROOT = Path(__file__).resolve().parents[2]
STEPS = 10
MICRO_BATCHES = 2
OPTIONS = EngineConfig(name="ddp", precision="bf16")


def model_config() -> BiomedClipConfig:
    """Return ViT-B/16 with PubMedBERT, or a tiny model whose heads our CUDA kernels take."""
    if not TINY:
        return preset("biomedclip_b16")
    vision = VisionConfig(image_size=32, patch_size=16, width=64, layers=2, heads=2)
    text = TextConfig(context_length=12, vocab_size=96, width=64, layers=2, heads=2, max_positions=16)
    return BiomedClipConfig(embed_dim=24, vision=vision, text=text)


def join_group(device: str) -> None:
    """Join a process group of one rank, over NCCL on a GPU, and use its collectives."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", **address})
    distributed.init()
    place = distributed.device()
    assert place.type == device, f"the process group is on {place}"
    assert distributed.total(3) == 3
    assert distributed.all_gather_object({"rank": 0}) == [{"rank": 0}]
    distributed.barrier()
    # The losses use these over several ranks.
    rows, gathered, reduced = torch.randn(3, 4, 5, device=place)
    _both("all_gather_single", "all_gather_into_tensor")(gathered, rows)
    _both("reduce_scatter_single", "reduce_scatter_tensor")(reduced, rows)
    dist.all_reduce(reduced, dist.ReduceOp.MAX)
    assert torch.equal(gathered, rows)
    assert torch.equal(reduced, rows)
    print(f"collectives on {place} over {dist.get_backend()}", flush=True)


def _both(new: str, old: str) -> Any:
    """Return a collective of torch by its name since 2.13 or its older name."""
    return getattr(dist, new, None) or getattr(dist, old)


@contextlib.contextmanager
def wrapped_in_ddp() -> Iterator[None]:
    """Make `build_engine` wrap the model in DDP, although there is only one rank."""
    build = engines.build_engine

    def build_with_ddp(*arguments: Any) -> Engine:
        with mock.patch.object(distributed, "world_size", return_value=2):
            engine = build(*arguments)
        assert isinstance(engine.module, torch.nn.parallel.DistributedDataParallel), "the engine has no DDP"
        return engine

    with mock.patch.object(engines, "build_engine", build_with_ddp):
        yield


def batches(config: BiomedClipConfig, size: int) -> list[Batch]:
    """Return random micro-batches on the host, as the loader yields them."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    side, words = config.vision.image_size, config.text.vocab_size
    made = []
    for number in range(MICRO_BATCHES):
        images = torch.randint(0, 256, (size, side, side, 3), dtype=torch.uint8, generator=generator, device="cpu")
        tokens = (CAPTION_TOKENS * size)[number * size : (number + 1) * size]
        lengths = [min(count, config.text.context_length) for count in tokens]
        ids = torch.randint(5, words - 1, (sum(lengths),), generator=generator, device="cpu")
        if torch.cuda.is_available():
            images, ids = images.pin_memory(), ids.pin_memory()
        made.append(Batch(images, ids, lengths, [str(i) for i in range(size)], 0))
    return made


def train_engine(device: str) -> None:
    """Train ten steps on one batch of two micro-batches, and read the state that a checkpoint would hold.

    Raises AssertionError if the loss does not fall, or a number is not finite.
    """
    torch.manual_seed(0)
    join_group(device)
    config, size = model_config(), 4 if TINY else 32
    with wrapped_in_ddp():
        model = BiomedClip(config).train()
        engine = engines.build_engine(model, OPTIONS, OptimConfig(grad_clip_norm=1.0), size * MICRO_BATCHES)
    loss_fn, spill, timer = ClipLoss(), SpillBuffer(0), StepTimer(engine.device)
    micro_batches, losses = batches(config, size), []
    start = time.perf_counter()
    for step in range(STEPS):
        cache = GradCache(engine, loss_fn, [size] * MICRO_BATCHES, spill)
        timer.start()
        for number, batch in enumerate(micro_batches):
            cache.add(batch, 100 * step + number)
        timer.lap("forward")
        losses.append(float(cache.loss()))
        cache.backward()
        timer.lap("backward")
        seconds = timer.finish()
        result = engine.step(1e-3 if TINY else 1e-4)
        assert math.isfinite(losses[-1]), losses
        assert math.isfinite(result.grad_norm), result
        assert not result.skipped, result
        print(f"step {step + 1}: loss {losses[-1]:.4f}, norm {result.grad_norm:.3f}, {seconds()}", flush=True)
    print(f"{STEPS * size * MICRO_BATCHES / (time.perf_counter() - start):.0f} pairs/s, with the first step")
    assert min(losses[-3:]) < losses[0], f"the loss does not fall: {losses}"
    state, moments = engine.model_state(), engine.optimizer_state().moments
    for name, tensor in state.items():
        assert tensor.device.type == "cpu", name
        assert tensor.isfinite().all(), name
    assert len(moments) == sum(parameter.requires_grad for parameter in model.parameters())
    engine.close()
    distributed.shutdown()


def train_from_shards(device: str) -> None:
    """Run the trainer on synthetic shards, with a checkpoint."""
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    from synthetic import tiny_run, write_shards

    from bclip_fast.data.shards.reader import ShardDataset
    from bclip_fast.io.runs import METRICS, read_metrics
    from bclip_fast.model.tokenizer import Tokenizer
    from bclip_fast.train import trainer

    join_group(device)
    config = model_config()
    with tempfile.TemporaryDirectory() as name, wrapped_in_ddp():
        folder = Path(name)
        shards = write_shards(folder / "shards")
        tokenizer = Tokenizer.train(ShardDataset(shards).captions(), config.text.vocab_size, config.text.context_length)
        tokenizer.save(folder / "tokenizer")
        run = tiny_run(folder / "run", shards, model=config, max_steps=3)
        data = replace(run.data, tokenizer=str(folder / "tokenizer" / "tokenizer.json"))
        run = replace(run, data=data, engine=OPTIONS, micro_batch_size=8)
        with mock.patch.object(trainer, "build_engine", engines.build_engine):
            path = trainer.train(run)
        lines = read_metrics(path / METRICS)
        losses = [line["loss"] for line in lines if "loss" in line]
        print(f"losses {losses}; last line: {lines[-1]}")
        assert len(losses) == run.max_steps
        assert all(map(math.isfinite, losses))
        assert any((path / "checkpoints").iterdir())
