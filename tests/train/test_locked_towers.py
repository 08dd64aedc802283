"""Locked towers (LiT), and overflows on one of two ranks."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peers import import_open_clip
from ranks import on_ranks
from runs import column
from synthetic import tiny_model, tiny_run, weights, write_shards
from towers import GPT, SMALL, padded_ids

from bclip_fast.errors import UserError
from bclip_fast.model.biomedclip import BiomedClip
from bclip_fast.train.checkpoint import load_latest
from bclip_fast.train.config import CheckpointConfig, TrainConfig
from bclip_fast.train.engine import EngineConfig, build_engine
from bclip_fast.train.schedule import OptimConfig
from bclip_fast.train.trainer import train

ENGINES = {
    "ddp": EngineConfig(name="ddp", precision="fp32"),
    **{f"zero{stage}": EngineConfig(zero_stage=stage, precision="fp32") for stage in (2, 3)},
}


def trained(model: BiomedClip) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("unlocked", [0, 1, 2, 3])
def test_lock_selects_same_weights_as_open_clip(unlocked: int) -> None:
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
        # open_clip 3.3.0 raises a KeyError, because it looks up BERT's layers under another name. Lock the layers as
        # open_clip intends to.
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
    """Bytes that autograd saves for the backward pass of a batch, without the parameters."""
    parameters = {parameter.data_ptr() for parameter in model.parameters()}
    total = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal total
        total += 0 if tensor.data_ptr() in parameters else tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(torch.rand(8, 3, 32, 32), padded_ids([20] * 8))
        (output["image_features"] * output["text_features"]).sum().backward()
    return total


@pytest.mark.parametrize("text", [SMALL.text, GPT], ids=["bert", "gpt"])
def test_locked_tower_saves_no_activations_and_has_no_dropout(text: Any) -> None:
    model = BiomedClip(replace(SMALL, text=text, vision=replace(SMALL.vision, patch_dropout=0.5))).train()
    full = saved_bytes(model)
    model.visual.lock()
    image_locked = saved_bytes(model)
    model.text.lock(1)
    one_layer = saved_bytes(model)
    model.text.lock()
    both = saved_bytes(model)
    assert full > image_locked > one_layer > both
    assert both < full / 50
    model.train()
    assert torch.equal(
        model(torch.ones(2, 3, 32, 32))["image_features"], model(torch.ones(2, 3, 32, 32))["image_features"]
    )
    ids = padded_ids([20, 11])
    assert torch.equal(model(text=ids)["text_features"], model(text=ids)["text_features"])
    model.text.lock(2)
    model.train()
    assert [layer.training for layer in model.text.layers] == [False, True, True]
    assert not model.text.training
    model.eval()
    assert not any(module.training for module in model.modules())


def locked_run(run: Path, shards: Path, **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {"lock_image": True, "lock_text": True, "lock_text_unlocked_layers": 1, "max_steps": 4}
    settings["ema_decay"] = 0.75
    return tiny_run(run, shards, **{**settings, "checkpoint": CheckpointConfig(every_steps=2, keep=0), **changes})


def _train_locked(rank: int, folder: str) -> dict[str, Any]:
    os.environ["LOCAL_RANK"] = str(rank)
    for name, engine in ENGINES.items():
        train(locked_run(Path(folder) / name, Path(folder) / "shards", engine=engine))
    return {name: _overflow_on_one_rank(rank, engine) for name, engine in ENGINES.items()}


def _overflow_on_one_rank(rank: int, config: EngineConfig) -> dict[str, Any]:
    """Four fp16 steps. Only the second one overflows, and only on rank 1."""
    torch.manual_seed(0)
    engine = build_engine(
        BiomedClip(tiny_model()), replace(config, precision="fp16"), OptimConfig(grad_clip_norm=1.0), 4
    )
    state = engine.optimizer_state()
    state.loss_scale["scale"] = 64.0
    engine.load_optimizer_state(state)
    generator = torch.Generator().manual_seed(rank)
    image, ids = torch.rand(2, 3, 32, 32, generator=generator), torch.randint(1, 90, (2, 12), generator=generator)
    skipped, norms = [], []
    for step in range(4):
        output = engine(image, ids)
        loss = (output["image_features"] * output["text_features"]).sum() * output["logit_scale"]
        engine.backward(loss * (float("inf") if rank == 1 and step == 1 else 1.0))
        result = engine.step(1e-3)
        skipped.append(result.skipped)
        norms.append(result.grad_norm)
    results = {"skipped": skipped, "norms": norms, "scale": engine.optimizer_state().loss_scale["scale"]}
    results["weights"] = engine.model_state()
    engine.close()
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Runs with locked towers, and the results of overflows on two ranks.

    The run in `one` has one rank. The runs under the engines' names have two.
    """
    root = tmp_path_factory.mktemp("locked")
    train(locked_run(root / "one", write_shards(root / "shards"), engine=ENGINES["ddp"]))
    return root, on_ranks(2, _train_locked, str(root))


@pytest.fixture(scope="module")
def locked(ranks: tuple[Path, list[dict[str, Any]]]) -> Path:
    return ranks[0]


@pytest.mark.parametrize("name", ENGINES)
def test_overflow_on_one_rank_skips_step_on_all(ranks: tuple[Path, list[dict[str, Any]]], name: str) -> None:
    for results in ranks[1]:
        assert results[name]["skipped"] == [False, True, False, False]
        assert results[name]["scale"] == 32.0
        expected = ranks[1][0]["ddp"]
        for step in (0, 2, 3):
            assert results[name]["norms"][step] == pytest.approx(expected["norms"][step], rel=1e-4)
    for key, tensor in expected["weights"].items():
        given = ranks[1][0][name]["weights"][key]
        if key.endswith("qkv.bias"):
            # The bias of the keys shifts all scores of a query alike. Its gradient consists of rounding errors, and
            # Adam makes steps of ordinary size from them.
            given, tensor = (torch.cat(bias.chunk(3)[::2]) for bias in (given, tensor))
        torch.testing.assert_close(given, tensor, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ENGINES)
def test_locked_towers_on_two_ranks_equal_one_rank(locked: Path, name: str) -> None:
    torch.testing.assert_close(column(locked / name, "loss"), column(locked / "one", "loss"), rtol=0, atol=2e-5)
    torch.manual_seed(0)
    start = BiomedClip(tiny_model())
    start.visual.lock()
    start.text.lock(1)
    after = weights(locked / name)
    moved = {key for key, tensor in start.state_dict().items() if not torch.equal(tensor, after[key])}
    assert moved == trained(start)
    # The EMA covers the trainable weights and is gathered from the ranks.
    state = load_latest(locked / name / "checkpoints")
    assert set(state.ema) == moved
    assert state.ema["logit_scale"].shape == ()
    expected = load_latest(locked / "one" / "checkpoints").ema
    for key, tensor in state.ema.items():
        torch.testing.assert_close(tensor, expected[key], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_locked_towers_resume_bitwise(locked: Path, tmp_path: Path, name: str) -> None:
    config = locked_run(tmp_path / "run", locked / "shards", engine=ENGINES[name])
    run = train(config)
    before = load_latest(run / "checkpoints").ema
    (run / "checkpoints" / "step-00000004" / "manifest.json").unlink()
    expected = column(run, "loss")
    train(dataclasses.replace(config, resume=True))
    assert column(run, "loss") == expected
    resumed = load_latest(run / "checkpoints")
    assert resumed.step == 4
    assert all(torch.equal(tensor, before[key]) for key, tensor in resumed.ema.items())
    torch.testing.assert_close(column(run, "loss"), column(locked / "one", "loss"), rtol=0, atol=2e-5)


def test_unlocked_groups_without_lock_are_an_error() -> None:
    with pytest.raises(UserError, match=r"lock_image_unlocked_groups=1 .* needs lock_image"):
        TrainConfig(lock_image_unlocked_groups=1)
