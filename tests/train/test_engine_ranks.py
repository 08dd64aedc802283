"""Two ranks over gloo give the losses and weights of one rank, with every engine and after a resume."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from synthetic import tiny_model, tiny_run, weights, write_shards

from bclip_fast import config as config_files
from bclip_fast import distributed, pretrained
from bclip_fast.errors import UserError
from bclip_fast.io.runs import read_metrics
from bclip_fast.train.config import TrainConfig
from bclip_fast.train.engine import EngineConfig
from bclip_fast.train.engine.deepspeed import DeepSpeedEngine
from bclip_fast.train.trainer import train

ENGINES = {
    "ddp": EngineConfig(name="ddp", precision="fp32"),
    **{f"zero{stage}": EngineConfig(zero_stage=stage, precision="fp32") for stage in (0, 1, 2, 3)},
}

# fp32 sums run in another order. Measured differences over six steps: 4e-6 in the loss and the logit scale, 1.5e-5 of
# the largest gradient norm, 1.2e-5 in the weights.
CURVE_TOLERANCE = 2e-5
WEIGHTS_TOLERANCE = 1e-4


def curves(run: Path) -> dict[str, list[float]]:
    records = read_metrics(run / "metrics.jsonl")
    return {name: [record[name] for record in records] for name in ("loss", "grad_norm", "logit_scale", "lr")}


def assert_same_run(run: Path, reference: Path) -> None:
    ours, theirs = curves(run), curves(reference)
    assert len(ours["loss"]) == len(theirs["loss"]) == 6
    assert ours["lr"] == theirs["lr"]
    for name, scale in [("loss", 1.0), ("logit_scale", 1.0), ("grad_norm", max(theirs["grad_norm"]))]:
        off = max(abs(one - other) for one, other in zip(ours[name], theirs[name], strict=True)) / scale
        assert off <= CURVE_TOLERANCE, f"{run}: {name} is off by {off:.2g}"
    expected = weights(reference)
    actual = weights(run)
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=WEIGHTS_TOLERANCE)


def stop_after_3(run: Path, target: Path) -> Path:
    shutil.copytree(run, target)
    shutil.rmtree(target / "checkpoints" / "step-00000006")
    return target


def _train_on_ranks(rank: int, folder: str) -> dict[str, Any]:
    """Train with all engines, uninterrupted and resumed after step 3. Return the number of moments on each rank."""
    os.environ["LOCAL_RANK"] = str(rank)
    root = Path(folder)
    results: dict[str, Any] = {}
    close = DeepSpeedEngine.close

    def counting_close(self: DeepSpeedEngine) -> None:
        stage = self._stage
        optimizer = self._engine.optimizer.optimizer if stage > 0 else self._engine.optimizer
        results[f"zero{stage}"] = sum(state["exp_avg"].numel() for state in optimizer.state.values())
        if stage == 3:
            results["zero3 parameters"] = sum(parameter.ds_tensor.numel() for parameter in self._model.parameters())
        close(self)

    DeepSpeedEngine.close = counting_close  # type: ignore[method-assign]
    for name, engine in ENGINES.items():
        config = tiny_run(root / name, root / "shards", engine=engine)
        run = train(config)
        if rank == 0:
            stop_after_3(run, root / f"{name}-resumed")
        distributed.barrier()
        train(dataclasses.replace(config, run=str(root / f"{name}-resumed"), resume=True))
    train(_in_micro_batches(root / "micro", root / "shards", ENGINES["zero2"]))
    # Two ranks continue a run of one rank.
    config = tiny_run(root / "one-to-two", root / "shards", engine=ENGINES["zero2"], resume=True)
    train(config)
    results["refused"] = _refusal(tiny_run(root / "uneven", root / "shards", batch_size=15))
    results["refused on rank 0"] = _refusal(tiny_run(root / "ddp", root / "shards"))
    return results


def _in_micro_batches(run: Path, shards: Path, engine: EngineConfig) -> TrainConfig:
    """A run with dropout, patch dropout and a growing batch: 4 micro-batches of 4 pairs, and 8 from epoch 1."""
    model = tiny_model(dropout=0.1)
    model = dataclasses.replace(model, vision=dataclasses.replace(model.vision, patch_dropout=0.25))
    return tiny_run(run, shards, engine=engine, model=model, max_steps=8, micro_batch_size=4, batch_schedule=((1, 32),))


def _refusal(config: TrainConfig) -> str:
    try:
        train(config)
    except UserError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def reference(root: Path) -> Path:
    return train(tiny_run(root / "reference", write_shards(root / "shards"), engine=ENGINES["ddp"]))


@pytest.fixture(scope="module")
def held(root: Path, reference: Path) -> list[dict[str, Any]]:
    stop_after_3(reference, root / "one-to-two")
    return on_ranks(2, _train_on_ranks, str(root))


@pytest.mark.parametrize("name", ENGINES)
def test_two_ranks_equal_one_rank(root: Path, reference: Path, held: list[dict[str, Any]], name: str):
    assert_same_run(root / name, reference)


@pytest.mark.parametrize("name", ENGINES)
def test_two_ranks_resume_bitwise(root: Path, held: list[dict[str, Any]], name: str):
    uninterrupted, resumed = root / name, root / f"{name}-resumed"
    assert curves(resumed) == curves(uninterrupted)
    expected, actual = weights(uninterrupted), weights(resumed)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


def test_micro_batches_on_two_ranks_equal_one_rank(root: Path, held: list[dict[str, Any]], tmp_path: Path):
    """Two ranks draw the random numbers of one rank with twice as many micro-batches, also after a resume."""
    one = train(_in_micro_batches(tmp_path / "one", root / "shards", ENGINES["ddp"]))
    ours, theirs = curves(root / "micro"), curves(one)
    assert len(ours["loss"]) == 8
    assert ours["lr"] == theirs["lr"]
    assert max(abs(a - b) for a, b in zip(ours["loss"], theirs["loss"], strict=True)) <= CURVE_TOLERANCE
    assert [record["samples"] for record in read_metrics(one / "metrics.jsonl")] == [16, 32, 48, 64, 80, 96, 128, 160]
    resumed = shutil.copytree(one, tmp_path / "resumed")
    shutil.rmtree(resumed / "checkpoints" / "step-00000008")
    shutil.rmtree(resumed / "checkpoints" / "step-00000006")
    config = _in_micro_batches(resumed, root / "shards", ENGINES["ddp"])
    train(dataclasses.replace(config, resume=True))
    expected, actual = weights(one), weights(resumed)
    assert curves(resumed) == curves(one)
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


def test_zero_stages_shard_states_and_parameters(reference: Path, held: list[dict[str, Any]]):
    total = sum(tensor.numel() for tensor in weights(reference).values())
    padding = 200
    for part in held:
        assert part["zero0"] == total
        for name in ("zero1", "zero2", "zero3", "zero3 parameters"):
            assert total / 2 <= part[name] < total / 2 + padding, name


def test_one_rank_continues_on_two(root: Path, reference: Path, held: list[dict[str, Any]]):
    assert_same_run(root / "one-to-two", reference)


@pytest.mark.parametrize(("name", "engine"), [("zero3", ENGINES["ddp"]), ("ddp", ENGINES["zero3"])])
def test_two_ranks_continue_on_one(
    root: Path, tmp_path: Path, reference: Path, held: list[dict[str, Any]], name: str, engine: EngineConfig
):
    """The number of ranks and the engine change at once."""
    run = stop_after_3(root / name, tmp_path / "run")
    train(tiny_run(run, root / "shards", engine=engine, resume=True))
    assert_same_run(run, reference)


def test_zero3_run_exports_its_model(root: Path, held: list[dict[str, Any]]):
    model, _, _ = pretrained.load(root / "zero3")
    expected = weights(root / "zero3")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_refusal_is_raised_on_every_rank(root: Path, held: list[dict[str, Any]]):
    for part in held:
        assert "batch_size=15 must be a positive multiple of the 2 ranks" in part["refused"]
        assert f"{root / 'ddp'} holds a run already" in part["refused on rank 0"]
    assert not (root / "uneven").exists()


def _launch(command: list[str], config: TrainConfig, folder: Path) -> subprocess.CompletedProcess[str]:
    file = folder / "config.toml"
    file.write_text(config_files.to_toml(config))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.run(
        [sys.executable, "-m", *command, "bclip_fast.cli", "train", str(file)],
        env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
DEEPSPEED = ["deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", "29513", "--no_local_rank", "--module"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "engine"), [(TORCHRUN, "ddp"), (DEEPSPEED, "zero1")], ids=["torchrun", "deepspeed"]
)
def test_launchers_give_same_run(root: Path, reference: Path, tmp_path: Path, command: list[str], engine: str):
    """Each launcher starts 4 or 5 Python processes that import torch."""
    config = tiny_run(tmp_path / "run", root / "shards", engine=ENGINES[engine])
    done = _launch(command, config, tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "run", reference)
