"""Runs whose micro-batches have a token budget: the same steps as without one, on any number of ranks."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import on_ranks
from runs import assert_equal_runs, column, stopped_after
from synthetic import tiny_model, tiny_run, weights

from bclip_fast.data.shards.format import Sample
from bclip_fast.data.shards.writer import ShardWriter
from bclip_fast.errors import UserError
from bclip_fast.hardware import Cluster, ClusterConfig, cluster_of
from bclip_fast.plan.estimate import build_plan
from bclip_fast.plan.samples import samples_of
from bclip_fast.train import grad_cache, replay
from bclip_fast.train.checkpoint import load_latest
from bclip_fast.train.config import TrainConfig
from bclip_fast.train.engine import EngineConfig
from bclip_fast.train.trainer import train

# The tiny model has 17 tokens an image and at most 12 a caption.
BUDGET = 90
ZERO3 = EngineConfig(zero_stage=3, precision="fp32")


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards with captions of 1 to 14 words."""
    folder, generator = tmp_path_factory.mktemp("captioned"), np.random.default_rng(0)
    with ShardWriter(folder) as writer:
        for i in range(48):
            data = io.BytesIO()
            Image.fromarray(generator.integers(0, 256, (36, 36, 3), dtype=np.uint8)).save(data, "JPEG")
            caption = " ".join(generator.choice(["red", "blue", "cell", "scan"], int(generator.integers(1, 15))))
            writer.write(Sample(f"sample{i:02d}", data.getvalue(), caption, {}), "train")
    return folder


def budgeted(run: Path | str, shards: Path | str, **changes: Any) -> TrainConfig:
    return tiny_run(Path(run), Path(shards), **{"max_steps": 4, "micro_batch_tokens": BUDGET, **changes})


@pytest.fixture(scope="module")
def whole(captioned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that embeds each batch at once."""
    return train(budgeted(tmp_path_factory.mktemp("whole") / "run", captioned, micro_batch_tokens=0))


def sizes_of_run(rank: int, run: str, shards: str, engine: EngineConfig) -> list[list[int]]:
    """Run, and return the sizes of this rank's micro-batches in each step."""
    steps, make = [], grad_cache.GradCache.__init__

    def note(self: Any, engine: Any, loss: Any, sizes: Any, spill: Any) -> None:
        steps.append(list(sizes))
        make(self, engine, loss, sizes, spill)

    with mock.patch.object(grad_cache.GradCache, "__init__", note):
        train(budgeted(run, shards, engine=engine))
    return steps


@pytest.mark.parametrize(("num_ranks", "engine"), [(1, EngineConfig(name="ddp", precision="fp32")), (2, ZERO3)])
def test_budget_gives_the_steps_of_the_whole_batch(
    num_ranks: int, engine: EngineConfig, captioned: Path, whole: Path, tmp_path: Path
):
    run = tmp_path / "run"
    arguments = str(run), str(captioned), engine
    of_ranks = [sizes_of_run(0, *arguments)] if num_ranks == 1 else on_ranks(num_ranks, sizes_of_run, *arguments)
    steps = list(zip(*of_ranks, strict=True))
    assert len(steps) == 4
    for ranks in steps:
        assert sum(map(sum, ranks)) == 16
        assert len({len(sizes) for sizes in ranks}) == 1
        assert len(ranks[0]) > 1
        assert max(map(max, ranks)) <= BUDGET // 17
    assert num_ranks == 1 or any(sum(ranks[0]) != sum(ranks[1]) for ranks in steps), "no step had unequal ranks"
    assert column(run, "loss") == pytest.approx(column(whole, "loss"), rel=1e-5)
    for name, tensor in weights(whole).items():
        assert float((weights(run)[name] - tensor).abs().max()) <= 1e-5, name


def test_resumed_run_repeats_the_micro_batches_bit_for_bit(captioned: Path, tmp_path: Path):
    model = tiny_model(dropout=0.1)
    model = replace(model, vision=replace(model.vision, patch_dropout=0.5))
    config = budgeted(tmp_path / "run", captioned, model=model)
    # 8 of 16 patches and the class token.
    assert config.resolved().image_tokens == 9
    assert replace(config, patch_dropout_until=0.5).resolved().image_tokens == 17
    train(config)
    resumed = stopped_after(tmp_path / "run", tmp_path / "resumed", 3)
    train(replace(config, run=str(resumed), resume=True))
    assert_equal_runs(resumed, tmp_path / "run")
    with pytest.raises(UserError, match=r"change its arithmetic: micro_batch_tokens: 90 -> 60"):
        train(replace(config, run=str(resumed), resume=True, micro_batch_tokens=60))


def test_budgeted_step_is_replayed(captioned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The dump of a step has micro-batches of different sizes, and its replay gives the same numbers."""
    config = budgeted(tmp_path / "run", captioned, max_steps=1).resolved()
    dumps = []
    backward = grad_cache.GradCache.backward

    def keep(self: grad_cache.GradCache) -> torch.Tensor:
        dumps.append(list(self.micro_batches()))
        return backward(self)

    monkeypatch.setattr(grad_cache.GradCache, "backward", keep)
    torch_state = load_latest(train(replace(config, optim=replace(config.optim, lr=1e-30))) / "checkpoints").model
    (batches,) = dumps
    assert len({len(batch.lengths) for batch, _ in batches}) > 1
    loss, norm = (column(tmp_path / "run", name)[0] for name in ("loss", "grad_norm"))
    dump = replay.Dump(config, 1, loss, norm, 0.0, batches, torch_state)
    folder = replay.write_dump(tmp_path / "run", dump)
    assert replay._replay(replay.read_dump(folder)) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"micro_batch_size": 4}, "micro_batch_tokens=90 and micro_batch_size=4 divide the batch in two ways"),
        ({"micro_batch_tokens": -1}, "micro_batch_tokens=-1 must not be negative"),
        ({"micro_batch_tokens": 28}, r"micro_batch_tokens=28 is less than the 29 tokens of the longest pair, 17 of an"),
    ],
)
def test_bad_budgets_are_refused(changes: dict[str, Any], message: str, captioned: Path, tmp_path: Path):
    with pytest.raises(UserError, match=message):
        train(budgeted(tmp_path / "run", captioned, **changes))
    assert not (tmp_path / "run").exists()


def test_missing_manifest_is_refused_before_the_run_begins(captioned: Path, tmp_path: Path):
    manifest = captioned / "manifest.parquet"
    manifest.rename(tmp_path / "manifest.parquet")
    with pytest.raises(UserError, match=r"manifest.parquet is missing, and micro_batch_tokens needs it"):
        train(budgeted(tmp_path / "run", captioned))
    (tmp_path / "manifest.parquet").rename(manifest)
    assert not (tmp_path / "run").exists()


def test_plan_counts_micro_batches_of_the_budget(captioned: Path):
    config = budgeted("unused", captioned, batch_size=32)
    cluster: Cluster = cluster_of(ClusterConfig())
    plans = {
        tokens: build_plan(replace(config, micro_batch_tokens=tokens), samples_of(config), cluster)
        for tokens in (0, 90, 180)
    }
    pairs = {tokens: plan.stages[0].micro_batch for tokens, plan in plans.items()}
    assert pairs[0] == 32
    assert 3 <= pairs[90] <= 5
    assert 6 <= pairs[180] <= 10
    assert "replay" in plans[90].stages[0].flops
    assert plans[90].memory["backward"]["temporary"] < plans[180].memory["backward"]["temporary"]
