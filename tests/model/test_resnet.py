"""OpenAI's ResNet: open_clip's, forward and backward; statistics that move once; what a tower does, and refuses."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peers import import_open_clip
from ranks import on_ranks
from safetensors.torch import load_file, save_file
from synthetic import tiny_model, tiny_run, write_shards
from test_grad_cache import ENGINES, NUM_PARTS, OPTIM, ROWS, micro_batches, spool
from test_model import GPT, SMALL, gradients, shaken
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bclip_fast import ops, pretrained
from bclip_fast.data.transform import normalize
from bclip_fast.errors import UserError
from bclip_fast.loss import ClipLoss
from bclip_fast.model import flops, weights
from bclip_fast.model.biomedclip import BiomedClip, BiomedClipConfig
from bclip_fast.model.meter import MeterConfig, VqaModel
from bclip_fast.model.packed import Packed
from bclip_fast.model.presets import preset
from bclip_fast.model.resnet import BatchNorm, ResNetTower
from bclip_fast.model.tokenizer import Tokenizer
from bclip_fast.model.vision import VisionConfig, resize_positions
from bclip_fast.plan import activations
from bclip_fast.train.checkpoint import load_latest
from bclip_fast.train.config import CheckpointConfig, InitConfig
from bclip_fast.train.engine import deepspeed as engines
from bclip_fast.train.engine.deepspeed import EngineConfig
from bclip_fast.train.export import ExportConfig
from bclip_fast.train.export import run as export
from bclip_fast.train.finetune import FinetuneConfig, _add_lora
from bclip_fast.train.grad_cache import CachedBatch, embed
from bclip_fast.train.init_weights import initialise
from bclip_fast.train.schedule import OptimConfig, layer_scales, parameter_groups
from bclip_fast.train.trainer import train

RESNET = VisionConfig(
    kind="resnet", image_size=64, patch_size=32, width=8, layers=6, heads=4, blocks=(1, 2, 1, 2)
)  # fmt: skip
CONFIG = BiomedClipConfig(embed_dim=24, vision=RESNET, text=GPT, quick_gelu=True)
WEIGHTS = "open_clip_model.safetensors"


def tower(config: BiomedClipConfig = CONFIG) -> ResNetTower:
    """With statistics and weights of which none is zero or one."""
    found = shaken(BiomedClip(config)).visual
    assert isinstance(found, ResNetTower)
    for module in found.modules():
        if isinstance(module, BatchNorm):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2.0)
    return found


def statistics(module: nn.Module) -> list[torch.Tensor]:
    assert list(module.buffers())
    return [buffer.clone() for buffer in module.buffers()]


def peer(ours: BiomedClip) -> Any:
    """open_clip's CLIP of the same sizes and weights, its text tower under `text.`."""
    open_clip = import_open_clip()
    vision, text = ours.config.vision, ours.config.text
    theirs = open_clip.model.CustomTextCLIP(
        ours.config.embed_dim,
        dict(image_size=vision.image_size, layers=list(vision.blocks), width=vision.width, patch_size=None,
             head_width=32 * vision.width // vision.heads),
        dict(context_length=text.context_length, vocab_size=text.vocab_size, width=text.width, heads=text.heads,
             layers=text.layers),
        quick_gelu=True,
    )  # fmt: skip
    # Strictly: torch itself fills in the counts of batches that we don't keep.
    theirs.load_state_dict(weights.to_open_clip(ours.state_dict(), ours.config))
    return theirs


def check_equal(ours: BiomedClip, batch: int, training: bool, dtype: torch.dtype, tolerance: float) -> None:
    """Outputs, all gradients and all statistics, relative to each tensor's largest element."""
    theirs = peer(ours)
    side, text = ours.config.vision.image_size, ours.config.text
    image = torch.randn(batch, 3, side, side, dtype=dtype)
    ids = torch.randint(1, text.vocab_size - 1, (batch, text.context_length))
    ids[:, -1] = text.vocab_size - 1
    weight = torch.randn(batch, ours.config.embed_dim)
    outputs, grads = [], []
    for model in (ours.to(dtype), theirs.to(dtype)):
        model.train(training)
        outputs.append([model.encode_image(image, normalize=False), model.encode_text(ids, normalize=False)])
        model.zero_grad()
        sum((out * weight).sum() for out in outputs[-1]).backward()  # type: ignore[union-attr]
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for one, other in zip(*outputs, strict=True):
        assert worst(one, other) <= tolerance
    keys = weights.key_map(ours.config)
    assert grads[0].keys() == {n for n, _ in ours.named_parameters()} - {"logit_scale"}
    for name, grad in grads[0].items():
        parts = [grads[1][other] for other in keys[name]]
        # Adding to all keys changes no softmax: what they find of the keys' biases, 0, is measured by the queries'.
        parts = [torch.cat(parts)] if name.endswith("pool.qkv.bias") else parts
        for one, other in zip(grad.chunk(len(parts)), parts, strict=True):
            assert worst(one, other) <= tolerance, f"{name}: {worst(one, other):.2g}"
    state = theirs.state_dict()
    for name, buffer in ours.named_buffers():
        assert worst(buffer, state[keys[name][0]]) <= tolerance, name


def worst(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(((one.reshape(other.shape) - other).abs().max() / other.abs().max()).detach())


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    "vision",
    [RESNET, dataclasses.replace(RESNET, image_size=96, width=4, heads=8, blocks=(2, 1, 1, 1), layers=5)],
    ids=["two positions a side", "three"],
)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-4)], ids=["fp64", "fp32"])
def test_it_is_open_clips(
    vision: VisionConfig, training: bool, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 both with a smooth function in place of ReLU: a number that rounding carries over 0 turns part of the
    gradient on or off, and then two right gradients differ by a hundredth."""
    if dtype == torch.float32:
        monkeypatch.setattr(nn.functional, "relu", lambda x, inplace=False: nn.functional.silu(x))
    torch.manual_seed(0)
    ours = BiomedClip(dataclasses.replace(CONFIG, vision=vision))
    ours.visual = tower(ours.config)
    before = [buffer.to(dtype) for buffer in statistics(ours)]
    check_equal(ours, 4, training, dtype, tolerance)
    assert training != all(map(torch.equal, before, statistics(ours)))


def test_rn50_has_the_names_and_shapes_of_open_clips() -> None:
    open_clip = import_open_clip()
    with torch.device("meta"):
        theirs = open_clip.model.CustomTextCLIP(**open_clip.get_model_config("RN50-quickgelu"))
        ours = BiomedClip(preset("clip_rn50"))
    assert sum(p.numel() for p in ours.parameters()) == 102_007_137
    assert sum(p.numel() for p in ours.visual.parameters()) == sum(p.numel() for p in theirs.visual.parameters())
    state = {name: torch.empty(tensor.shape) for name, tensor in ours.state_dict().items()}
    found = {name: tensor.shape for name, tensor in weights.to_open_clip(state, ours.config).items()}
    counts = {name for name in theirs.state_dict() if name.endswith("num_batches_tracked")}
    assert (
        found == {name: t.shape for name, t in theirs.state_dict().items() if name not in counts} and len(counts) == 55
    )


def test_it_starts_as_open_clips_starts() -> None:
    """Spread of each weight, its mean being 0; zeros and ones exactly."""
    torch.manual_seed(0)
    ours = BiomedClip(dataclasses.replace(CONFIG, vision=dataclasses.replace(RESNET, width=16)))
    theirs = peer(ours).visual
    theirs.__init__([1, 2, 1, 2], 24, 4, 64, 16)
    start = theirs.state_dict()
    for name, parts in weights.key_map(ours.config).items():
        if not name.startswith("visual."):
            continue
        own = ours.state_dict()[name].flatten()
        other = torch.cat([start[part.removeprefix("visual.")].flatten() for part in parts])
        spread = float(other.std(correction=0))
        assert float(own.std(correction=0)) == pytest.approx(spread, rel=0.3 if len(own) > 100 else 1.5, abs=0), name
        assert spread or torch.equal(own, other), name


# Statistics


def test_statistics_move_once() -> None:
    """In a pass with a graph: neither without one, nor where a block is recomputed, nor where nothing is trained."""
    model = tower().train()
    image, expected = torch.randn(4, 3, 64, 64), tower()
    expected.load_state_dict(model.state_dict())
    plain = gradients(expected.train(), lambda: expected(image).square().sum())
    before = statistics(model)
    with torch.no_grad():
        free = model(image)
    assert all(map(torch.equal, statistics(model), before))
    torch.testing.assert_close(free, expected(image))
    model.grad_checkpointing = True
    calls: list[int] = []
    for layer in (model.stem, model.layers[0]):
        layer.register_forward_pre_hook(lambda *_: calls.append(1))
    recomputed = gradients(model, lambda: model(image).square().sum())
    assert len(calls) == 4, "stem and block must have run again in the backward pass"
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, msg=name)
    after = statistics(model)
    again = tower()
    again.load_state_dict(model.state_dict())
    assert not any(map(torch.equal, after, before))
    # Once: a tenth of the way to the statistics of the batch, those of a norm that was reset.
    norm, once = model.stem.conv1.norm, before[0] * 0.9
    pixels = model.stem.conv1.conv(image).mean((0, 2, 3))
    torch.testing.assert_close(norm.running_mean, once + 0.1 * pixels.detach())
    assert model.training and all(module.moving for module in model.modules() if isinstance(module, BatchNorm))
    again.requires_grad_(False)
    again.train()(image.requires_grad_())
    assert all(map(torch.equal, statistics(again), after))


@pytest.mark.parametrize("unlocked", [0, 1, 3])
def test_a_locked_tower_keeps_its_statistics(unlocked: int) -> None:
    model = tower().train()
    model.lock(unlocked)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model(torch.randn(4, 3, 64, 64)).sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    last = tuple(f"layers.{i}." for i in range(6 - unlocked, 6)) + (("pool.",) if unlocked else ()) + ("head.",)
    assert trained == {name for name, _ in model.named_parameters() if name.startswith(last)}
    assert trained == {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    moved = {name for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])}
    assert moved == {name for name in before if name.startswith(last)}
    with pytest.raises(UserError, match="unlocked groups is 7"):
        model.lock(7)


def make(config: EngineConfig, checkpointing: bool = False) -> engines.Engine:
    torch.manual_seed(0)
    model = BiomedClip(dataclasses.replace(tiny_model(dropout=0.1), vision=dataclasses.replace(RESNET, image_size=32)))
    model.set_grad_checkpointing(checkpointing)
    return engines.make(model.train(), config, OPTIM, NUM_PARTS * ROWS)


def cached_step(rank: int, num_ranks: int, config: EngineConfig, checkpointing: bool) -> dict[str, Any]:
    engine = make(config, checkpointing)
    share = NUM_PARTS // num_ranks
    cached = CachedBatch(engine, ClipLoss(rank=rank, world_size=num_ranks), share, spool())
    for part in micro_batches()[rank * share : (rank + 1) * share]:
        cached.add(*part)
    loss = float(cached.loss())
    cached.backward()
    norm = engine.step(OPTIM.lr).grad_norm
    found = {"loss": loss, "grad_norm": norm, "weights": engine.model_state()}
    engine.close()
    return found


def steps(rank: int, num_ranks: int) -> dict[str, Any]:
    os.environ["LOCAL_RANK"] = str(rank)
    return {name: cached_step(rank, num_ranks, config, name in ("ddp", "zero3")) for name, config in ENGINES.items()}


def whole_batch(num_ranks: int) -> dict[str, Any]:
    """All activations of all micro-batches in one graph; the statistics of rank 0 are those of its own."""
    engine = make(ENGINES["ddp"])
    parts, kept = [], {}
    for number, part in enumerate(micro_batches()):
        parts.append(embed(engine, *part))
        if number == NUM_PARTS // num_ranks - 1:
            kept = {name: buffer.clone() for name, buffer in engine.module.named_buffers()}
    image, text = (torch.cat([part[i] for part in parts]) for i in (0, 1))
    loss = ClipLoss()(image, text, parts[0].logit_scale)
    engine.backward(loss)
    norm = engine.step(OPTIM.lr).grad_norm
    return {"loss": float(loss.detach()), "grad_norm": norm, "weights": engine.model_state() | kept}


@pytest.mark.parametrize("num_ranks", [1, pytest.param(2, marks=pytest.mark.long)])
def test_micro_batches_are_one_graph_and_move_statistics_once(num_ranks: int) -> None:
    expected = whole_batch(num_ranks)
    for name, found in on_ranks(num_ranks, steps, num_ranks)[0].items():
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6), name
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5), name
        assert found["weights"].keys() == expected["weights"].keys()
        for key, tensor in expected["weights"].items():
            torch.testing.assert_close(found["weights"][key], tensor, rtol=1e-5, atol=2e-6, msg=f"{name}: {key}")


@pytest.mark.parametrize("name", ["ddp", "zero0", "zero2", "zero3"])
def test_a_skipped_step_leaves_statistics_as_they_were(name: str) -> None:
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


# A run


def rn_run(run: Path, shards: Path, **changes: Any) -> Any:
    model = dataclasses.replace(tiny_model(dropout=0.1), vision=RESNET)
    settings: dict[str, Any] = dict(model=model, max_steps=4, micro_batch_size=4, ema_decay=0.5)
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


def test_a_run_resumes_exactly_and_exports_its_statistics(root: Path, tmp_path: Path) -> None:
    config = rn_run(tmp_path / "run", root / "shards")
    train(dataclasses.replace(config, max_steps=2))
    two = load_latest(tmp_path / "run" / "checkpoints")
    train(dataclasses.replace(config, resume=True))
    one, found = (load_latest(folder / "checkpoints") for folder in (root / "one", tmp_path / "run"))
    assert one.step == found.step == 4
    for expected, again in ((one.model, found.model), (one.ema, found.ema)):
        assert expected.keys() == again.keys() and all(torch.equal(again[name], expected[name]) for name in expected)
    running = {name for name in one.model if "running" in name}
    assert len(running) == 2 * (3 + 3 * 6 + 4) and running <= one.ema.keys()
    assert not any(torch.equal(two.model[name], one.model[name]) for name in running)
    for name, state in (("model", one.model), ("model_ema", {**one.model, **one.ema})):
        model = pretrained.load(root / "one" / name)[0]
        assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    export(ExportConfig(model=str(root / "one"), out=tmp_path / "exported", step=2))
    exported = pretrained.load(tmp_path / "exported")[0].state_dict()
    assert all(torch.equal(exported[name], two.model[name]) for name in running)
    # Continued from, statistics and all.
    start = BiomedClip(config.model)
    initialise(start, InitConfig(model=str(root / "one")))
    assert all(torch.equal(tensor, one.model[key]) for key, tensor in start.state_dict().items())


def test_two_ranks_keep_rank_0s_statistics_whatever_the_engine(root: Path) -> None:
    on_ranks(2, _train_on_ranks, str(root))
    ddp, zero = (load_latest(root / name / "checkpoints") for name in ("ddp2", "zero3"))
    for one, other in ((ddp.model, zero.model), (ddp.ema, zero.ema)):
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


# Files


@pytest.mark.parametrize("layout", ["CLIP", "CustomTextCLIP", "OpenAI's archive"])
def test_weights_there_and_back(layout: str, tmp_path: Path) -> None:
    ours = shaken(BiomedClip(CONFIG))
    ours.visual = tower()
    theirs = peer(ours).eval()
    state = theirs.state_dict()
    if layout != "CustomTextCLIP":
        state = {name.removeprefix("text."): tensor for name, tensor in state.items()}
    if layout == "OpenAI's archive":
        state |= {name: torch.tensor(7) for name in ("input_resolution", "context_length", "vocab_size")}
    vision = dict(image_size=64, layers=[1, 2, 1, 2], width=8, patch_size=None)
    text = dict(context_length=20, vocab_size=100, width=32, heads=2, layers=3)
    # open_clip's heads are of 64, ours here too.
    model_cfg = dict(embed_dim=24, quick_gelu=True, vision_cfg=vision, text_cfg=text)
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg, "preprocess_cfg": {}}))
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / WEIGHTS)
    Tokenizer.train(["axial brain MRI", "chest radiograph"] * 3, 100, context_length=20).save(tmp_path)
    again, preprocess, tokenizer = pretrained.load(tmp_path)
    assert again.config == CONFIG and again.state_dict().keys() == ours.state_dict().keys()
    assert all(torch.equal(tensor, ours.state_dict()[name]) for name, tensor in again.state_dict().items())
    # And into open_clip's own reader, which checks every name.
    open_clip = import_open_clip()
    pretrained.save(tmp_path / "ours", again, preprocess, tokenizer)
    written = json.loads((tmp_path / "ours" / "open_clip_config.json").read_text())["model_cfg"]
    assert written["vision_cfg"] == vision | {"head_width": 64}
    fresh = open_clip.model.CustomTextCLIP(**{key: value for key, value in written.items() if key != "custom_text"})
    open_clip.load_checkpoint(fresh, str(tmp_path / "ours" / WEIGHTS))
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(fresh.eval().encode_image(pixels), theirs.encode_image(pixels))
        torch.testing.assert_close(
            again.encode_image(pixels), theirs.encode_image(pixels, normalize=True), rtol=1e-4, atol=1e-5
        )
    counts = {name for name in state if name.endswith("num_batches_tracked")}
    assert load_file(tmp_path / "ours" / WEIGHTS).keys() == theirs.state_dict().keys() - counts
    with pytest.raises(UserError, match="ViTModel has no convolutions, as vision.kind resnet has"):
        pretrained.save_transformers(tmp_path / "hf", again, preprocess, tokenizer)
    # Another size of images: the pool's positions as a ViT's.
    larger = pretrained.load(tmp_path, image_size=128)[0]
    assert isinstance(larger.visual, ResNetTower) and isinstance(again.visual, ResNetTower)
    assert torch.equal(larger.visual.pool.pos_embed, resize_positions(again.visual.pool.pos_embed, 16))
    assert larger.encode_image(torch.randn(1, 3, 128, 128)).shape == (1, 24)


def test_the_published_layout_is_read(tmp_path: Path) -> None:
    """RN50.json of open_clip is the preset."""
    import_open_clip()
    import open_clip

    content = json.loads((Path(open_clip.__file__).parent / "model_configs" / "RN50-quickgelu.json").read_text())
    assert pretrained.open_clip_config.read({"model_cfg": content}, dict, dict) == preset("clip_rn50")


# What every tower does


@pytest.mark.parametrize("last", [True, False], ids=["channels last", "channels first"])
def test_raw_pixels_are_normalised(last: bool) -> None:
    model = tower().eval()
    model.set_pixels((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    pixels = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    expected = model(normalize(pixels, model.mean, model.std))
    torch.testing.assert_close(model(pixels if last else pixels.permute(0, 3, 1, 2).contiguous()), expected)
    with pytest.raises(UserError, match=r"images have shape \(2, 3, 32, 32\); this model takes \(batch, 3, 64, 64\)"):
        model(torch.zeros(2, 3, 32, 32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_half_precision_errs_at_most_twice_as_open_clips(dtype: torch.dtype, training: bool) -> None:
    """Under autocast, against float64."""
    torch.manual_seed(0)
    ours = shaken(BiomedClip(CONFIG))
    ours.visual = tower()
    theirs = peer(ours).train(training)
    image, weight = torch.randn(8, 3, 64, 64), torch.randn(8, 24, dtype=torch.float64)
    names = ("visual.stem.conv1.conv.weight", "visual.layers.3.conv2.conv.weight", "visual.pool.pos_embed")
    keys = weights.key_map(ours.config)

    def run(model: Any, of: Callable[[str], str], image: torch.Tensor) -> list[torch.Tensor]:
        out = model.encode_image(image, normalize=False)
        wanted = [dict(model.named_parameters())[of(name)] for name in names]
        return [out.double(), *torch.autograd.grad((out.double() * weight).sum(), wanted)]

    found = []
    for model, of in ((ours.train(training), str), (theirs, lambda name: keys[name][0])):
        with torch.autocast("cpu", dtype):
            found.append(run(model, of, image))
    exact = run(peer(ours).double().train(training), lambda name: keys[name][0], image.double())
    for name, own, eager, true in zip(("output", *names), *found, exact, strict=True):
        error, usual = ((value.reshape(true.shape) - true).norm() / true.norm() for value in (own, eager))
        assert error <= 2 * usual, f"{name}: {error:.3g}, open_clip's {usual:.3g}"


def test_weights_in_half_precision_take_raw_and_float_images() -> None:
    model = tower().eval()
    pixels = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    exact = model(pixels)
    model.to(torch.bfloat16)
    for image in (pixels, normalize(pixels)):
        found = model(image)
        assert found.dtype == torch.bfloat16
        assert float(((found - exact).norm() / exact.norm()).detach()) < 0.05


@pytest.mark.long
def test_compiled_blocks_compute_the_same_and_move_statistics_once() -> None:
    """Traced, without a compiler of C++: with and without a graph, recomputed."""
    config = dataclasses.replace(CONFIG, vision=dataclasses.replace(RESNET, blocks=(1, 1, 1, 1), layers=4))
    model, plain = BiomedClip(config), BiomedClip(config)
    plain.load_state_dict(model.state_dict())
    model.compile_layers(backend="eager")
    for network in (model, plain):
        network.train().set_grad_checkpointing()
    image = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model.visual(image), plain.visual(image))
    found, expected = (
        gradients(network, lambda tower=network.visual: tower(image).square().sum()) for network in (model, plain)
    )
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5, msg=name)
    for one, other in zip(statistics(model), statistics(plain), strict=True):
        torch.testing.assert_close(one, other)
    with pytest.raises(UserError, match="engine.cuda_graphs: not with vision.kind resnet"):
        model.compile_layers(cuda_graphs=True)


def test_rates_fall_block_by_block_and_norms_do_not_decay() -> None:
    model = BiomedClip(CONFIG)
    scales = layer_scales((name for name, _ in model.named_parameters()), 0.5)
    for name, power in {"stem.conv3.norm.bias": 7, "layers.0.short.conv.weight": 6, "layers.5.conv1.conv.weight": 1,
                        "pool.pos_embed": 0, "pool.qkv.bias": 0, "head.bias": 0}.items():  # fmt: skip
        assert scales[f"visual.{name}"] == 0.5**power, name
    groups = parameter_groups(model.visual.named_parameters(), OptimConfig())
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    for name, parameter in model.visual.named_parameters():
        assert (id(parameter) in decayed) == (not re.search(r"norm\.|bias", name)), name


@pytest.mark.parametrize("unlocked", [None, 0, 1, 6])
def test_operations_are_those_that_torch_counts(unlocked: int | None) -> None:
    model = BiomedClip(CONFIG).train()
    if unlocked is not None:
        model.visual.lock(unlocked)
    with FlopCounterMode(display=False) as counter, ops.use_backend("reference"):
        out = model.visual(torch.zeros(3, 3, 64, 64))
    counted = counter.get_total_flops()
    width, tokens = 256, 5
    # Not seen by torch: the pool's Q K^T and P V. Not counted by us: the projection.
    unseen, head = 3 * 4 * width * tokens, 3 * 2 * width * 24
    forward, text = flops.forward_flops(CONFIG, [5] * 3)
    assert counted + unseen == forward + head
    with FlopCounterMode(display=False) as counter, ops.use_backend("reference"):
        out.sum().backward()
    locked = (model.visual.num_locked, 0)
    back = flops.step_flops(CONFIG, [5] * 3, locked=locked) - forward - 3 * text
    # Of what comes first in the backward pass only the gradient of its weights is computed.
    if unlocked is None:
        first = 3 * 2 * 32**2 * 9 * 3 * 4
    elif unlocked == 0:
        first = head
    else:
        first = 3 * 2 * (4 * 256 * 64 if unlocked == 1 else 16**2 * 8 * (8 + 32))
    assert counter.get_total_flops() + 2 * unseen * (unlocked != 0) == back + 2 * head - first


@pytest.mark.parametrize("checkpointing", [False, True])
def test_planned_activations_are_those_of_a_real_step(checkpointing: bool) -> None:
    model = BiomedClip(dataclasses.replace(CONFIG, vision=dataclasses.replace(RESNET, width=16))).train()
    model.set_grad_checkpointing(checkpointing)
    images, lengths = torch.zeros((8, 64, 64, 3), dtype=torch.uint8), [3] * 8
    text = Packed.of(torch.ones(24, dtype=torch.int64), lengths)
    before = statistics(model)
    found = activations.activations(model, lengths, precision="fp32")
    assert all(map(torch.equal, statistics(model), before))
    with activations._Held(model, images, *text[:2]) as held:
        output = model(images, text)
        kept, held.peak = held.now, held.now
        (output["image_features"].sum() + output["text_features"].sum()).backward()
    assert found.image + found.text <= kept <= 1.02 * (found.image + found.text)
    assert abs(found.step - held.peak) <= 0.02 * held.peak


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_dropout": 0.5}, "vision.patch_dropout is 0.5; of vision.kind resnet .* it is 0"),
        ({"patch_size": 16}, "vision.patch_size is 16; .* it is 32"),
        ({"mlp_ratio": 2.0}, "vision.mlp_ratio is 2.0; .* it is 4"),
        ({"layers": 12}, r"vision.layers is 12; of vision.kind resnet with blocks \(1, 2, 1, 2\) it is 6"),
        ({"blocks": None}, "vision.blocks is None; vision.kind resnet needs 4 numbers"),
        ({"blocks": (1, 2, 0, 3)}, "vision.blocks is 0; it must be a whole number from 1"),
        ({"blocks": (1, 2, 3)}, "needs 4 numbers"),
        ({"image_size": 72}, "vision.image_size 72 is not a multiple of vision.patch_size 32"),
        ({"width": 7}, "vision.width 7 is odd"),
        ({"heads": 5}, "no multiple of vision.heads 5"),
        ({"width": 10**9}, "vision.width is 1000000000; it must be a whole number from 2 to 512"),
        ({"kind": "vit"}, r"vision.blocks is \(1, 2, 1, 2\), but vision.kind vit has none"),
        ({"kind": "rn"}, "vision.kind is 'rn'; choose vit, clip or resnet"),
    ],
)
def test_sizes_that_fit_no_resnet_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        dataclasses.replace(RESNET, **changes)


def test_what_reads_a_vits_tokens_is_refused() -> None:
    config = dataclasses.replace(SMALL, vision=RESNET)
    with pytest.raises(ValueError, match="reads the tokens of a ViT"):
        VqaModel(BiomedClip(config), MeterConfig(1), ("yes",))
    with pytest.raises(UserError, match="lora_rank=4: LoRA is for transformers, vision.kind is resnet"):
        _add_lora(BiomedClip(CONFIG), FinetuneConfig(model="", data="", lora_rank=4))
    with pytest.raises(UserError, match="a plain ViT, but model.vision.kind is not vit"):
        initialise(BiomedClip(config), InitConfig(vision="anything"))
