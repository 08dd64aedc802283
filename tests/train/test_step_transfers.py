"""Training on a simulated GPU: the same results as on a CPU, and no wait in the middle of a step."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cuda import CUDA, DeviceTensor, FakeCuda, Transfer, fake_cuda
from processes import DROPOUT
from runs import are_equal, column, records, saved_steps
from synthetic import tiny_model, tiny_run, weights
from towers import RESNET_VISION

from bclip_fast.errors import UserError
from bclip_fast.loss import ClipLoss
from bclip_fast.ops.dispatch import use_backend
from bclip_fast.train import backends, step_results, trainer
from bclip_fast.train.checkpoint import load_latest
from bclip_fast.train.config import ValidationConfig
from bclip_fast.train.engine import EngineConfig
from bclip_fast.train.grad_cache import GradCache
from bclip_fast.train.loss_spikes import SpikeConfig
from bclip_fast.train.signals import EXIT_STOPPED
from bclip_fast.train.trainer import train
from bclip_fast.train.transfers import AsyncRead

# The host waits for the results of the step before: the only wait between the first forward pass and the update.
LATE_READ = Transfer("wait", "Event.synchronize", "train/transfers.py:numbers")


@pytest.fixture(autouse=True)
def reference_backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Use the reference of every operator, which runs on both devices."""
    monkeypatch.setattr(backends, "_devices", lambda: [torch.device("cpu")])
    with use_backend("reference"):
        yield


@pytest.fixture
def gpu() -> Iterator[FakeCuda]:
    with fake_cuda() as fake:
        yield fake


def comparable(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without times and memory."""
    lines = records(run)
    return [{k: v for k, v in line.items() if "second" not in k and k != "peak_memory_bytes"} for line in lines]


def events(run: Path) -> list[dict[str, Any]]:
    """The lines of events.jsonl without times, sorted: a checkpoint's line comes from another thread."""
    lines = [{key: value for key, value in line.items() if key != "time"} for line in records(run, "events.jsonl")]
    return sorted(lines, key=lambda line: (line["step"], line["event"]))


def transfers_of_steps(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> list[list[Transfer]]:
    """The list that will hold the transfers of each step, from its first forward pass to the end of its update."""
    steps: list[list[Transfer]] = []
    add, start_step = GradCache.add, trainer.build_engine

    def noted_add(self: GradCache, *arguments: Any) -> None:
        if not self._batches:
            fake.clear()
        add(self, *arguments)

    def noted_build(*arguments: Any) -> Any:
        engine = start_step(*arguments)
        update = engine.start_step

        def noted_update(*arguments: Any) -> Any:
            outcome = update(*arguments)
            steps.append(list(fake.transfers))
            return outcome

        engine.start_step = noted_update
        return engine

    monkeypatch.setattr(GradCache, "add", noted_add)
    monkeypatch.setattr(trainer, "build_engine", noted_build)
    return steps


OFFLOADED = EngineConfig(name="ddp", precision="fp32", grad_checkpointing=True, offload_activations=True)
VARIANTS: dict[str, dict[str, Any]] = {
    "dropout": {"model": DROPOUT, "max_steps": 3},
    "offloaded activations": {"engine": OFFLOADED, "max_steps": 3},
    "micro-batches, EMA, validation": {
        "micro_batch_size": 4,
        "ema_decay": 0.5,
        "validation": ValidationConfig(every_steps=3, batch_size=8),
    },
    "resnet and EMA": {
        "micro_batch_size": 8,
        "ema_decay": 0.5,
        "model": dataclasses.replace(tiny_model(), vision=RESNET_VISION),
        "max_steps": 3,
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_step_on_gpu_waits_only_for_step_before(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    """Loader, towers, GradCache, loss, engine, EMA and checkpoints run on one device, with the CPU's results."""
    config = tiny_run(tmp_path / "cpu", shards, **VARIANTS[variant])
    on_cpu = train(config)
    with fake_cuda() as fake:
        steps = transfers_of_steps(fake, monkeypatch)
        on_gpu = train(dataclasses.replace(config, run=str(tmp_path / "gpu")))
    assert comparable(on_gpu) == comparable(on_cpu)
    assert events(on_gpu) == events(on_cpu)
    assert saved_steps(on_gpu) == saved_steps(on_cpu)
    saved, expected = (load_latest(run / "checkpoints") for run in (on_gpu, on_cpu))
    assert are_equal(saved.model, expected.model)
    assert are_equal(saved.ema, expected.ema)
    assert saved.optimizer.num_steps == expected.optimizer.num_steps
    # Step 4 follows a checkpoint, which has read the results of step 3.
    expected_waits = [0, 1, 1, 0, 1, 1][: config.max_steps]
    waits = [[transfer for transfer in step if transfer.blocks] for step in steps]
    assert waits == [[LATE_READ] * number for number in expected_waits]
    # The images and both tensors of the captions, in each pass over each micro-batch.
    passes = 2 * 16 // config.micro_batch_size if config.micro_batch_size else 1
    copied = [[transfer for transfer in step if transfer.where == "train/transfers.py:to_device"] for step in steps]
    assert [len(transfers) for transfers in copied] == [3 * passes] * len(steps)
    offloads = [sum(transfer.kind == "async to host" for transfer in step) for step in steps]
    assert all(offloads) == (config.engine is OFFLOADED)


@pytest.fixture
def broken_at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function that takes factors of some losses, by the number of the call of ClipLoss, from 1."""
    real: Any = ClipLoss.forward

    def break_losses(factors: dict[int, float]) -> None:
        calls = [0]

        def forward(self: Any, *arguments: Any, **keywords: Any) -> Any:
            calls[0] += 1
            return real(self, *arguments, **keywords) * factors.get(calls[0], 1.0)

        monkeypatch.setattr(ClipLoss, "forward", forward)

    return break_losses


def test_skipped_steps_on_gpu_are_those_on_cpu(shards: Path, tmp_path: Path, broken_at_step: Any) -> None:
    """Spikes of the loss before and at a checkpoint, and at the last step. The EMA skips them too."""
    config = tiny_run(
        tmp_path / "run", shards, ema_decay=0.5, spikes=SpikeConfig(window=3, loss=50.0), max_steps=9,
        validation=ValidationConfig(every_steps=4),
    )  # fmt: skip

    def validate(model: Any, *_: Any) -> dict[str, float]:
        return {"scale": float(model.logit_scale.detach())}

    runs = []
    for device in ("cpu", "gpu"):
        broken_at_step({5: math.nan, 6: 1e4, 9: math.inf})
        with fake_cuda() if device == "gpu" else contextlib.nullcontext():
            runs.append(train(dataclasses.replace(config, run=str(tmp_path / device)), validate=validate))
    cpu, gpu = runs
    assert column(cpu, "skipped") == [0, 0, 0, 0, 1, 2, 2, 2, 3]
    assert str(comparable(gpu)) == str(comparable(cpu))
    assert events(gpu) == events(cpu)
    assert [event["step"] for event in events(gpu) if event["event"] == "skip"] == [5, 6, 9]
    saved, expected = (load_latest(run / "checkpoints") for run in (gpu, cpu))
    assert are_equal(saved.model, expected.model)
    assert are_equal(saved.ema, expected.ema)
    assert str(saved.rest) == str(expected.rest)


def test_run_that_gives_up_on_gpu_dumps_its_last_step(
    shards: Path, tmp_path: Path, broken_at_step: Any, gpu: FakeCuda
) -> None:
    """The step that may end the run is read at once, while its batches are there."""
    broken_at_step({3: math.nan, 5: math.nan})
    config = tiny_run(tmp_path / "run", shards, micro_batch_size=8, spikes=SpikeConfig(window=4, max_skipped=1))
    with pytest.raises(UserError, match=r"2 of the last 4 steps were skipped, the last one at step 5: the loss is nan"):
        train(config)
    assert column(tmp_path / "run", "step") == [1, 2, 3, 4, 5]
    assert (tmp_path / "run" / "dumps" / "step-00000005" / "batch-0000.safetensors").is_file()


def test_stopped_run_on_gpu_keeps_its_last_line(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers: Iterator[int] = iter(())
    take = trainer._Run._next_batch
    monkeypatch.setattr(trainer._Run, "_next_batch", lambda self: take(self) if next(numbers) < 5 else None)
    runs = [tmp_path / device for device in ("cpu", "gpu")]
    for run in runs:
        numbers = itertools.count(1)
        with fake_cuda() if run.name == "gpu" else contextlib.nullcontext(), pytest.raises(SystemExit) as stopped:
            train(tiny_run(run, shards))
        assert stopped.value.code == EXIT_STOPPED
    cpu, gpu = runs
    assert column(gpu, "step") == [1, 2, 3, 4]
    assert comparable(gpu) == comparable(cpu)
    assert events(gpu) == events(cpu)
    assert are_equal(weights(gpu), weights(cpu))


@pytest.mark.parametrize("answers", [True, False], ids=["device works", "device is stuck"])
def test_crashed_run_on_gpu_keeps_last_line_if_device_answers(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: FakeCuda, answers: bool
) -> None:
    def fail_at_fifth(self: Any, *arguments: Any) -> None:
        self._engine.calls = getattr(self._engine, "calls", 0) + 1
        if self._engine.calls == 5:
            raise RuntimeError("out of memory")
        add(self, *arguments)

    add = GradCache.add
    monkeypatch.setattr(GradCache, "add", fail_at_fifth)
    monkeypatch.setattr(step_results, "_GRACE_S", 0.0)
    if answers:
        # The device passes the event while the host polls.
        monkeypatch.setattr(AsyncRead, "is_complete", lambda self, timeout_s: True)
    with pytest.raises(RuntimeError, match="out of memory"):
        train(tiny_run(tmp_path / "run", shards))
    assert column(tmp_path / "run", "step") == ([1, 2, 3, 4] if answers else [1, 2, 3])
    assert events(tmp_path / "run")[-1]["event"] == "error"


def test_async_read_returns_exact_numbers_after_its_wait(gpu: FakeCuda) -> None:
    third = torch.full((), 1 / 3, dtype=torch.float32, device=CUDA)
    gpu.clear()
    read = AsyncRead([third, torch.ones((1,), device=CUDA), third.double()])
    assert [transfer.kind for transfer in gpu.transfers] == ["async to host"]
    assert read._values.isnan().all()
    assert not read.is_complete(0.0)
    assert read.numbers() == [float(torch.tensor(1 / 3)), 1.0, float(torch.tensor(1 / 3))]
    assert isinstance(third, DeviceTensor)
    assert read.is_complete(0.0)
