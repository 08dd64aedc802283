"""Training with OpenAI's ResNet: batch statistics, engines, runs, learning rates, FLOPs and memory."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from grad_cache_steps import ENGINES, NUM_PAIRS, NUM_PARTS, OPTIM, SIZES, micro_batches, spill_buffer
from ranks import on_ranks
from synthetic import tiny_model, tiny_run, write_shards
from torch.utils.flop_counter import FlopCounterMode
from towers import RESNET, RESNET_VISION, gradients, resnet_tower, statistics

from bclip_fast import ops, pretrained
from bclip_fast.errors import UserError
from bclip_fast.export.command import ExportConfig
from bclip_fast.export.command import run as export
from bclip_fast.loss import ClipLoss
from bclip_fast.model import flops
from bclip_fast.model.biomedclip import BiomedClip
from bclip_fast.model.packed import Packed
from bclip_fast.model.resnet import BatchNorm
from bclip_fast.plan import activations
from bclip_fast.train.checkpoint import load_latest
from bclip_fast.train.config import CheckpointConfig, InitConfig
from bclip_fast.train.engine import Engine, EngineConfig, build_engine
from bclip_fast.train.engine.base import persistent_buffers
from bclip_fast.train.grad_cache import GradCache, embed
from bclip_fast.train.init_weights import init_model
from bclip_fast.train.schedule import OptimConfig, layer_scales, parameter_groups
from bclip_fast.train.trainer import train


def test_running_statistics_change_once_per_micro_batch() -> None:
    """The statistics change only in a pass with a graph, and neither in a recomputation nor in a locked tower."""
    model = resnet_tower().train()
    image, expected = torch.randn(4, 3, 64, 64), resnet_tower()
    expected.load_state_dict(model.state_dict())
    plain = gradients(expected.train(), lambda: expected(image).square().sum())
    before = statistics(model)
    with torch.no_grad():
        without_graph = model(image)
    assert all(map(torch.equal, statistics(model), before))
    torch.testing.assert_close(without_graph, expected(image))
    model.grad_checkpointing = True
    calls: list[int] = []
    for layer in (model.stem, model.layers[0]):
        layer.register_forward_pre_hook(lambda *_: calls.append(1))
    recomputed = gradients(model, lambda: model(image).square().sum())
    assert len(calls) == 4, "the backward pass must run stem and block again"
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, msg=name)
    after = statistics(model)
    locked = resnet_tower()
    locked.load_state_dict(model.state_dict())
    assert not any(map(torch.equal, after, before))
    # Each update moves the statistics a tenth of the way to those of the batch.
    norm, once = model.stem.conv1.norm, before[0] * 0.9
    pixels = model.stem.conv1.conv(image).mean((0, 2, 3))
    torch.testing.assert_close(norm.running_mean, once + 0.1 * pixels.detach())
    assert model.training
    assert all(module.update_statistics for module in model.modules() if isinstance(module, BatchNorm))
    locked.requires_grad_(False)
    locked.train()(image.requires_grad_())
    assert all(map(torch.equal, statistics(locked), after))


@pytest.mark.parametrize("unlocked", [0, 1, 3])
def test_locked_tower_keeps_running_statistics(unlocked: int) -> None:
    model = resnet_tower().train()
    model.lock(unlocked)
    before = {name: buffer.clone() for name, buffer in persistent_buffers(model).items()}
    model(torch.randn(4, 3, 64, 64)).sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    last = tuple(f"layers.{i}." for i in range(6 - unlocked, 6)) + (("pool.",) if unlocked else ()) + ("head.",)
    assert trained == {name for name, _ in model.named_parameters() if name.startswith(last)}
    assert trained == {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    moved = {name for name, buffer in persistent_buffers(model).items() if not torch.equal(buffer, before[name])}
    assert moved == {name for name in before if name.startswith(last)}
    with pytest.raises(UserError, match="unlocked groups=7 must be"):
        model.lock(7)


def make(config: EngineConfig, checkpointing: bool = False) -> Engine:
    torch.manual_seed(0)
    model = BiomedClip(
        dataclasses.replace(tiny_model(dropout=0.1), vision=dataclasses.replace(RESNET_VISION, image_size=32))
    )
    model.set_grad_checkpointing(checkpointing)
    return build_engine(model.train(), config, OPTIM, NUM_PAIRS)


def cached_step(rank: int, num_ranks: int, config: EngineConfig, checkpointing: bool) -> dict[str, Any]:
    engine = make(config, checkpointing)
    share = NUM_PARTS // num_ranks
    sizes = SIZES[rank * share : (rank + 1) * share]
    cached = GradCache(engine, ClipLoss(rank=rank, world_size=num_ranks), sizes, spill_buffer())
    for part in micro_batches()[rank * share : (rank + 1) * share]:
        cached.add(*part)
    loss = float(cached.loss())
    cached.backward()
    norm = engine.step(OPTIM.lr).grad_norm
    result = {"loss": loss, "grad_norm": norm, "weights": engine.model_state()}
    engine.close()
    return result


def steps(rank: int, num_ranks: int) -> dict[str, Any]:
    os.environ["LOCAL_RANK"] = str(rank)
    return {name: cached_step(rank, num_ranks, config, name in ("ddp", "zero3")) for name, config in ENGINES.items()}


def whole_batch(num_ranks: int) -> dict[str, Any]:
    """One step with the activations of all micro-batches in one graph. Statistics are those of rank 0's part."""
    engine = make(ENGINES["ddp"])
    parts, rank_0_statistics = [], {}
    for number, part in enumerate(micro_batches()):
        parts.append(embed(engine, *part))
        if number == NUM_PARTS // num_ranks - 1:
            rank_0_statistics = {name: buffer.clone() for name, buffer in persistent_buffers(engine.module).items()}
    image, text = (torch.cat([part[i] for part in parts]) for i in (0, 1))
    loss = ClipLoss()(image, text, parts[0].logit_scale)
    engine.backward(loss)
    norm = engine.step(OPTIM.lr).grad_norm
    return {"loss": float(loss.detach()), "grad_norm": norm, "weights": engine.model_state() | rank_0_statistics}


@pytest.mark.parametrize("num_ranks", [1, pytest.param(2, marks=pytest.mark.long)])
def test_micro_batches_equal_one_graph_and_change_statistics_once(num_ranks: int) -> None:
    expected = whole_batch(num_ranks)
    for name, result in on_ranks(num_ranks, steps, num_ranks)[0].items():
        assert result["loss"] == pytest.approx(expected["loss"], rel=1e-6), name
        assert result["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5), name
        assert result["weights"].keys() == expected["weights"].keys()
        for key, tensor in expected["weights"].items():
            torch.testing.assert_close(result["weights"][key], tensor, rtol=1e-5, atol=2e-6, msg=f"{name}: {key}")


@pytest.mark.parametrize("name", ["ddp", "zero0", "zero2", "zero3"])
def test_skipped_step_restores_running_statistics(name: str) -> None:
    engine = make(ENGINES[name])
    before = engine.model_state()
    for limit, skipped in ((-1.0, True), (float("inf"), False)):
        part = embed(engine, *micro_batches()[0])
        engine.backward(ClipLoss()(part.image, part.text, part.logit_scale))
        assert engine.step(OPTIM.lr, limit).skipped == skipped
        after = engine.model_state()
        moved = {key for key in before if not torch.equal(after[key], before[key])}
        assert not moved if skipped else {key for key in before if "running" in key} <= moved
    engine.close()


def rn_run(run: Path, shards: Path, **changes: Any) -> Any:
    model = dataclasses.replace(tiny_model(dropout=0.1), vision=RESNET_VISION)
    settings: dict[str, Any] = {"model": model, "max_steps": 4, "micro_batch_size": 4, "ema_decay": 0.5}
    return tiny_run(run, shards, **{**settings, "checkpoint": CheckpointConfig(every_steps=2, keep=0), **changes})


def _train_on_ranks(rank: int, folder: str) -> None:
    os.environ["LOCAL_RANK"] = str(rank)
    for name, engine, first in (("ddp2", ENGINES["ddp"], 3), ("zero3", ENGINES["zero3"], 2)):
        config = rn_run(Path(folder) / name, Path(folder) / "shards", engine=engine, max_steps=3)
        train(dataclasses.replace(config, max_steps=first))
        train(dataclasses.replace(config, resume=True))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    train(rn_run(folder / "one", write_shards(folder / "shards")))
    return folder


def test_run_resumes_exactly_and_exports_statistics(root: Path, tmp_path: Path) -> None:
    config = rn_run(tmp_path / "run", root / "shards")
    train(dataclasses.replace(config, max_steps=2))
    two = load_latest(tmp_path / "run" / "checkpoints")
    train(dataclasses.replace(config, resume=True))
    uninterrupted, resumed = (load_latest(folder / "checkpoints") for folder in (root / "one", tmp_path / "run"))
    assert uninterrupted.step == resumed.step == 4
    for expected, actual in ((uninterrupted.model, resumed.model), (uninterrupted.ema, resumed.ema)):
        assert expected.keys() == actual.keys()
        assert all(torch.equal(actual[name], expected[name]) for name in expected)
    running = {name for name in uninterrupted.model if "running" in name}
    assert len(running) == 2 * (3 + 3 * 6 + 4)
    assert running <= uninterrupted.ema.keys()
    assert not any(torch.equal(two.model[name], uninterrupted.model[name]) for name in running)
    for name, state in (("model", uninterrupted.model), ("model_ema", {**uninterrupted.model, **uninterrupted.ema})):
        model = pretrained.load(root / "one" / name)[0]
        assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    export(ExportConfig(model=str(root / "one"), out=tmp_path / "exported", step=2))
    exported = pretrained.load(tmp_path / "exported")[0].state_dict()
    assert all(torch.equal(exported[name], two.model[name]) for name in running)
    # A run that starts from the model starts from its statistics, too.
    start = BiomedClip(config.model)
    init_model(start, InitConfig(model=str(root / "one")))
    assert all(torch.equal(tensor, uninterrupted.model[key]) for key, tensor in start.state_dict().items())


def test_two_ranks_every_engine_keeps_rank_0_statistics(root: Path) -> None:
    on_ranks(2, _train_on_ranks, str(root))
    ddp, zero = (load_latest(root / name / "checkpoints") for name in ("ddp2", "zero3"))
    for one, other in ((ddp.model, zero.model), (ddp.ema, zero.ema)):
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.long
def test_compiled_blocks_equal_eager_and_change_statistics_once() -> None:
    """The eager backend only traces, so no C++ compiler is needed."""
    config = dataclasses.replace(RESNET, vision=dataclasses.replace(RESNET_VISION, blocks=(1, 1, 1, 1), layers=4))
    model, plain = BiomedClip(config), BiomedClip(config)
    plain.load_state_dict(model.state_dict())
    model.compile_layers(backend="eager")
    for network in (model, plain):
        network.train().set_grad_checkpointing()
    image = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model.visual(image), plain.visual(image))
    compiled, expected = (
        gradients(network, lambda tower=network.visual: resnet_tower(image).square().sum())
        for network in (model, plain)
    )
    for name, gradient in expected.items():
        torch.testing.assert_close(compiled[name], gradient, rtol=1e-4, atol=1e-5, msg=name)
    for one, other in zip(statistics(model), statistics(plain), strict=True):
        torch.testing.assert_close(one, other)
    with pytest.raises(UserError, match=r"engine.cuda_graphs=True isn't supported with vision.kind resnet"):
        model.compile_layers(cuda_graphs=True)


def test_learning_rates_decay_by_block_and_norms_have_no_weight_decay() -> None:
    model = BiomedClip(RESNET)
    scales = layer_scales((name for name, _ in model.named_parameters()), 0.5)
    for name, power in {"stem.conv3.norm.bias": 7, "layers.0.short.conv.weight": 6, "layers.5.conv1.conv.weight": 1,
                        "pool.pos_embed": 0, "pool.qkv.bias": 0, "head.bias": 0}.items():  # fmt: skip
        assert scales[f"visual.{name}"] == 0.5**power, name
    groups = parameter_groups(model.visual.named_parameters(), OptimConfig())
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    for name, parameter in model.visual.named_parameters():
        assert (id(parameter) in decayed) == (not re.search(r"norm\.|bias", name)), name


@pytest.mark.parametrize("unlocked", [None, 0, 1, 6])
def test_flops_equal_torchs_count(unlocked: int | None) -> None:
    model = BiomedClip(RESNET).train()
    if unlocked is not None:
        model.visual.lock(unlocked)
    with FlopCounterMode(display=False) as counter, ops.use_backend("reference"):
        out = model.visual(torch.zeros(3, 3, 64, 64))
    counted = counter.get_total_flops()
    width, tokens = 256, 5
    # torch doesn't count the pool's Q K^T and P V. We don't count the projection.
    unseen, head = 3 * 4 * width * tokens, 3 * 2 * width * 24
    forward, text = flops.forward_flops(RESNET, [5] * 3)
    assert counted + unseen == forward + head
    with FlopCounterMode(display=False) as counter, ops.use_backend("reference"):
        out.sum().backward()
    locked = (model.visual.num_locked, 0)
    back = flops.step_flops(RESNET, [5] * 3, locked=locked) - forward - 3 * text
    # The first layer with trainable weights needs no gradient of its input.
    if unlocked is None:
        missing = 3 * 2 * 32**2 * 9 * 3 * 4
    elif unlocked == 0:
        missing = head
    else:
        missing = 3 * 2 * (4 * 256 * 64 if unlocked == 1 else 16**2 * 8 * (8 + 32))
    assert counter.get_total_flops() + 2 * unseen * (unlocked != 0) == back + 2 * head - missing


@pytest.mark.parametrize("checkpointing", [False, True])
def test_planned_activations_equal_those_of_a_real_step(checkpointing: bool) -> None:
    model = BiomedClip(dataclasses.replace(RESNET, vision=dataclasses.replace(RESNET_VISION, width=16))).train()
    model.set_grad_checkpointing(checkpointing)
    images, lengths = torch.zeros((8, 64, 64, 3), dtype=torch.uint8), [3] * 8
    text = Packed.of(torch.ones(24, dtype=torch.int64), lengths)
    before = statistics(model)
    planned = activations.measure_activations(model, lengths, precision="fp32")
    assert all(map(torch.equal, statistics(model), before))
    with activations.MemoryMeter(model, images, *text[:2]) as held:
        output = model(images, text)
        kept, held.peak = held.now, held.now
        (output["image_features"].sum() + output["text_features"].sum()).backward()
    assert planned.image + planned.text <= kept <= 1.02 * (planned.image + planned.text)
    assert abs(planned.step - held.peak) <= 0.02 * held.peak
