"""The precision for `engine.precision = "auto"` on ranks, in resumed runs, in plans, and for embeddings."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranks import on_ranks
from synthetic import tiny_model, tiny_run, write_shards
from torch import nn

from bclip_fast import config as config_files
from bclip_fast.errors import UserError
from bclip_fast.eval.embed import Embedder
from bclip_fast.hardware import ClusterConfig
from bclip_fast.ops import processor, ranking
from bclip_fast.plan import command, estimate
from bclip_fast.plan.samples import PMC_15M
from bclip_fast.train.config import TrainConfig
from bclip_fast.train.engine import EngineConfig
from bclip_fast.train.finetune import FinetuneConfig
from bclip_fast.train.precision import resolve_precision
from bclip_fast.train.trainer import train

AUTO = EngineConfig(name="ddp")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"), num_samples=32, num_val=8)


def imitate(monkeypatch: pytest.MonkeyPatch, instructions: str) -> None:
    """Imitate a processor with these bfloat16 instructions, or without any."""
    monkeypatch.setattr(processor, "BFLOAT16_INSTRUCTIONS", instructions)
    monkeypatch.setattr(processor, "BFLOAT16_REASON", f"it has {instructions or 'none'}")
    if not instructions:
        monkeypatch.setattr(processor, "HAS_AMX", False)
        if ranking.is_compiled():
            monkeypatch.setattr("bclip_fast._cpu.has_amx", lambda: False)


def precision_of(run: Path) -> str:
    return config_files.from_toml(TrainConfig, run / "config.toml").engine.precision


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("instructions", "precision"), [("AVX512-BF16", "bf16"), ("", "fp32")])
def test_auto_precision_follows_processor_and_logs_reason(instructions, precision, monkeypatch, caplog):
    imitate(monkeypatch, instructions)
    caplog.set_level(logging.INFO)
    assert resolve_precision("auto") == precision
    assert f"engine.precision auto: {precision}, because it has" in caplog.text
    assert resolve_precision("fp16") == "fp16"


def precision_on_ranks(rank: int, without: int) -> torch.Tensor:
    processor.BFLOAT16_INSTRUCTIONS = "" if rank == without else "AMX"
    return torch.tensor(["fp32", "bf16"].index(resolve_precision("auto")))


@pytest.mark.parametrize(("without", "expected"), [(1, 0), (2, 1)], ids=["mixed", "alike"])
def test_ranks_select_bf16_only_if_all_have_it(without, expected):
    assert [int(choice) for choice in on_ranks(2, precision_on_ranks, without)] == [expected] * 2


def test_default_precision_is_auto():
    assert EngineConfig().precision == FinetuneConfig(model="", data="").engine.precision == "auto"
    for name in ("biomedclip_b16.toml", "pmc_small.toml"):
        assert config_files.parse(TrainConfig, [name], prog="test").engine.precision == "auto"


@pytest.mark.parametrize("begun", ["fp32", "bf16"])
def test_run_keeps_precision_on_another_processor(begun, shards, tmp_path, monkeypatch, caplog):
    with_bf16, without = ("AVX512-BF16", "fp32"), ("", "bf16")
    (first, _), (second, other) = (with_bf16, without) if begun == "bf16" else (without, with_bf16)
    caplog.set_level(logging.INFO)
    imitate(monkeypatch, first)
    config = tiny_run(tmp_path / "run", shards, engine=AUTO, max_steps=3)
    run = train(config)
    assert precision_of(run) == begun
    imitate(monkeypatch, second)
    other = {"fp32": "bf16", "bf16": "fp32"}[begun]
    train(replace(config, resume=True, max_steps=6))
    assert precision_of(run) == begun
    assert len(losses(run)) == 6
    assert f"auto: {begun}, as in the run so far; a new run here takes {other}, because" in caplog.text
    changed = replace(config, resume=True, max_steps=7, engine=replace(AUTO, precision=other))
    with pytest.raises(UserError, match=f"engine.precision: {begun} -> {other}; restore them, or add --allow_changes"):
        train(changed)
    assert precision_of(run) == begun
    train(replace(changed, allow_changes=True))
    assert precision_of(run) == other


def test_plan_takes_precision_of_cluster(monkeypatch, capsys):
    imitate(monkeypatch, "")
    config = TrainConfig(preset="", model=tiny_model(), engine=AUTO, batch_size=16)
    for device, precision in (("h100", "bf16"), ("cpu", "fp32")):
        planned = replace(config, cluster=ClusterConfig(device=device, memory_gib=80, allow_slow_loader=True))
        plan = command.run(planned)
        assert plan.memory == estimate.build_plan(planned.with_precision(precision), PMC_15M, plan.cluster).memory
        assert f"Precision   {precision} (auto): " in capsys.readouterr().out


@pytest.mark.parametrize(("instructions", "precision"), [("AMX", "bf16"), ("", "fp32")])
def test_embedder_precision_follows_processor(instructions, precision, monkeypatch):
    imitate(monkeypatch, instructions)
    embedder = Embedder(nn.Identity(), lambda image: image, lambda texts: texts, precision="auto")
    assert embedder.precision == precision
