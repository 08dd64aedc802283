"""What a recipe chooses beside the optimiser: locked towers, rates by layer, averaged weights."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peers import import_open_clip
from ranks import on_ranks
from synthetic import tiny_model, tiny_run, weights, write_shards
from towers import GPT, SMALL, padded_ids

from bclip_fast import pretrained
from bclip_fast.errors import UserError
from bclip_fast.io.runs import read_metrics
from bclip_fast.model import transformer
from bclip_fast.model.biomedclip import BiomedClip
from bclip_fast.train.checkpoint import load_latest, read, verify
from bclip_fast.train.config import CheckpointConfig, TrainConfig, ValidationConfig
from bclip_fast.train.ema import Ema
from bclip_fast.train.engine import EngineConfig, build_engine
from bclip_fast.train.engine.deepspeed import DeepSpeedEngine
from bclip_fast.train.schedule import MAX_LOG_LOGIT_SCALE, OptimConfig, layer_scales, parameter_groups
from bclip_fast.train.trainer import train

ENGINES = {
    "ddp": EngineConfig(name="ddp", precision="fp32"),
    **{f"zero{stage}": EngineConfig(zero_stage=stage, precision="fp32") for stage in (2, 3)},
}


def curve(run: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run / "metrics.jsonl") if "loss" in record]


def trained(model: BiomedClip) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# Locked towers


@pytest.mark.parametrize("unlocked", [0, 1, 2, 3])
def test_locks_what_open_clip_locks(unlocked: int) -> None:
    from bclip_fast.model import weight_names

    open_clip = import_open_clip()
    import timm
    from transformers import BertConfig, BertModel

    vision, text = SMALL.vision, SMALL.text
    image_tower = open_clip.timm_model.TimmModel("vit_tiny_patch16_224", embed_dim=24, image_size=32)
    image_tower.trunk = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=vision.width, depth=3, num_heads=4, num_classes=0
    )
    bert = BertConfig(
        hidden_size=text.width, num_hidden_layers=3, num_attention_heads=2, intermediate_size=128, vocab_size=100
    )
    text_tower = open_clip.hf_model.HFTextEncoder.__new__(open_clip.hf_model.HFTextEncoder)
    torch.nn.Module.__init__(text_tower)
    text_tower.transformer, text_tower.config = BertModel(bert, add_pooling_layer=False), bert
    image_tower.lock(unlocked)
    if unlocked:
        # What open_clip means to do: 3.3.0 doesn't know the name of BERT's layers, and stops with a KeyError.
        for module in [text_tower.transformer.embeddings, *text_tower.transformer.encoder.layer][:-unlocked]:
            module.requires_grad_(False)
    else:
        text_tower.lock()
    theirs = {f"visual.{name}": parameter.requires_grad for name, parameter in image_tower.named_parameters()}
    theirs |= {f"text.{name}": parameter.requires_grad for name, parameter in text_tower.named_parameters()}
    model = BiomedClip(SMALL)
    model.visual.lock(unlocked)
    model.text.lock(unlocked)
    ours = trained(model)
    assert {"logit_scale", "visual.head.weight", "text.proj.0.weight", "text.proj.2.weight"} <= ours
    checked = 0
    for name, names in weight_names.key_map(SMALL).items():
        for other in names:
            if other in theirs:
                assert (name in ours) == theirs[other], other
                checked += 1
    assert checked > 80
    with pytest.raises(UserError, match="unlocked groups=4 must be"):
        model.visual.lock(4)


def saved_bytes(model: BiomedClip) -> int:
    """Of what autograd keeps for the backward pass of a batch, without the parameters."""
    own = {parameter.data_ptr() for parameter in model.parameters()}
    kept = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += 0 if tensor.data_ptr() in own else tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(torch.rand(8, 3, 32, 32), padded_ids([20] * 8))
        (output["image_features"] * output["text_features"]).sum().backward()
    return kept


@pytest.mark.parametrize("text", [SMALL.text, GPT], ids=["bert", "gpt"])
def test_a_locked_tower_keeps_no_activations_and_drops_nothing(text: Any) -> None:
    model = BiomedClip(replace(SMALL, text=text, vision=replace(SMALL.vision, patch_dropout=0.5))).train()
    full = saved_bytes(model)
    model.visual.lock()
    image_locked = saved_bytes(model)
    model.text.lock(1)
    one_layer = saved_bytes(model)
    model.text.lock()
    both = saved_bytes(model)
    assert full > image_locked > one_layer > both and both < full / 50
    model.train()
    assert torch.equal(
        model(torch.ones(2, 3, 32, 32))["image_features"], model(torch.ones(2, 3, 32, 32))["image_features"]
    )
    ids = padded_ids([20, 11])
    assert torch.equal(model(text=ids)["text_features"], model(text=ids)["text_features"])
    model.text.lock(2)
    model.train()
    assert [layer.training for layer in model.text.layers] == [False, True, True] and not model.text.training
    model.eval()
    assert not any(module.training for module in model.modules())


def locked_run(run: Path, shards: Path, **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = dict(lock_image=True, lock_text=True, lock_text_unlocked_layers=1, max_steps=4)
    settings["ema_decay"] = 0.75
    return tiny_run(run, shards, **{**settings, "checkpoint": CheckpointConfig(every_steps=2, keep=0), **changes})


def _train_locked(rank: int, folder: str) -> dict[str, Any]:
    os.environ["LOCAL_RANK"] = str(rank)
    for name, engine in ENGINES.items():
        train(locked_run(Path(folder) / name, Path(folder) / "shards", engine=engine))
    return {name: _overflow_on_one_rank(rank, engine) for name, engine in ENGINES.items()}


def _overflow_on_one_rank(rank: int, config: EngineConfig) -> dict[str, Any]:
    """fp16 steps of which the second overflows on rank 1 alone, at a scale that fits the others."""
    torch.manual_seed(0)
    wrapped = build_engine(
        BiomedClip(tiny_model()), replace(config, precision="fp16"), OptimConfig(grad_clip_norm=1.0), 4
    )
    state = wrapped.optimizer_state()
    state.loss_scale["scale"] = 64.0
    wrapped.load_optimizer_state(state)
    generator = torch.Generator().manual_seed(rank)
    image, ids = torch.rand(2, 3, 32, 32, generator=generator), torch.randint(1, 90, (2, 12), generator=generator)
    skipped, norms = [], []
    for step in range(4):
        output = wrapped(image, ids)
        loss = (output["image_features"] * output["text_features"]).sum() * output["logit_scale"]
        wrapped.backward(loss * (float("inf") if rank == 1 and step == 1 else 1.0))
        result = wrapped.step(1e-3)
        skipped.append(result.skipped)
        norms.append(result.grad_norm)
    found = {"skipped": skipped, "norms": norms, "scale": wrapped.optimizer_state().loss_scale["scale"]}
    found["weights"] = wrapped.model_state()
    wrapped.close()
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Runs with locked towers, one rank in `one`, two ranks under the name of each engine; overflows on two ranks."""
    root = tmp_path_factory.mktemp("locked")
    train(locked_run(root / "one", write_shards(root / "shards"), engine=ENGINES["ddp"]))
    return root, on_ranks(2, _train_locked, str(root))


@pytest.fixture(scope="module")
def locked(ranks: tuple[Path, list[dict[str, Any]]]) -> Path:
    return ranks[0]


@pytest.mark.parametrize("name", ENGINES)
def test_an_overflow_on_one_rank_skips_the_step_on_all(ranks: tuple[Path, list[dict[str, Any]]], name: str) -> None:
    for found in ranks[1]:
        assert found[name]["skipped"] == [False, True, False, False] and found[name]["scale"] == 32.0
        expected = ranks[1][0]["ddp"]
        for step in (0, 2, 3):
            assert found[name]["norms"][step] == pytest.approx(expected["norms"][step], rel=1e-4)
    for key, tensor in expected["weights"].items():
        torch.testing.assert_close(ranks[1][0][name]["weights"][key], tensor, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ENGINES)
def test_locked_towers_on_two_ranks(locked: Path, name: str) -> None:
    torch.testing.assert_close(curve(locked / name), curve(locked / "one"), rtol=0, atol=2e-5)
    torch.manual_seed(0)
    start = BiomedClip(tiny_model())
    start.visual.lock()
    start.text.lock(1)
    after = weights(locked / name)
    moved = {key for key, tensor in start.state_dict().items() if not torch.equal(tensor, after[key])}
    assert moved == trained(start)
    # The average is kept of what is trained, and whole, wherever its parts lie.
    state = load_latest(locked / name / "checkpoints")
    assert set(state.ema) == moved and state.ema["logit_scale"].shape == ()
    expected = load_latest(locked / "one" / "checkpoints").ema
    for key, tensor in state.ema.items():
        torch.testing.assert_close(tensor, expected[key], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_locked_towers_resume_bit_for_bit(locked: Path, tmp_path: Path, name: str) -> None:
    config = locked_run(tmp_path / "run", locked / "shards", engine=ENGINES[name])
    whole = train(config)
    before = load_latest(whole / "checkpoints").ema
    (whole / "checkpoints" / "step-00000004" / "manifest.json").unlink()
    expected = curve(whole)
    train(dataclasses.replace(config, resume=True))
    assert curve(whole) == expected
    again = load_latest(whole / "checkpoints")
    assert again.step == 4 and all(torch.equal(tensor, before[key]) for key, tensor in again.ema.items())
    torch.testing.assert_close(curve(whole), curve(locked / "one"), rtol=0, atol=2e-5)


def test_unlocked_groups_without_a_lock_are_refused() -> None:
    with pytest.raises(UserError, match="lock_image_unlocked_groups=1: .* needs lock_image"):
        TrainConfig(lock_image_unlocked_groups=1)


# What waits on the host


def test_activations_on_the_host_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The input of every trained layer, and nothing else, is handed to the host; gradients are the same to the bit."""
    held: list[torch.Tensor] = []

    class Recording(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self, pin_memory: bool) -> None:
            super().__init__(lambda tensor: held.append(tensor) or tensor.cpu(), lambda tensor: tensor)

    monkeypatch.setattr(transformer, "save_on_cpu", Recording)
    gradients = []
    for offload in (False, True):
        torch.manual_seed(0)
        model = BiomedClip(SMALL).train()
        model.text.lock(1)
        model.set_grad_checkpointing(True, offload)
        output = model(torch.rand(2, 3, 32, 32), padded_ids([20, 7]))
        (output["image_features"] * output["text_features"]).sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
        assert bool(held) == offload
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
    # Three layers of images, two tensors each but for the first, and the only text layer that is trained.
    assert [tuple(tensor.shape) for tensor in held if tensor.dim() == 2] == 5 * [(34, 48)] + 2 * [(27, 32)]


@pytest.mark.parametrize("stage, parameters", [(1, False), (2, False), (3, True)])
def test_an_optimiser_on_the_host_takes_the_same_steps(stage: int, parameters: bool) -> None:
    """DeepSpeed's way through host memory, on a machine that has no other, against the step without it."""
    after = []
    for offload in (False, True):
        torch.manual_seed(0)
        settings = EngineConfig(
            zero_stage=stage, precision="fp32", offload_optimizer=offload, offload_parameters=offload and parameters
        )
        optim = OptimConfig(grad_clip_norm=1.0, eps=1e-3)
        wrapped = DeepSpeedEngine(BiomedClip(tiny_model()), settings, optim, 2, torch.device("cpu"))
        image, ids = torch.rand(2, 3, 32, 32), torch.randint(1, 90, (2, 12))
        for step in range(3):
            if step == 2:
                wrapped.load_optimizer_state(wrapped.optimizer_state())
            output = wrapped(image, ids)
            wrapped.backward((output["image_features"] * output["text_features"]).sum() * output["logit_scale"])
            norm = wrapped.step(1e-3).grad_norm
        after.append((norm, wrapped.optimizer_state(), wrapped.model_state()))
        wrapped.close()
    (norm, state, model), (other_norm, other_state, other_model) = after
    assert other_norm == pytest.approx(norm, rel=1e-6) and other_state.num_steps == state.num_steps == 3
    for name, tensor in model.items():
        torch.testing.assert_close(other_model[name], tensor, rtol=0, atol=1e-6)
        for key, moment in state.moments[name].items():
            torch.testing.assert_close(other_state.moments[name][key], moment, rtol=1e-4, atol=1e-8)


def test_zero_3_gathers_weights_layer_by_layer() -> None:
    """At most a bucket fetched ahead and the layer at work, forward and backward, once DeepSpeed knows their order."""
    sizes = tiny_model(width=192)
    model = BiomedClip(replace(sizes, vision=replace(sizes.vision, layers=6)))
    wrapped = build_engine(model, EngineConfig(zero_stage=3, precision="fp32", bucket_mib=1), OptimConfig(), 2)
    # Below a size they are never taken apart.
    parts: Any = [part for part in model.parameters() if not part.ds_persist]  # type: ignore[attr-defined]
    gathered = []

    def count(*_: Any) -> None:
        gathered.append(sum(part.ds_numel for part in parts if part.ds_status.name == "AVAILABLE"))

    for module in model.visual.layers.modules():
        if not list(module.children()):
            module.register_forward_hook(count)
            module.register_full_backward_hook(count)
    image, ids = torch.rand(2, 3, 32, 32), torch.randint(1, 90, (2, 12))
    for _ in range(3):
        output = wrapped(image, ids)
        wrapped.backward((output["image_features"] * output["text_features"]).sum())
        wrapped.step(1e-3)
    wrapped.close()
    total, largest = sum(part.ds_numel for part in parts), max(part.ds_numel for part in parts)
    assert total > 2_000_000 and 0 < max(gathered) <= (1 << 18) + largest, (max(gathered), largest, total)


def host_steps(settings: EngineConfig, limits: list[float], begin: Any = None) -> list[Any]:
    """After each step its norm, AdamW's state and the weights; `begin` is one of these."""
    torch.manual_seed(0)
    # Near the bound, to which the loss drives it.
    model = BiomedClip(replace(tiny_model(), init_logit_scale=MAX_LOG_LOGIT_SCALE - 1.5e-3))
    image, ids = torch.rand(2, 3, 32, 32), torch.randint(1, 90, (2, 12))
    if begin is not None:
        model.load_state_dict(begin[2])
    wrapped = DeepSpeedEngine(model, settings, OptimConfig(grad_clip_norm=1.0), 2, torch.device("cpu"))
    if begin is not None:
        # An engine works on the tensors it is given.
        wrapped.load_optimizer_state(copy.deepcopy(begin[1]))
    after = []
    for limit in limits:
        output = wrapped(image, ids)
        wrapped.backward((output["image_features"] * output["text_features"]).sum() - output["logit_scale"])
        norm = wrapped.step(1e-3, limit).grad_norm
        after.append((norm, wrapped.optimizer_state(), wrapped.model_state()))
    wrapped.close()
    return after


@pytest.mark.long
@pytest.mark.parametrize("stage, offload", [(0, False), (1, False), (1, True), (2, True), (3, True)])
def test_deepspeeds_adam_takes_torchs_steps(stage: int, offload: bool) -> None:
    """To 1e-6, a refused step and the bound of the logit scale included; resumed, bit for bit its own."""
    settings = EngineConfig(zero_stage=stage, precision="fp32", offload_optimizer=offload)
    limits = [math.inf, math.inf, -1.0, math.inf, math.inf]
    expected = host_steps(settings, limits)
    found = host_steps(replace(settings, cpu_adam="deepspeed"), limits)
    assert found[-1][1].num_steps == 4 and found[-1][2]["logit_scale"] == torch.tensor(MAX_LOG_LOGIT_SCALE)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours[0] == pytest.approx(theirs[0], rel=1e-5) and ours[1].num_steps == theirs[1].num_steps
        for name, tensor in theirs[2].items():
            torch.testing.assert_close(ours[2][name], tensor, rtol=0, atol=1e-6)
    assert all(torch.equal(tensor, found[1][2][name]) for name, tensor in found[2][2].items())
    resumed = host_steps(replace(settings, cpu_adam="deepspeed"), limits[3:], found[2])
    assert_equal(resumed[-1], found[-1])
    # What one wrote the other reads.
    mixed = host_steps(settings, limits[3:], found[2])
    for name, tensor in found[-1][2].items():
        torch.testing.assert_close(mixed[-1][2][name], tensor, rtol=0, atol=1e-6)


def assert_equal(one: Any, other: Any) -> None:
    assert one[0] == other[0] and one[1].num_steps == other[1].num_steps
    assert all(torch.equal(tensor, other[2][name]) for name, tensor in one[2].items())
    for name, moments in one[1].moments.items():
        assert all(torch.equal(moment, other[1].moments[name][key]) for key, moment in moments.items())


def test_deepspeeds_adam_that_cannot_be_made_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.ops.op_builder import CPUAdamBuilder

    def load(self: Any) -> None:
        raise RuntimeError("ninja is not installed")

    monkeypatch.setattr(CPUAdamBuilder, "load", load)
    with pytest.raises(UserError, match=r"ninja is not installed; it takes a C\+\+ compiler.*engine.cpu_adam=torch"):
        build_engine(BiomedClip(tiny_model()), EngineConfig(precision="fp32", cpu_adam="deepspeed"), OptimConfig(), 2)


def test_graphs_of_the_image_tower_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of torch.compile: nothing here can run a CUDA graph."""
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: asked.append(options))
    marks: list[int] = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(1))
    model = BiomedClip(SMALL)
    model.compile_layers(True)
    static, any_length = {"dynamic": False, "mode": "reduce-overhead"}, {"dynamic": True}
    assert asked == [{"fullgraph": True, **options} for options in 3 * [static] + 3 * [any_length]]
    model(torch.rand(1, 3, 32, 32), padded_ids([3]))
    assert len(marks) == 1
    model.compile_layers()
    assert asked[6:] == 6 * [{"fullgraph": True, "dynamic": True}]


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(name="ddp", offload_optimizer=True), "offload_optimizer: only with engine.name deepspeed"),
        (dict(name="ddp", cpu_adam="deepspeed"), "cpu_adam deepspeed: only with engine.name deepspeed"),
        (dict(zero_stage=2, offload_parameters=True), "offload_parameters: .* zero_stage 3"),
        (dict(offload_activations=True), "offload_activations: only with engine.grad_checkpointing"),
        (dict(offload_optimizer=True), "offload_optimizer: there is no GPU here"),
        (dict(cuda_graphs=True), "cuda_graphs: only with engine.compile"),
        (dict(cuda_graphs=True, compile=True), "cuda_graphs: there is no GPU here"),
    ],
)
def test_offloading_what_cannot_be_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        build_engine(BiomedClip(tiny_model()), EngineConfig(**settings), OptimConfig(), 2)


# The average of the weights


def test_the_average_is_the_formula_and_is_validated_and_exported(shards: Path, tmp_path: Path) -> None:
    every = CheckpointConfig(every_steps=1, keep=0)
    seen = []

    def validate(model: BiomedClip, *_: Any) -> dict[str, float]:
        seen.append(model.state_dict())
        return {"scale": float(model.logit_scale.detach())}

    config = tiny_run(
        tmp_path / "run",
        shards,
        ema_decay=0.5,
        checkpoint=every,
        max_steps=3,
        validation=ValidationConfig(every_steps=3),
    )
    torch.manual_seed(0)
    expected = BiomedClip(tiny_model()).double().state_dict()
    run = train(config, validate=validate)
    for step in (1, 2, 3):
        state = read(run / "checkpoints" / f"step-{step:08d}")
        for name, tensor in state.model.items():
            expected[name] = 0.5 * expected[name] + 0.5 * tensor.double()
            torch.testing.assert_close(state.ema[name].double(), expected[name], rtol=1e-6, atol=1e-7)
    (plain, averaged) = seen
    for name in averaged:
        assert torch.equal(plain[name], state.model[name]) and torch.equal(averaged[name], state.ema[name])
    last = [record for record in read_metrics(run / "metrics.jsonl") if "validation_ema/scale" in record]
    assert [record["step"] for record in last] == [3]
    for folder, source in (("model", state.model), ("model_ema", state.ema)):
        model = pretrained.load(run / folder)[0]
        assert all(torch.equal(tensor, source[name]) for name, tensor in model.state_dict().items())
    (run / "checkpoints" / "step-00000003" / "ema.safetensors").write_bytes(b"")
    assert "ema.safetensors has 0 bytes" in str(verify(run / "checkpoints" / "step-00000003"))
    with pytest.raises(UserError, match="ema_decay=1"):
        TrainConfig(ema_decay=1.0)


def test_an_average_begins_where_a_run_goes_on_with_one(shards: Path, tmp_path: Path) -> None:
    config = tiny_run(tmp_path / "run", shards, max_steps=1)
    run = train(config)
    assert not load_latest(run / "checkpoints").ema and not (run / "model_ema").exists()
    start = weights(run)
    train(dataclasses.replace(config, resume=True, ema_decay=0.5, max_steps=2))
    state = load_latest(run / "checkpoints")
    for name, tensor in state.ema.items():
        torch.testing.assert_close(tensor, (start[name] + state.model[name]) / 2, rtol=1e-6, atol=1e-7)


def test_an_update_that_was_skipped_leaves_the_average(shards: Path, tmp_path: Path) -> None:
    """fp16's first loss scale overflows: the weights stay, and so does an average that was elsewhere."""
    settings = EngineConfig(name="ddp", precision="fp16")
    wrapped = build_engine(BiomedClip(tiny_model()), settings, OptimConfig(), 2)
    away = {name: tensor + 1 for name, tensor in wrapped.model_state().items()}
    average = Ema(wrapped, 0.5, away)
    average.update()
    for name, tensor in average.state().items():
        torch.testing.assert_close(tensor, away[name] - 0.5)
    run = train(tiny_run(tmp_path / "run", shards, engine=settings, ema_decay=0.5, max_steps=1))
    state = load_latest(run / "checkpoints")
    assert state.optimizer.num_steps == 0 and all(torch.equal(state.ema[n], t) for n, t in state.model.items())


# Learning rates by layer


def test_layer_scales_are_beits() -> None:
    names = [name for name, _ in BiomedClip(SMALL).named_parameters()]
    scales = layer_scales(names, 0.5)
    for tower, stem in (("visual", "pos_embed"), ("text", "word_embeddings.weight")):
        assert scales[f"{tower}.{stem}"] == 0.5**4
        assert [scales[f"{tower}.layers.{i}.qkv.weight"] for i in range(3)] == [0.5**3, 0.5**2, 0.5]
    assert scales["visual.norm.bias"] == scales["visual.head.weight"] == scales["text.proj.2.weight"] == 1
    assert scales["text.embedding_norm.weight"] == 0.5**4 and "logit_scale" not in scales
    # As timm gives them, whose groups of its own trunk differ in the norm alone.
    assert set(layer_scales([f"clip.{name}" for name in names], 0.5).values()) == set(scales.values())
    groups = parameter_groups(BiomedClip(SMALL).named_parameters(), OptimConfig(layer_decay=0.5))
    assert sorted({group["lr_scale"] for group in groups}) == [0.5**4, 0.5**3, 0.5**2, 0.5, 1]
    assert sum(len(group["params"]) for group in groups) == len(names)
    with pytest.raises(UserError, match=r"optim\.layer_decay=0"):
        OptimConfig(layer_decay=0.0)


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_layer_decay_slows_the_lower_layers_alike_in_every_engine(shards: Path, tmp_path: Path, name: str) -> None:
    optim = OptimConfig(lr=1e-3, warmup_steps=0, layer_decay=0.3, weight_decay=0.0)
    checkpoint = CheckpointConfig(every_steps=0)
    settings: dict[str, Any] = dict(optim=optim, checkpoint=checkpoint, max_steps=1)
    torch.manual_seed(0)
    start = BiomedClip(tiny_model()).state_dict()
    after = weights(train(tiny_run(tmp_path / name, shards, engine=ENGINES[name], **settings)))
    plain = weights(train(tiny_run(tmp_path / "ddp", shards, engine=ENGINES["ddp"], **settings)))
    # AdamW's first update is the rate, whatever the gradient.
    for key, scale in {
        "visual.layers.0.fc1.weight": 0.09,
        "text.layers.1.fc1.weight": 0.3,
        "visual.head.weight": 1,
    }.items():
        assert float((after[key] - start[key]).abs().median()) == pytest.approx(1e-3 * scale, rel=0.02)
    for key in after:
        torch.testing.assert_close(after[key], plain[key], rtol=0, atol=1e-6)
