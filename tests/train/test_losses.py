"""Each loss of the configuration trains, and its step over micro-batches and ranks is that of the whole batch."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from grad_cache_steps import ENGINES, NUM_PAIRS, NUM_PARTS, OPTIM, SIZES, micro_batches, spill_buffer
from ranks import on_ranks
from synthetic import tiny_model, tiny_run

from bclip_fast.errors import UserError
from bclip_fast.io.runs import read_metrics
from bclip_fast.loss import ClipLoss
from bclip_fast.model.biomedclip import BiomedClip
from bclip_fast.train.config import DataConfig
from bclip_fast.train.engine import build_engine
from bclip_fast.train.grad_cache import GradCache, embed
from bclip_fast.train.losses import LossConfig, build_loss, total
from bclip_fast.train.trainer import train

# DeepSpeed's stage 0 reduces no gradients in float64. test_grad_cache.py runs it in float32.
EXACT_ENGINES = [name for name in ENGINES if name != "zero0"]
TEACHER_SCALE = 30.0
GROUPS = {"groups": torch.arange(NUM_PAIRS) // 3}
RANDOM = torch.randn(NUM_PAIRS, 2, 10, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
TEACHER = {"teacher": F.normalize(RANDOM, dim=2)}
DISTILL = {"kind": "distill", "teacher": "any"}
# Each loss with the constants of its batches.
CASES: dict[str, tuple[LossConfig, dict[str, torch.Tensor]]] = {
    "clip": (LossConfig(), {}),
    "clip groups": (LossConfig(), GROUPS),
    "clip smoothing": (LossConfig(label_smoothing=0.1), {}),
    "clip hardness": (LossConfig(hardness=2.0), {}),
    "siglip": (LossConfig(kind="siglip"), {}),
    "siglip groups": (LossConfig(kind="siglip"), GROUPS),
    "distill": (LossConfig(**DISTILL, distill_weight=0.5), TEACHER),
    "distill smoothing": (LossConfig(**DISTILL, label_smoothing=0.1), TEACHER),
    "own": (LossConfig(kind="test_losses:Margin"), {}),
}


class Margin(ClipLoss):
    """A loss of the user's own: the clip loss at twice the scale."""

    def forward(self, image: Any, text: Any, scale: Any, bias: Any = None, *args: Any, **options: Any) -> Any:
        return super().forward(image, text, 2 * scale, bias, *args, **options)


def make(loss: LossConfig, config: Any) -> Any:
    torch.manual_seed(0)
    sizes = tiny_model(dropout=0.1)
    scale, bias = loss.initial_logits(sizes.init_logit_scale, sizes.init_logit_bias)
    model = BiomedClip(dataclasses.replace(sizes, init_logit_scale=scale, init_logit_bias=bias))
    return build_engine(model.double().train(), config, OPTIM, NUM_PAIRS)


def batches(constants: dict[str, torch.Tensor]) -> list[tuple[Any, int]]:
    parts = {name: rows.split(list(SIZES)) for name, rows in constants.items()}
    return [
        (dataclasses.replace(batch, **{name: rows[number] for name, rows in parts.items()}), seed)
        for number, (batch, seed) in enumerate(micro_batches())
    ]


def definition(loss: LossConfig, constants: dict[str, torch.Tensor], features: Any) -> torch.Tensor:
    """The loss of dense logits, in float64."""
    image, text, scale, bias = features
    logits = scale * image @ text.T
    count, groups = len(logits), constants.get("groups")
    same = torch.eye(count).double() if groups is None else (groups[:, None] == groups).double()
    if loss.kind == "siglip":
        return -F.logsigmoid((2 * same - 1) * (logits + bias)).sum() / count
    if loss.is_own:
        logits = 2 * logits
    if loss.hardness:
        logits = logits + (1 - same) * loss.hardness * (image @ text.T).detach()
    targets = same / same.sum(1, keepdim=True)
    targets = (1 - loss.label_smoothing) * targets + loss.label_smoothing / count
    contrastive = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
    if loss.kind != "distill":
        return contrastive
    teacher = TEACHER_SCALE * constants["teacher"][:, 0] @ constants["teacher"][:, 1].T
    distill = F.cross_entropy(logits, teacher.softmax(1)) + F.cross_entropy(logits.T, teacher.T.softmax(1))
    return contrastive + loss.distill_weight * distill / 2


def whole_batch(name: str) -> dict[str, Any]:
    loss, constants = CASES[name]
    engine = make(loss, ENGINES["ddp"])
    parts = [embed(engine, *part) for part in micro_batches()]
    features = [torch.cat([part[i] for part in parts]) for i in (0, 1)]
    value = definition(loss, constants, [*features, *parts[0][2:]])
    engine.backward(value)
    result = engine.step(OPTIM.lr)
    return {"loss": float(value.detach()), "grad_norm": result.grad_norm, "weights": engine.model_state()}


def pairs(num_ranks: int, everything: bool) -> list[tuple[str, str]]:
    """Each loss with each engine, or with one engine, which differs between numbers of ranks."""
    return [
        (name, engine)
        for i, name in enumerate(CASES)
        for j, engine in enumerate(EXACT_ENGINES)
        if everything or (i + num_ranks) % len(EXACT_ENGINES) == j
    ]


def cached_steps(rank: int, num_ranks: int, everything: bool) -> dict[str, Any]:
    os.environ["LOCAL_RANK"] = str(rank)
    results = {}
    for name, engine_name in pairs(num_ranks, everything):
        loss, constants = CASES[name]
        engine = make(loss, ENGINES[engine_name])
        share = NUM_PARTS // num_ranks
        part = slice(rank * share, (rank + 1) * share)
        cached = GradCache(engine, build_loss(loss, TEACHER_SCALE), SIZES[part], spill_buffer())
        for batch, seed in batches(constants)[part]:
            cached.add(batch, seed)
        value = float(cached.loss())
        cached.backward()
        result = engine.step(OPTIM.lr)
        results[name, engine_name] = {
            "loss": value,
            "grad_norm": result.grad_norm,
            "weights": engine.model_state(),
            "shared": cached.scalars.get("shared_positives"),
        }
        engine.close()
    return results


class FailsWhenMade(ClipLoss):
    def __init__(self, **ranks):
        raise RuntimeError("no file of weights")


class WithParameter(ClipLoss):
    def __init__(self, **ranks):
        super().__init__(**ranks)
        self.weight = torch.nn.Parameter(torch.ones(()))


@functools.cache
def expected_of(name: str) -> dict[str, Any]:
    return whole_batch(name)


@pytest.mark.parametrize("everything", [False, pytest.param(True, marks=pytest.mark.long)])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_cached_step_of_each_loss_is_that_of_the_whole_batch(num_ranks, everything):
    """In float64, on ranks with different numbers of pairs. ZeRO 1 to 3 update their weights in float32."""
    results = on_ranks(num_ranks, cached_steps, num_ranks, everything)[0]
    assert list(results) == pairs(num_ranks, everything)
    for (name, engine), result in results.items():
        expected = expected_of(name)
        exact = engine == "ddp"
        assert result["loss"] == pytest.approx(expected["loss"], rel=1e-12), (name, engine)
        norm = pytest.approx(expected["grad_norm"], rel=1e-10 if exact else 1e-6)
        assert result["grad_norm"] == norm, (name, engine)
        for key, weight in expected["weights"].items():
            error = float((result["weights"][key] - weight).abs().max())
            assert error <= (1e-10 if exact else 1e-6), f"{name} {engine} {key}: {error:.2g}"
        assert result["shared"] == (NUM_PAIRS if "groups" in CASES[name][1] else None)


def test_siglip_starts_with_the_scale_and_bias_of_its_paper(tmp_path, shards):
    config = tiny_run(tmp_path, shards, loss=LossConfig(kind="siglip")).resolved()
    assert (math.exp(config.model.init_logit_scale), config.model.init_logit_bias) == (pytest.approx(10), -10)
    own = tiny_run(tmp_path, shards, loss=LossConfig(kind="siglip", init_scale=20, init_bias=-5)).resolved()
    assert (math.exp(own.model.init_logit_scale), own.model.init_logit_bias) == (pytest.approx(20), -5)
    assert own.resolved() == own
    assert tiny_run(tmp_path, shards).resolved().model == tiny_model()


def test_runs_count_the_pairs_with_several_positives_and_resume(tmp_path, shards):
    """The 96 samples have 32 captions, so that each caption is that of three samples."""
    data = DataConfig(shards=str(shards), shuffle_block=32, positives="captions")
    options = {"loss": LossConfig(kind="siglip"), "micro_batch_size": 8}
    train(tiny_run(tmp_path / "run", shards, data=data, **options))
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    table = pq.read_table(shards / "manifest.parquet").to_pylist()
    captions = {row["key"]: row["caption"] for row in table}
    assert len(set(captions.values())) == 32
    assert all(0 < record["shared_positives"] <= 16 for record in records)
    (tmp_path / "resumed").mkdir()
    train(tiny_run(tmp_path / "resumed", shards, data=data, max_steps=3, **options))
    train(tiny_run(tmp_path / "resumed", shards, data=data, resume=True, **options))
    again = read_metrics(tmp_path / "resumed" / "metrics.jsonl")
    assert [record["shared_positives"] for record in again] == [record["shared_positives"] for record in records]
    # The learning rate depends on the length of the run, so only the first steps agree.
    assert np.allclose([record["loss"] for record in again][:2], [record["loss"] for record in records][:2], rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "focal"}, "loss.kind=focal must be clip, siglip, distill, coca or module:Class"),
        ({"kind": "siglip", "hardness": 1.0}, "needs loss.kind=clip"),
        ({"label_smoothing": 2.0}, "must lie in"),
        ({"init_bias": -10.0}, "needs loss.kind=siglip"),
        ({"kind": "coca", "caption_loss_weight": math.inf}, "caption_loss_weight=inf must be a finite number"),
        ({"kind": "coca", "clip_loss_weight": math.inf}, "clip_loss_weight=inf must be a finite number"),
    ],
)
def test_invalid_options_are_refused_by_name(options, message):
    with pytest.raises(UserError, match=message):
        LossConfig(**options)


@pytest.mark.parametrize(
    "kind",
    [
        "no_such_module:Loss",
        "../module:Loss",
        "test_losses:NoSuchClass",
        "pathlib:Path",
        "test_losses:FailsWhenMade",
        "test_losses:WithParameter",
    ],
)
def test_own_class_that_cannot_be_made_is_refused_before_anything_is_written(tmp_path, shards, kind):
    with pytest.raises(UserError, match=f"loss.kind={kind}"):
        train(tiny_run(tmp_path / "run", shards, loss=LossConfig(kind=kind)))
    assert not (tmp_path / "run").exists()


def test_own_module_that_is_no_python_is_refused(tmp_path, monkeypatch):
    (tmp_path / "unfinished_loss.py").write_text("class Loss(")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match="loss.kind=unfinished_loss:Loss cannot be imported: SyntaxError"):
        build_loss(LossConfig(kind="unfinished_loss:Loss"))


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (1.0, "result of the loss is of type float"),
        (torch.ones(3, requires_grad=True), r"shape \(3,\)"),
        (torch.tensor(1.0), "without a gradient"),
        ({}, "empty dictionary"),
        (dict.fromkeys(("pull_loss", "lr"), torch.zeros((), requires_grad=True)), "rename it to lr_loss"),
        ({"part": None}, "term part of the loss is of type NoneType"),
    ],
    ids=["number", "vector", "constant", "no terms", "reserved name", "no tensor"],
)
def test_result_of_an_own_loss_that_cannot_train_is_named(result, message):
    with pytest.raises(UserError, match=message):
        total(result)


def test_groups_exclude_label_smoothing(tmp_path, shards):
    data = DataConfig(shards=str(shards), positives="captions")
    with pytest.raises(UserError, match="data.positives=captions cannot be combined with loss.label_smoothing"):
        tiny_run(tmp_path, shards, data=data, loss=LossConfig(label_smoothing=0.1))
