"""Steps that must not update: loss spikes, overflows, and the dump of a run that gives up."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import DROPOUT
from ranks import on_ranks
from runs import column
from synthetic import tiny_model, tiny_run, weights, write_shards

from bclip_fast import distributed
from bclip_fast.cli import main
from bclip_fast.errors import UserError
from bclip_fast.io.runs import read_metrics
from bclip_fast.loss import ClipLoss
from bclip_fast.model.biomedclip import BiomedClip
from bclip_fast.train import checkpoint
from bclip_fast.train.config import CheckpointConfig
from bclip_fast.train.engine import EngineConfig, StepResult, build_engine
from bclip_fast.train.loss_spikes import LossSpikes, SpikeConfig
from bclip_fast.train.schedule import OptimConfig
from bclip_fast.train.trainer import train


def test_loss_spikes_above_limits_forbid_updates():
    spikes = LossSpikes(SpikeConfig(window=4, loss=10.0, grad_norm=20.0, max_skipped=1))
    taken, refused = StepResult(1.0, False), StepResult(1.0, True)
    for step, loss in enumerate([3.0, 3.1, 2.9], 1):
        assert spikes.limits(16) == (math.inf, math.inf)
        assert spikes.observe(step, loss, taken) is None
    assert spikes.limits(16) == (math.inf, math.inf)
    spikes.observe(4, 3.3, StepResult(2.0, False))
    # The losses 2.9, 3.0, 3.1 and 3.3 have the median 3.05 and the deviations 0.05, 0.05, 0.15 and 0.25, so the limit
    # is 3.05 + 10 * 0.1. Most norms are 1, so their deviation is the minimum, a hundredth of the median.
    assert spikes.limits(16) == (pytest.approx(4.05), pytest.approx(1 + 20 * 0.01))
    assert not spikes.may_end_run(5)
    assert spikes.observe(5, 4.06, refused) == "the loss is 4.06, above the limit 4.05"
    assert not spikes.too_many
    assert spikes.num_skipped == 1
    restored = LossSpikes(SpikeConfig(window=4, loss=10.0, grad_norm=20.0, max_skipped=1))
    restored.load_state_dict(json.loads(json.dumps(spikes.state_dict())))
    for rule in (spikes, restored):
        assert rule.limits(16) == (pytest.approx(4.05), pytest.approx(1.2))
        assert rule.may_end_run(6)
        assert not rule.may_end_run(9)
        assert rule.observe(6, 3.0, StepResult(1.3, True)) == "the gradient norm is 1.3, above the limit 1.2"
        assert rule.too_many
        assert rule.num_skipped == 2
        # Skips before the window don't count. Another batch size starts a new window.
        assert rule.observe(10, math.nan, StepResult(math.nan, True)) == "the loss is nan"
        assert not rule.too_many
        assert rule.num_skipped == 3
        assert rule.limits(64) == (math.inf, math.inf)
    # Overflows of fp16's loss scale don't count.
    assert spikes.observe(11, 3.0, StepResult(math.inf, True, overflow=True)) is None
    assert spikes.num_skipped == 3
    off = LossSpikes(SpikeConfig(window=1, loss=0.0, grad_norm=0.0))
    off.observe(1, 1.0, taken)
    assert off.limits(0) == (math.inf, math.inf)
    with pytest.raises(UserError, match=r"spikes\.window=0"):
        SpikeConfig(window=0)


@pytest.mark.parametrize(("name", "stage"), [("ddp", 0), *(("deepspeed", stage) for stage in range(4))])
def test_engine_after_refused_steps_equals_engine_without_them(name: str, stage: int):
    """Refused steps, including one with NaN, leave weights, moments and the number of updates unchanged."""
    states = []
    for limits in ([math.inf, math.inf], [math.inf, -1.0, 1e-9, math.nan, math.inf]):
        torch.manual_seed(0)
        model = BiomedClip(tiny_model())
        config = EngineConfig(name=name, zero_stage=stage, precision="fp32")
        engine = build_engine(model, config, OptimConfig(grad_clip_norm=1.0), 2)
        image, ids = torch.rand(2, 3, 32, 32), torch.randint(1, 90, (2, 12))
        for limit in limits:
            output = engine(image, ids)
            loss = (output["image_features"] * output["text_features"]).sum()
            engine.backward(loss * math.nan if math.isnan(limit) else loss)
            result = engine.step(1e-3, math.inf if math.isnan(limit) else limit)
            assert result.skipped == (limit != math.inf)
            assert not result.overflow
            assert math.isfinite(result.grad_norm) != math.isnan(limit)
        states.append((engine.model_state(), engine.optimizer_state()))
        engine.close()
    (model_a, optimizer_a), (model_b, optimizer_b) = states
    assert all(torch.equal(model_a[key], model_b[key]) for key in model_a)
    assert optimizer_a.num_steps == optimizer_b.num_steps == 2
    for key, moments in optimizer_a.moments.items():
        assert all(torch.equal(moments[kind], optimizer_b.moments[key][kind]) for kind in moments)


@pytest.fixture
def broken_at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, float], None]:
    """A function (step, factor) that multiplies the loss of a step, counted from 1 over all runs of the test."""
    calls, real, factors = [0], ClipLoss.forward, {}

    def forward(self: Any, *args: Any, **keywords: Any) -> Any:
        calls[0] += 1
        return real(self, *args, **keywords) * factors.get(calls[0], 1.0)

    monkeypatch.setattr(ClipLoss, "forward", forward)
    return factors.__setitem__


@pytest.mark.parametrize("factor", [math.nan, 1e4])
def test_run_with_spike_skips_step_and_resumes_bitwise(
    shards: Path, tmp_path: Path, broken_at_step: Any, factor: float
):
    """The position in the data and the learning rate advance. A run stopped right after the step resumes bitwise."""
    broken_at_step(5, factor)
    spikes = SpikeConfig(window=3, loss=50.0)
    config = tiny_run(tmp_path / "run", shards, model=DROPOUT, max_steps=8, spikes=spikes)
    config = dataclasses.replace(config, checkpoint=CheckpointConfig(every_steps=5))
    run = train(config)
    assert column(run, "skipped") == [0, 0, 0, 0, 1, 1, 1, 1]
    assert column(run, "samples") == [16 * step for step in range(1, 9)]
    saved = checkpoint.load_latest(run / "checkpoints")
    assert saved.optimizer.num_steps == 7
    assert all(torch.isfinite(tensor).all() for tensor in saved.model.values())
    part = tmp_path / "part"
    os.rename(run, part)
    expected = column(part, "loss"), weights(part)
    checkpoint.shutil.rmtree(part / "checkpoints" / "step-00000008")
    train(dataclasses.replace(config, run=str(part), resume=True))
    assert column(part, "skipped") == [0, 0, 0, 0, 1, 1, 1, 1]
    assert str(column(part, "loss")) == str(expected[0])
    assert all(torch.equal(tensor, expected[1][name]) for name, tensor in weights(part).items())


@pytest.mark.parametrize("micro_batch_size", [0, 4])
def test_run_with_too_many_skips_writes_dump_that_replays(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], micro_batch_size: int
):
    """The limit is near the median norm. One skipped step is allowed, and the second within the window ends the run."""
    config = tiny_run(
        tmp_path / "run",
        shards,
        model=DROPOUT,
        micro_batch_size=micro_batch_size,
        spikes=SpikeConfig(window=2, grad_norm=1e-9, max_skipped=1),
        max_steps=60,
    )
    words = r"2 of the last 2 steps were skipped, the last one at step \d+: the gradient norm is"
    with pytest.raises(UserError, match=words) as e:
        train(config)
    (dump,) = (tmp_path / "run" / "dumps").iterdir()
    last = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    assert last["skipped"] >= 2
    assert dump.name == f"step-{last['step']:08d}"
    assert str(dump) in str(e.value)
    assert {path.suffix for path in dump.iterdir()} == {".safetensors", ".json", ".toml"}
    capsys.readouterr()
    assert main(["train", "replay", str(dump)]) == 0
    text = capsys.readouterr().err
    for name in ("loss", "grad_norm"):
        assert f"{name} {last[name]!r} in the run, {last[name]!r} computed again" in text
    # The replay notices a changed byte of the batch.
    file = dump / "batch-0000.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 255
    file.write_bytes(data)
    assert main(["train", "replay", str(dump)]) == 1
    state = json.loads((dump / "state.json").read_text())
    assert len(state["ranks"][0]) == (4 if micro_batch_size else 1)
    state["ranks"].append([])
    (dump / "state.json").write_text(json.dumps(state))
    assert main(["train", "replay", str(dump)]) == 2
    file.write_bytes(data[:1000])
    assert "needs 2 rank(s), but 1 are running: torchrun --nproc-per-node 2" in capsys.readouterr().err
    state["ranks"].pop()
    (dump / "state.json").write_text(json.dumps(state))
    assert main(["train", "replay", str(dump)]) == 2
    assert "is not a complete step dump" in capsys.readouterr().err


def _give_up_and_replay(rank: int, folder: str) -> dict[str, int]:
    """Exit status of `bclip train replay` by engine."""
    os.environ["LOCAL_RANK"] = str(rank)
    statuses = {}
    for name, settings, micro in (
        ("ddp", EngineConfig("ddp", precision="fp32"), 0),
        ("zero2", EngineConfig(zero_stage=2, precision="fp32"), 4),
    ):
        run = Path(folder) / name
        options: dict[str, Any] = {"model": DROPOUT, "engine": settings, "micro_batch_size": micro, "max_steps": 60}
        rule = SpikeConfig(window=2, grad_norm=1e-9, max_skipped=1)
        with pytest.raises(UserError, match="steps were skipped"):
            train(tiny_run(run, Path(folder) / "shards", spikes=rule, **options))
        distributed.barrier()
        (dump,) = (run / "dumps").iterdir()
        statuses[name] = main(["train", "replay", str(dump)])
        # Change the batch of one rank. Its gradient is part of the average, so both ranks see the difference.
        if rank == 1:
            batch = dump / "batch-0001.safetensors"
            batch.write_bytes(batch.read_bytes()[:-1] + b"\xa5")
        distributed.barrier()
        statuses[f"{name} of another batch"] = main(["train", "replay", str(dump)])
    return statuses


def test_dump_of_two_ranks_replays(tmp_path: Path):
    write_shards(tmp_path / "shards")
    names = {"ddp": 0, "ddp of another batch": 1, "zero2": 0, "zero2 of another batch": 1}
    assert on_ranks(2, _give_up_and_replay, str(tmp_path)) == [names, names]
