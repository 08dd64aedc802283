"""A step over cached embeddings is the step of the whole batch, dropout and all, whoever computes it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from synthetic import tiny_model, tiny_run, write_shards

from bclip_fast.data.loader import Batch
from bclip_fast.errors import UserError
from bclip_fast.loss import ClipLoss
from bclip_fast.model.biomedclip import BiomedClip
from bclip_fast.train.engine import Engine, EngineConfig, build_engine
from bclip_fast.train.grad_cache import GradCache, SpillBuffer, embed
from bclip_fast.train.schedule import OptimConfig
from bclip_fast.train.trainer import train

NUM_PARTS, ROWS = 8, 4
ENGINES = {"ddp": EngineConfig(name="ddp", precision="fp32")} | {
    f"zero{stage}": EngineConfig(zero_stage=stage, precision="fp32") for stage in (0, 1, 2, 3)
}
# A first step of AdamW is the sign of the gradient wherever eps is small, rounding noise included: at the published
# eps of 1e-6 one element in 6,000 moved by 2e-6 instead.
OPTIM = OptimConfig(lr=1e-3, warmup_steps=0, grad_clip_norm=1.0, eps=1e-3)


def micro_batches() -> list[tuple[Batch, int]]:
    """Each with the seed of its random numbers."""
    generator = torch.Generator().manual_seed(0)
    parts = []
    for number in range(NUM_PARTS):
        images = torch.randint(0, 256, (ROWS, 32, 32, 3), dtype=torch.uint8, generator=generator)
        lengths = torch.randint(1, 12, (ROWS,), generator=generator).tolist()
        ids = torch.randint(5, 90, (sum(lengths),), generator=generator)
        parts.append((Batch(images, ids, lengths, [""] * ROWS, 0), 100 + number))
    return parts


def spool() -> SpillBuffer:
    """Of which a part of the images goes to a file."""
    return SpillBuffer(3 * ROWS * 32 * 32 * 3)


def make(config: EngineConfig, checkpointing: bool = False, locked: Sequence[str] = (), kind: str = "bert") -> Engine:
    torch.manual_seed(0)
    sizes = tiny_model(dropout=0.1)
    model = BiomedClip(replace(sizes, text=replace(sizes.text, kind=kind))).train()
    model.visual.patch_dropout = 0.25
    for tower in locked:
        model.get_submodule(tower).lock()  # type: ignore[operator]
    model.set_grad_checkpointing(checkpointing)
    return build_engine(model, config, OPTIM, NUM_PARTS * ROWS)


def whole_batch(**options: Any) -> dict[str, Any]:
    """The step with all activations kept: what the towers give for each part, concatenated, in one graph."""
    engine = make(ENGINES["ddp"], **options)
    parts = [embed(engine, *part) for part in micro_batches()]
    image, text = (torch.cat([part[i] for part in parts]) for i in (0, 1))
    loss = ClipLoss()(image, text, parts[0].logit_scale)
    engine.backward(loss)
    result = engine.step(OPTIM.lr)
    return {"loss": float(loss.detach()), "grad_norm": result.grad_norm, "weights": engine.model_state()}


def cached_step(rank: int, num_ranks: int, config: EngineConfig, checkpointing: bool) -> dict[str, Any]:
    """Of the first step all results, of it and of a second with a single micro-batch how often gradients travelled."""
    engine = make(config, checkpointing)
    share = NUM_PARTS // num_ranks
    parts = micro_batches()[rank * share : (rank + 1) * share]
    found: dict[str, Any] = {}
    for own, name in ((parts, "collectives"), (parts[:1], "collectives of one")):
        cached = GradCache(engine, ClipLoss(rank=rank, world_size=num_ranks), len(own), spool())
        for part in own:
            cached.add(*part)
        loss = float(cached.loss())
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            cached.backward()
        result = engine.step(OPTIM.lr)
        # The raw events: summing up 10,000 of them in Python would take longer than the step.
        assert profile.profiler is not None
        events = profile.profiler.kineto_results.events()
        found[name] = sum(_is_reduction(event.name()) for event in events)
        found = {"loss": loss, "grad_norm": result.grad_norm, "weights": engine.model_state()} | found
    engine.close()
    return found


def _is_reduction(event: str) -> bool:
    return any(kind in event for kind in ("c10d::allreduce", "c10d::reduce", "c10d::_reduce"))


def steps(rank: int, num_ranks: int) -> dict[str, Any]:
    os.environ["LOCAL_RANK"] = str(rank)
    # Recomputing layers is the model's matter but under ZeRO 3, which gathers them again.
    return {name: cached_step(rank, num_ranks, config, name in ("ddp", "zero3")) for name, config in ENGINES.items()}


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return whole_batch()


@pytest.mark.parametrize("num_ranks", [1, 2, pytest.param(4, marks=pytest.mark.long)])
def test_the_step_of_the_whole_batch(num_ranks: int, expected: dict[str, Any]):
    for name, found in on_ranks(num_ranks, steps, num_ranks)[0].items():
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6), name
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-6), name
        for key, tensor in expected["weights"].items():
            off = float((found["weights"][key] - tensor).abs().max())
            assert off <= 1e-6, f"{name}: {key} is off by {off:.2g}"
        if num_ranks > 1:
            assert found["collectives"] == found["collectives of one"] > 0, name


def test_a_step_without_the_replay_of_random_numbers_is_another(expected: dict[str, Any]):
    """What the test above compares would tell masks that differ between the two passes."""
    engine = make(ENGINES["ddp"])
    cached = GradCache(engine, ClipLoss(), NUM_PARTS, spool())
    for part in micro_batches():
        cached.add(*part)
    cached.loss()
    cached._batches = [(batch, seed + 1) for batch, seed in cached._batches]
    cached.backward()
    assert engine.step(OPTIM.lr).grad_norm != pytest.approx(expected["grad_norm"], rel=1e-3)


def test_one_micro_batch_is_embedded_once():
    engine = make(ENGINES["ddp"])
    part = micro_batches()[0]
    calls = []
    engine.module.register_forward_hook(lambda *_: calls.append(1))
    for num_parts, expected_calls in ((1, 1), (2, 4)):
        calls.clear()
        cached = GradCache(engine, ClipLoss(), num_parts, spool())
        for _ in range(num_parts):
            cached.add(*part)
        cached.loss()
        cached.backward()
        assert len(calls) == expected_calls


@pytest.mark.parametrize(
    "name, locked, kind",
    [
        ("ddp", ["visual"], "bert"),
        ("ddp", ["text"], "bert"),
        ("ddp", ["visual", "text"], "bert"),
        ("zero1", ["visual"], "bert"),
        ("zero3", ["visual"], "bert"),
        ("zero3", ["text"], "gpt"),
    ],
)
def test_a_locked_tower_is_embedded_once(name: str, locked: list[str], kind: str):
    """Up to its projection, which is trained: the same step, the random numbers of the other tower included."""
    expected = whole_batch(locked=locked, kind=kind)
    engine = make(ENGINES[name], locked=locked, kind=kind)
    calls = dict.fromkeys(("visual", "text"), 0)
    for tower in calls:

        def count(*_: Any, tower: str = tower) -> None:
            calls[tower] += 1

        engine._model.get_submodule(f"{tower}.layers.0").register_forward_hook(count)
    cached = GradCache(engine, ClipLoss(), NUM_PARTS, spool())
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
    """MiB, at most so far, after a step of 64 pairs in micro-batches of 16, and then after one of 1024."""
    root = Path(folder)
    model = replace(tiny_model(), vision=replace(tiny_model().vision, image_size=128, patch_size=32))
    found: list[float] = []
    for size in (64, 1024):
        config = tiny_run(root / str(size), root / "shards", model=model, batch_size=size, micro_batch_size=16)
        train(replace(config, max_steps=1), on_step=lambda record: found.append(record["peak_memory_bytes"] / 2**20))
    return found


def test_memory_does_not_grow_with_the_batch(tmp_path: Path):
    """Nothing is kept of all pairs but features: their images would be 48 MiB, what the towers keep for a backward pass
    more. Measured: 17 to 21 MiB, the loss's chunk of similarities and the heaps of a second run's threads."""
    write_shards(tmp_path / "shards", num_samples=1024, num_val=0)
    ((small, large),) = on_ranks(1, peaks, str(tmp_path))
    assert large < small + 32, f"{small:.0f} MiB at 64 pairs, {large:.0f} at 1024"


def test_a_spool_gives_back_what_it_kept(tmp_path: Path):
    batches = [batch for batch, _ in micro_batches()]
    for limit in (0, 2 * batches[0].images.nbytes + (1 << 10), 1 << 30):
        place = SpillBuffer(limit, str(tmp_path))
        for turn in (batches, batches[::-1]):
            place.clear()
            kept = [place.add(batch) for batch in turn]
            for back, batch in zip(kept, turn, strict=True):
                again = back()
                assert torch.equal(again.images, batch.images) and torch.equal(again.ids, batch.ids)
                assert replace(again, images=batch.images, ids=batch.ids) == batch
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="no room for the images of a batch in /nowhere.*data.spool_dir"):
        SpillBuffer(0, "/nowhere").add(batches[0])
