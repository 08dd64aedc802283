"""Training: schedule, parameter groups, learning, exact resume, half precision."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import math
import shutil
from pathlib import Path

import pytest
import torch
from runs import are_equal, column, stopped_after
from synthetic import tiny_model, tiny_run, weights, write_shards

from bclip_fast import config as config_files
from bclip_fast import pretrained
from bclip_fast.errors import UserError
from bclip_fast.io.runs import read_metrics
from bclip_fast.model.biomedclip import BiomedClip, BiomedClipConfig
from bclip_fast.model.presets import PRESETS
from bclip_fast.train import checkpoint
from bclip_fast.train.config import CheckpointConfig, DataConfig, TrainConfig, ValidationConfig
from bclip_fast.train.engine import EngineConfig, build_engine, optimizer
from bclip_fast.train.schedule import OptimConfig, learning_rate, parameter_groups
from bclip_fast.train.trainer import train


@pytest.fixture(scope="module")
def finished(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps with dropout, and with checkpoints at steps 3 and 6."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    return train(tiny_run(folder, shards, model=tiny_model(dropout=0.1)))


def test_learning_rate_follows_open_clip():
    config = OptimConfig(lr=2.0, warmup_steps=4)
    rates = [learning_rate(step, 20, config) for step in range(20)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[12] == pytest.approx(1.0)
    assert rates[19] == pytest.approx(1 + math.cos(math.pi * 15 / 16))
    assert all(a > b for a, b in itertools.pairwise(rates[4:]))
    ends = OptimConfig(lr=2.0, min_lr=0.5, warmup_steps=0)
    assert learning_rate(0, 10, ends) == 2.0
    assert learning_rate(9, 10, ends) > 0.5
    assert learning_rate(2, 3, OptimConfig(lr=2.0, warmup_steps=2000)) == 2.0


def test_learning_rate_follows_batch_size():
    """A step with four times the batch size counts as four steps of the schedule. batch_lr scales its peak."""
    for rule, factor in (("none", 1.0), ("sqrt", 2.0), ("linear", 4.0)):
        config = OptimConfig(lr=1.0, warmup_steps=4, batch_lr=rule)
        assert learning_rate(8.0, 20.0, config, 4.0) == pytest.approx(factor * learning_rate(8, 20, config))


@pytest.mark.parametrize("preset", ["quickstart", "biomedclip_s16_gpt77", "coca_b32"])
def test_parameter_groups_follow_open_clip(preset: str):
    with torch.device("meta"):
        model = BiomedClip(PRESETS[preset])
    decay, rest, scale = parameter_groups(model.named_parameters(), OptimConfig(), None, model.vectors)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        # The rule of open_clip's trainer, for names without "ln" and "bn".
        is_vector = parameter.ndim < 2 or (name == "visual.cls_token" and preset == "coca_b32")
        excluded = is_vector or "bias" in name or "logit_scale" in name
        assert any(parameter is p for p in decay["params"]) != excluded, name
    assert decay["weight_decay"] == 0.2
    assert rest["weight_decay"] == scale["weight_decay"] == 0.0
    assert [names[id(p)] for p in scale["params"]] == ["logit_scale"]
    assert scale["bounds"] == (0.0, pytest.approx(math.log(100)))
    assert sum(len(group["params"]) for group in (decay, rest, scale)) == len(names)


@pytest.mark.parametrize("name", ["ddp", "deepspeed"])
@pytest.mark.parametrize(("start", "target"), [(4.6, math.log(100)), (0.01, 0.0)])
def test_logit_scale_is_clamped(name: str, start: float, target: float):
    model = BiomedClip(dataclasses.replace(tiny_model(), init_logit_scale=start))
    engine = build_engine(model, EngineConfig(name=name, precision="fp32"), OptimConfig(), 2)
    for _ in range(2):
        output = engine(torch.zeros(2, 3, 32, 32), torch.ones(2, 12, dtype=torch.int64))
        engine.backward(output["logit_scale"] * (1 if target == 0 else -1) + 0 * output["image_features"].sum())
        engine.step(0.5)
    scale = engine.model_state()["logit_scale"]
    engine.close()
    assert scale.shape == ()
    assert float(scale) == pytest.approx(target, abs=1e-6)


def test_training_reaches_high_recall(shards: Path, tmp_path: Path):
    """After 100 steps on 32 kinds of images, R@5 is far above chance, which is 16 %."""
    config = tiny_run(
        tmp_path / "run",
        shards,
        max_steps=100,
        optim=OptimConfig(lr=1e-3, warmup_steps=10, grad_clip_norm=1.0),
        validation=ValidationConfig(every_steps=100),
        checkpoint=CheckpointConfig(every_steps=0),
    )
    records = []
    run = train(config, on_step=records.append)
    assert records == [record for record in read_metrics(run / "metrics.jsonl") if "loss" in record]
    assert [record["step"] for record in records] == list(range(1, 101))
    assert [record["samples"] for record in records] == [16 * step for step in range(1, 101)]
    # An untrained model has the loss ln 16 = 2.77. Captions repeat within a batch, so the minimum is about 0.3.
    assert records[0]["loss"] > 2.7
    assert sum(column(run, "loss")[-10:]) / 10 < 2.1
    (validation,) = [record for record in read_metrics(run / "metrics.jsonl") if "loss" not in record]
    assert validation["step"] == 100
    assert validation["validation/image to text R@5"] > 0.4
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000100"]
    assert list((run / "tb").glob("events*"))


def test_run_folder_opens_as_a_model(finished: Path):
    model, preprocess, tokenizer = pretrained.load(finished)
    assert model.config == tiny_model(dropout=0.1)
    assert preprocess.config.size == 32
    assert are_equal(model.state_dict(), weights(finished))
    assert tokenizer.vocab_size <= 96
    assert tokenizer.context_length == 12
    resolved = config_files.from_toml(TrainConfig, finished / "config.toml")
    assert resolved == tiny_run(finished, Path(resolved.data.shards), model=tiny_model(dropout=0.1))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "stage"), [("ddp", 0), ("deepspeed", 0), ("deepspeed", 1), ("deepspeed", 3)])
def test_resume_is_exact(finished: Path, shards: Path, tmp_path: Path, name: str, stage: int):
    """A run with dropout that stops after step 3 resumes bitwise, with every engine."""
    engine_config = EngineConfig(name=name, zero_stage=stage, precision="fp32")
    config = tiny_run(tmp_path / "whole", shards, model=tiny_model(dropout=0.1), engine=engine_config)
    uninterrupted = train(config)
    part = stopped_after(uninterrupted, tmp_path / "part", 3)
    assert column(part, "loss") == column(uninterrupted, "loss")
    assert len(column(uninterrupted, "loss")) == 6
    train(dataclasses.replace(config, run=str(part), resume=True))
    assert column(part, "loss") == column(uninterrupted, "loss")
    assert are_equal(weights(part), weights(uninterrupted))
    states = [checkpoint.load_latest(run / "checkpoints").optimizer for run in (part, uninterrupted)]
    assert states[0].num_steps == states[1].num_steps == 6
    for parameter, moments in states[1].moments.items():
        assert are_equal(moments, states[0].moments[parameter])
    # All engines agree.
    torch.testing.assert_close(column(uninterrupted, "loss"), column(finished, "loss"), rtol=0, atol=2e-5)


def test_resumed_finished_run_trains_further_steps(finished: Path, shards: Path, tmp_path: Path):
    run = stopped_after(finished, tmp_path / "run", 6)
    config = tiny_run(run, shards, model=tiny_model(dropout=0.1), resume=True)
    train(config)
    assert column(run, "loss") == column(finished, "loss")
    train(dataclasses.replace(config, max_steps=8))
    assert len(column(run, "loss")) == 8
    assert column(run, "loss")[:6] == column(finished, "loss")


@pytest.mark.parametrize("damage", ["truncate", "flip", "no manifest", "missing file"])
def test_damaged_checkpoint_is_skipped_with_reason(
    finished: Path, shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
):
    run = stopped_after(finished, tmp_path / "run", 6)
    newest = run / "checkpoints" / "step-00000006"
    file = newest / "optimizer.safetensors"
    if damage == "truncate":
        file.write_bytes(file.read_bytes()[:1000])
        reason = "optimizer.safetensors has 1000 bytes, should have"
    elif damage == "flip":
        data = bytearray(file.read_bytes())
        data[-5] ^= 1
        file.write_bytes(data)
        reason = "optimizer.safetensors is corrupt"
    elif damage == "no manifest":
        (newest / "manifest.json").unlink()
        reason = "manifest.json cannot be read: No such file"
    else:
        file.unlink()
        reason = "optimizer.safetensors cannot be read: No such file"
    with caplog.at_level(logging.WARNING):
        train(tiny_run(run, shards, model=tiny_model(dropout=0.1), resume=True))
    assert f"{newest} is not used: {reason}" in caplog.text
    assert column(run, "loss") == column(finished, "loss")
    assert are_equal(weights(run), weights(finished))


def test_run_without_checkpoint_starts_again(finished: Path, shards: Path, tmp_path: Path):
    run = stopped_after(finished, tmp_path / "run", 0)
    shutil.rmtree(run / "model")
    train(tiny_run(run, shards, model=tiny_model(dropout=0.1), resume=True))
    assert column(run, "loss") == column(finished, "loss")
    assert are_equal(weights(run), weights(finished))


def test_resume_without_intact_checkpoint_is_an_error(finished: Path, shards: Path, tmp_path: Path):
    run = stopped_after(finished, tmp_path / "run", 6)
    for path in (run / "checkpoints").glob("*/model.safetensors"):
        path.write_bytes(b"")
    config = tiny_run(run, shards, model=tiny_model(dropout=0.1), resume=True)
    with pytest.raises(UserError, match="cannot resume, because all 2 checkpoints are damaged"):
        train(config)
    # Without checkpoints, --resume starts the run, but never over a trained model.
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match="holds a trained model/ but no checkpoint"):
        train(config)
    shutil.rmtree(run / "model")
    train(config)
    assert column(run, "loss") == column(finished, "loss")
    assert are_equal(weights(run), weights(finished))


def test_resume_with_other_settings_is_an_error(finished: Path, shards: Path, tmp_path: Path):
    config = tiny_run(finished, shards, model=tiny_model(dropout=0.1), resume=True)
    other = write_shards(tmp_path / "other", seed=1)
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    for changes, words in [
        ({"model": tiny_model(dropout=0.1, width=64)}, r"another model\.vision\.width: the checkpoint has .* 32"),
        ({"data": DataConfig(shards=str(other), shuffle_block=32)}, r"another dataset: the checkpoint has fingerprint"),
        ({"seed": 7}, "another seed: the checkpoint has seed 0, this run has 7; restore it"),
        ({"batch_size": 32}, "another batch_size"),
        ({"resume": False}, "holds a run already; add --resume to continue it"),
    ]:
        with pytest.raises(UserError, match=words):
            train(dataclasses.replace(config, **changes))
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def test_invalid_settings_are_errors(shards: Path, tmp_path: Path):
    for changes, words in [
        ({"data": DataConfig()}, r"data\.shards is not set"),
        ({"data": DataConfig(shards=str(tmp_path / "nowhere"))}, "nowhere: no such folder"),
        ({"data": DataConfig(shards=str(shards), split="dev")}, "no split 'dev'; it has train, val"),
        ({"data": DataConfig(shards=str(shards), tokenizer="gone.txt")}, "gone.txt cannot be read"),
        ({"batch_size": 1000}, "batch_size=1000 is larger than the dataset's 96 samples"),
        ({"preset": "quickstart"}, "preset=quickstart conflicts with the model section"),
        ({"preset": "huge", "model": BiomedClipConfig()}, "model preset 'huge' is unknown"),
        ({"validation": ValidationConfig(every_steps=1, split="holdout")}, "no split 'holdout'"),
    ]:
        with pytest.raises(UserError, match=words):
            train(tiny_run(tmp_path / "run", shards, **changes))
        assert not (tmp_path / "run").exists()
    file = tmp_path / "bad.toml"
    file.write_text("[optim]\nlearning_rate = 1.0\n")
    with pytest.raises(UserError, match=r"bad\.toml.*learning_rate"):
        config_files.parse(TrainConfig, [str(file)], prog="bclip train")
    for name, value in [
        ("optim.lr", "-1"), ("engine.bucket_mib", "0"), ("epochs", "0"), ("checkpoint.keep", "-1"),
        ("data.crop_scale", "0.5 2"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=name.replace(".", r"\.")):
            config_files.parse(TrainConfig, [f"--{name}", *value.split()], prog="bclip train")


def test_compile_is_refused_under_zero3(monkeypatch: pytest.MonkeyPatch):
    compiled = []
    monkeypatch.setattr(BiomedClip, "compile_layers", lambda self, graphs: compiled.append(self))
    build_engine(BiomedClip(tiny_model()), EngineConfig(name="ddp", compile=True), OptimConfig(), 2).close()
    assert len(compiled) == 1
    with pytest.raises(UserError, match=r"engine\.compile=true cannot trace .* engine\.zero_stage=3"):
        EngineConfig(zero_stage=3, compile=True)


def test_half_precision_stays_near_fp32(shards: Path, tmp_path: Path):
    """Parameters stay fp32, and the losses stay near those of fp32."""
    curves = {}
    for name, stage, precision in [
        ("ddp", 0, "fp32"), ("ddp", 0, "bf16"), ("deepspeed", 0, "bf16"), ("deepspeed", 1, "bf16"),
        ("deepspeed", 3, "bf16"), ("ddp", 0, "fp16"), ("deepspeed", 0, "fp16"),
    ]:  # fmt: skip
        settings = EngineConfig(name=name, zero_stage=stage, precision=precision)
        run = train(tiny_run(tmp_path / f"{name}{stage}-{precision}", shards, engine=settings))
        curves[name, stage, precision] = column(run, "loss")
        assert all(tensor.dtype == torch.float32 for tensor in weights(run).values() if tensor.is_floating_point())
    exact = curves.pop(("ddp", 0, "fp32"))
    for (name, stage, precision), losses in curves.items():
        assert losses != exact
        # fp16 skips its first updates until the loss scale fits. Only the losses before its first update can be
        # compared.
        count = 1 if precision == "fp16" else 6
        torch.testing.assert_close(losses[:count], exact[:count], rtol=0, atol=0.1, msg=f"{name} {stage} {precision}")
    # DeepSpeed keeps autocast in globals of the process. An fp32 run after a half-precision run must still be fp32.
    after = train(tiny_run(tmp_path / "after", shards, engine=EngineConfig(zero_stage=3, precision="fp32")))
    torch.testing.assert_close(column(after, "loss"), exact, rtol=0, atol=2e-5)


def test_fp16_overflow_skips_update():
    """The initial loss scale of 2^16 overflows. The engine lowers it without updates until a step is finite."""
    states = []
    for name, stage in (("ddp", 0), ("deepspeed", 0), ("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3)):
        torch.manual_seed(0)
        model = BiomedClip(tiny_model())
        settings = EngineConfig(name=name, zero_stage=stage, precision="fp16")
        engine = build_engine(model, settings, OptimConfig(grad_clip_norm=1.0, eps=1e-3), 2)
        before = engine.model_state()
        image, ids = torch.rand(2, 3, 32, 32), torch.randint(1, 90, (2, 12))
        skipped = []
        while skipped.count(False) < 3 and len(skipped) < 30:
            output = engine(image, ids)
            engine.backward(100 * (output["image_features"] * output["text_features"]).sum())
            skipped.append(engine.step(1e-3).skipped)
            if len(skipped) == 1:
                assert skipped[0]
                assert are_equal(engine.model_state(), before)
        assert not skipped[-1]
        assert not are_equal(engine.model_state(), before)
        state = engine.optimizer_state()
        assert state.num_steps == skipped.count(False)
        assert state.loss_scale["scale"] == 2.0 ** (16 - sum(skipped))
        states.append((skipped, state.loss_scale, engine.model_state()))
        engine.close()
    # Every engine skips the same steps, and ends with the same scale and the same weights.
    for skipped, scale, weights_there in states[1:]:
        assert (skipped, scale) == states[0][:2]
        for key, tensor in weights_there.items():
            torch.testing.assert_close(tensor, states[0][2][key], rtol=0, atol=1e-5)


def test_loss_scale_equals_grad_scaler():
    """The sequence includes overflows and a growth of the scale."""
    ours, theirs = optimizer.LossScale(), torch.amp.GradScaler("cpu", growth_interval=3)
    ours.load_state_dict(theirs.state_dict())
    parameter = torch.nn.Parameter(torch.zeros(2))
    sgd = torch.optim.SGD([parameter], lr=0.0)
    for overflow in [True, False, False, True, False, False, False, False, True]:
        theirs.scale(parameter.sum() * (float("inf") if overflow else 1.0)).backward()
        theirs.step(sgd)
        theirs.update()
        sgd.zero_grad()
        ours.update(overflow)
        assert ours.state_dict() == theirs.state_dict()
        assert ours.value == theirs.get_scale()


def test_gradient_checkpointing_gives_same_losses(shards: Path, tmp_path: Path):
    runs = []
    for enabled in (False, True):
        settings = EngineConfig(name="ddp", precision="fp32", grad_checkpointing=enabled)
        model = tiny_model(dropout=0.1)
        runs.append(train(tiny_run(tmp_path / str(enabled), shards, engine=settings, model=model, max_steps=2)))
    assert column(runs[0], "loss") == column(runs[1], "loss")


def test_checkpoints_hold_no_pickle_and_old_ones_are_removed(shards: Path, tmp_path: Path):
    run = train(tiny_run(tmp_path / "run", shards, checkpoint=CheckpointConfig(every_steps=1, keep=2)))
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["step-00000005", "step-00000006"]
    files = {path.name for path in (run / "checkpoints" / names[0]).iterdir()}
    assert files == {"model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"}
    state = json.loads((run / "checkpoints" / names[0] / "state.json").read_text())
    assert state["data"]["samples"] == 80
    assert state["optimizer"]["num_steps"] == 5
