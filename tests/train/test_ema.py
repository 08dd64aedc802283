"""The exponential moving average (EMA) of the weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic import tiny_model, tiny_run, weights

from bclip_fast import pretrained
from bclip_fast.errors import UserError
from bclip_fast.io.runs import read_metrics
from bclip_fast.model.biomedclip import BiomedClip
from bclip_fast.train.checkpoint import load_latest, read, verify
from bclip_fast.train.config import CheckpointConfig, TrainConfig, ValidationConfig
from bclip_fast.train.ema import Ema
from bclip_fast.train.engine import EngineConfig, build_engine
from bclip_fast.train.schedule import OptimConfig
from bclip_fast.train.trainer import train


def test_ema_follows_formula_and_is_validated_and_exported(shards: Path, tmp_path: Path) -> None:
    every = CheckpointConfig(every_steps=1, keep=0)
    validated = []

    def validate(model: BiomedClip, *_: Any) -> dict[str, float]:
        validated.append(model.state_dict())
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
    (plain, averaged) = validated
    for name in averaged:
        assert torch.equal(plain[name], state.model[name])
        assert torch.equal(averaged[name], state.ema[name])
    last = [record for record in read_metrics(run / "metrics.jsonl") if "validation_ema/scale" in record]
    assert [record["step"] for record in last] == [3]
    for folder, source in (("model", state.model), ("model_ema", state.ema)):
        model = pretrained.load(run / folder)[0]
        assert all(torch.equal(tensor, source[name]) for name, tensor in model.state_dict().items())
    (run / "checkpoints" / "step-00000003" / "ema.safetensors").write_bytes(b"")
    assert "ema.safetensors is empty" in str(verify(run / "checkpoints" / "step-00000003"))
    with pytest.raises(UserError, match="ema_decay=1"):
        TrainConfig(ema_decay=1.0)


def test_ema_of_resumed_run_without_ema_starts_at_its_weights(shards: Path, tmp_path: Path) -> None:
    config = tiny_run(tmp_path / "run", shards, max_steps=1)
    run = train(config)
    assert not load_latest(run / "checkpoints").ema
    assert not (run / "model_ema").exists()
    start = weights(run)
    changes = {"resume": True, "ema_decay": 0.5, "max_steps": 2}
    with pytest.raises(UserError, match=r"change its arithmetic: ema_decay: 0\.0 -> 0\.5"):
        train(dataclasses.replace(config, **changes))
    train(dataclasses.replace(config, **changes, allow_changes=True))
    state = load_latest(run / "checkpoints")
    for name, tensor in state.ema.items():
        torch.testing.assert_close(tensor, (start[name] + state.model[name]) / 2, rtol=1e-6, atol=1e-7)


def test_skipped_step_keeps_ema(shards: Path, tmp_path: Path) -> None:
    """fp16's initial loss scale overflows: neither the weights nor an EMA with other values change."""
    settings = EngineConfig(name="ddp", precision="fp16")
    engine = build_engine(BiomedClip(tiny_model()), settings, OptimConfig(), 2)
    away = {name: tensor + 1 for name, tensor in engine.model_state().items()}
    average = Ema(engine, 0.5, away)
    average.update()
    for name, tensor in average.state().items():
        torch.testing.assert_close(tensor, away[name] - 0.5)
    run = train(tiny_run(tmp_path / "run", shards, engine=settings, ema_decay=0.5, max_steps=1))
    state = load_latest(run / "checkpoints")
    assert state.optimizer.num_steps == 0
    assert all(torch.equal(state.ema[n], t) for n, t in state.model.items())
