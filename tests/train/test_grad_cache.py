"""GradCache computes the step of the whole batch, with dropout, on any number of ranks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from grad_cache_steps import ENGINES, NUM_PAIRS, NUM_PARTS, OPTIM, SIZES, micro_batches, spill_buffer
from ranks import on_ranks
from synthetic import tiny_model, tiny_run, write_shards

from bclip_fast.errors import UserError
from bclip_fast.loss import ClipLoss
from bclip_fast.model.biomedclip import BiomedClip
from bclip_fast.train.engine import Engine, EngineConfig, build_engine
from bclip_fast.train.grad_cache import GradCache, SpillBuffer, embed
from bclip_fast.train.trainer import train


def make(
    config: EngineConfig,
    checkpointing: bool = False,
    locked: Sequence[str] = (),
    kind: str = "bert",
    dtype: torch.dtype = torch.float32,
) -> Engine:
    torch.manual_seed(0)
    sizes = tiny_model(dropout=0.1)
    model = BiomedClip(replace(sizes, text=replace(sizes.text, kind=kind))).train().to(dtype)
    model.visual.patch_dropout = 0.25
    for tower in locked:
        model.get_submodule(tower).lock()  # type: ignore[operator]
    model.set_grad_checkpointing(checkpointing)
    return build_engine(model, config, OPTIM, NUM_PAIRS)


def whole_batch(**options: Any) -> dict[str, Any]:
    """The step without GradCache: one graph over the concatenated embeddings of all micro-batches."""
    engine = make(ENGINES["ddp"], **options)
    parts = [embed(engine, *part) for part in micro_batches()]
    image, text = (torch.cat([part[i] for part in parts]) for i in (0, 1))
    loss = ClipLoss()(image, text, parts[0].logit_scale)
    engine.backward(loss)
    result = engine.step(OPTIM.lr)
    return {"loss": float(loss.detach()), "grad_norm": result.grad_norm, "weights": engine.model_state()}


def cached_step(rank: int, num_ranks: int, config: EngineConfig, checkpointing: bool, **options: Any) -> dict[str, Any]:
    """Results of a step, and numbers of gradient collectives of this step and of one with a single micro-batch."""
    engine = make(config, checkpointing, **options)
    share = NUM_PARTS // num_ranks
    parts = micro_batches()[rank * share : (rank + 1) * share]
    results: dict[str, Any] = {}
    for micro_batches_of_step, name in ((parts, "collectives"), (parts[:1], "collectives of one")):
        sizes = [len(batch.lengths) for batch, _ in micro_batches_of_step]
        cached = GradCache(engine, ClipLoss(rank=rank, world_size=num_ranks), sizes, spill_buffer())
        for part in micro_batches_of_step:
            cached.add(*part)
        loss = float(cached.loss())
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            cached.backward()
        result = engine.step(OPTIM.lr)
        # Use the raw events, because the profiler's summary of 10,000 events takes longer than the step.
        assert profile.profiler is not None
        events = profile.profiler.kineto_results.events()
        results[name] = sum(_is_reduction(event.name()) for event in events)
        results = {"loss": loss, "grad_norm": result.grad_norm, "weights": engine.model_state()} | results
    engine.close()
    return results


def _is_reduction(event: str) -> bool:
    return any(kind in event for kind in ("c10d::allreduce", "c10d::reduce", "c10d::_reduce"))


def steps(rank: int, num_ranks: int) -> dict[str, Any]:
    os.environ["LOCAL_RANK"] = str(rank)
    # Checkpointing concerns only the model, except under ZeRO 3, which gathers the weights again.
    results = {name: cached_step(rank, num_ranks, config, name in ("ddp", "zero3")) for name, config in ENGINES.items()}
    return {**results, "float64": cached_step(rank, num_ranks, ENGINES["ddp"], False, dtype=torch.float64)}


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return whole_batch()


@pytest.fixture(scope="module")
def expected_in_float64() -> dict[str, Any]:
    return whole_batch(dtype=torch.float64)


@pytest.mark.parametrize("num_ranks", [1, 2, pytest.param(4, marks=pytest.mark.long)])
def test_grad_cache_step_equals_whole_batch(
    num_ranks: int, expected: dict[str, Any], expected_in_float64: dict[str, Any]
):
    for name, results in on_ranks(num_ranks, steps, num_ranks)[0].items():
        truth, tolerance = (expected_in_float64, 1e-12) if name == "float64" else (expected, 1e-6)
        assert results["loss"] == pytest.approx(truth["loss"], rel=tolerance), name
        assert results["grad_norm"] == pytest.approx(truth["grad_norm"], rel=tolerance), name
        for key, tensor in truth["weights"].items():
            off = float((results["weights"][key] - tensor).abs().max())
            assert off <= tolerance, f"{name}: {key} is off by {off:.2g}"
        if num_ranks > 1:
            assert results["collectives"] == results["collectives of one"] > 0, name


def test_other_random_numbers_in_second_pass_change_gradient(expected: dict[str, Any]):
    """The comparison of the test above would notice dropout masks that differ between the two passes."""
    engine = make(ENGINES["ddp"])
    cached = GradCache(engine, ClipLoss(), SIZES, spill_buffer())
    for part in micro_batches():
        cached.add(*part)
    cached.loss()
    cached._batches = [(batch, seed + 1) for batch, seed in cached._batches]
    cached.backward()
    assert engine.step(OPTIM.lr).grad_norm != pytest.approx(expected["grad_norm"], rel=1e-3)


def test_single_micro_batch_is_embedded_once():
    engine = make(ENGINES["ddp"])
    part = micro_batches()[0]
    calls = []
    engine.module.register_forward_hook(lambda *_: calls.append(1))
    for num_parts, expected_calls in ((1, 1), (2, 4)):
        calls.clear()
        cached = GradCache(engine, ClipLoss(), [SIZES[0]] * num_parts, spill_buffer())
        for _ in range(num_parts):
            cached.add(*part)
        cached.loss()
        cached.backward()
        assert len(calls) == expected_calls


@pytest.mark.parametrize(
    ("name", "locked", "kind"),
    [
        ("ddp", ["visual"], "bert"),
        ("ddp", ["text"], "bert"),
        ("ddp", ["visual", "text"], "bert"),
        ("zero1", ["visual"], "bert"),
        ("zero3", ["visual"], "bert"),
        ("zero3", ["text"], "gpt"),
    ],
)
def test_locked_tower_is_embedded_once(name: str, locked: list[str], kind: str):
    """The tower is locked up to its projection. The step is the same, including the other tower's random numbers."""
    expected = whole_batch(locked=locked, kind=kind)
    engine = make(ENGINES[name], locked=locked, kind=kind)
    calls = dict.fromkeys(("visual", "text"), 0)
    for tower in calls:

        def count(*_: Any, tower: str = tower) -> None:
            calls[tower] += 1

        engine._model.get_submodule(f"{tower}.layers.0").register_forward_hook(count)
    cached = GradCache(engine, ClipLoss(), SIZES, spill_buffer())
    for part in micro_batches():
        cached.add(*part)
    assert float(cached.loss()) == pytest.approx(expected["loss"], rel=1e-6)
    cached.backward()
    assert engine.step(OPTIM.lr).grad_norm == pytest.approx(expected["grad_norm"], rel=1e-6)
    assert calls == {tower: (1 if tower in locked else 2) * NUM_PARTS for tower in calls}
    for key, tensor in engine.model_state().items():
        torch.testing.assert_close(tensor, expected["weights"][key], rtol=0, atol=1e-6)
    engine.close()


def peaks(rank: int, folder: str) -> list[float]:
    """Peak memory (MiB) after a step of 64 pairs in micro-batches of 16, and after a step of 1024 pairs."""
    root = Path(folder)
    model = replace(tiny_model(), vision=replace(tiny_model().vision, image_size=128, patch_size=32))
    peaks_mib: list[float] = []
    for size in (64, 1024):
        config = tiny_run(root / str(size), root / "shards", model=model, batch_size=size, micro_batch_size=16)
        train(
            replace(config, max_steps=1), on_step=lambda record: peaks_mib.append(record["peak_memory_bytes"] / 2**20)
        )
    return peaks_mib


def test_memory_does_not_grow_with_batch(tmp_path: Path):
    """Only the features of all pairs are in memory. All images would take 48 MiB, and the towers' activations more.

    The measured difference of 17 to 21 MiB is the loss's chunk of similarities, and the heaps of more threads.
    """
    write_shards(tmp_path / "shards", num_samples=1024, num_val=0)
    ((small, large),) = on_ranks(1, peaks, str(tmp_path))
    assert large < small + 32, f"{small:.0f} MiB at 64 pairs, {large:.0f} at 1024"


def test_spill_buffer_returns_equal_batches(tmp_path: Path):
    batches = [batch for batch, _ in micro_batches()]
    for limit in (0, 2 * batches[0].images.nbytes + (1 << 10), 1 << 30):
        place = SpillBuffer(limit, str(tmp_path))
        for turn in (batches, batches[::-1]):
            place.clear()
            kept = [place.add(batch) for batch in turn]
            for back, batch in zip(kept, turn, strict=True):
                loaded = back()
                assert torch.equal(loaded.images, batch.images)
                assert torch.equal(loaded.ids, batch.ids)
                assert replace(loaded, images=batch.images, ids=batch.ids) == batch
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"cannot write the images of a batch to /nowhere.*data.spool_dir"):
        SpillBuffer(0, "/nowhere").add(batches[0])
