"""The modelled bytes of each collective equal those of real steps on gloo ranks."""

from __future__ import annotations

import collections
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from coca_models import COCA
from collective_counts import CollectiveCounter
from grad_cache_steps import ENGINES, OPTIM, spill_buffer
from ranks import on_ranks
from synthetic import tiny_model

from bclip_fast.data.batch import Batch
from bclip_fast.model.biomedclip import BiomedClip
from bclip_fast.plan import traffic
from bclip_fast.train.bad_samples import BadSamples
from bclip_fast.train.config import DataConfig, TrainConfig
from bclip_fast.train.engine import build_engine
from bclip_fast.train.engine import deepspeed as deepspeed_engine
from bclip_fast.train.grad_cache import GradCache
from bclip_fast.train.losses import LossConfig, build_loss

PAIRS, TEACHER_WIDTH = 6, 16
# All parameters of the tiny model are below DeepSpeed's own limit of small parameters.
SMALL = 1000
BUCKET_NUMBERS = 8192
MODEL = tiny_model()
MODEL = replace(
    MODEL, init_logit_bias=-10.0, vision=replace(MODEL.vision, layers=1), text=replace(MODEL.text, layers=1)
)
CONFIG = TrainConfig(preset="", model=MODEL, optim=OPTIM)
# ZeRO 3's first steps record the order of the modules, and DDP's second step arranges its buckets.
WARM_UP = {"zero0": 0, "zero1": 0, "zero2": 0}


def config_of(engine: str, **changes: Any) -> TrainConfig:
    return replace(CONFIG, **{"engine": replace(ENGINES[engine], bucket_mib=1), **changes})


def cases(num_ranks: int) -> Iterator[tuple[str, tuple[int, ...], list[TrainConfig]]]:
    """(engine, numbers of micro-batches, configurations that differ in their losses)."""
    siglip, teacher = LossConfig(kind="siglip"), LossConfig(kind="distill", teacher="a teacher")
    for number, engine in enumerate(ENGINES):
        # On four ranks, one number of micro-batches is enough for each engine.
        counts = (1, 2) if num_ranks == 2 else (2 - number % 2,)
        yield engine, counts, [config_of(engine), config_of(engine, loss=siglip)]
    if num_ranks == 2:
        more = [
            {"data": DataConfig(positives="captions")},
            {"loss": LossConfig(label_smoothing=0.1)},
            {"loss": teacher},
        ]
        yield "other losses", (1, 2), [config_of("ddp", **changes) for changes in more]
        bf16 = replace(ENGINES["ddp"], precision="bf16", bucket_mib=1)
        losses = [LossConfig(), siglip, teacher]
        yield "bf16", (1, 2), [replace(CONFIG, engine=bf16, loss=loss) for loss in losses]
        yield "coca", (1, 2), [config_of("ddp", model=COCA, loss=LossConfig(kind="coca"))]


def micro_batch(config: TrainConfig, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    side = config.model.vision.image_size
    images = torch.randint(0, 256, (PAIRS, side, side, 3), dtype=torch.uint8, generator=generator)
    lengths = [5] * PAIRS
    ids = torch.randint(5, 90, (sum(lengths),), generator=generator)
    teacher = torch.nn.functional.normalize(torch.randn(PAIRS, 2, TEACHER_WIDTH, generator=generator), dim=-1)
    return Batch(
        images,
        ids,
        lengths,
        [""] * PAIRS,
        0,
        groups=torch.arange(PAIRS) // 2 if config.data.positives != "pair" else None,
        teacher=teacher if config.loss.teacher else None,
    )


def run_step(
    config: TrainConfig, engine: Any, num_micro_batches: int, bad: BadSamples, counter: CollectiveCounter
) -> None:
    loss = build_loss(config.loss, 20.0, config.model.text.pad_id)
    # The ranks agree once on their backends.
    loss._backends_shared = True
    cache = GradCache(engine, loss, [PAIRS] * num_micro_batches, spill_buffer())
    counter.phase = "embedding"
    for number in range(num_micro_batches):
        assert not bad.agree(1, [], None)
        cache.add(micro_batch(config, number), number)
    counter.phase = "loss"
    cache.loss()
    counter.phase = "backward"
    cache.backward()
    counter.phase = "update"
    engine.start_step(OPTIM.lr)


def count_step(*arguments: Any) -> dict[str, int]:
    with CollectiveCounter() as counter:
        run_step(*arguments, counter)
    return dict(counter.num_bytes)


def with_zero3_limits(**limits: int) -> Any:
    original = deepspeed_engine.deepspeed_config

    def changed(*arguments: Any) -> dict[str, Any]:
        config = original(*arguments)
        config["zero_optimization"] |= {f"stage3_{name}": limit for name, limit in limits.items()}
        return config

    return mock.patch.object(deepspeed_engine, "deepspeed_config", changed)


def count_on_ranks(rank: int, num_ranks: int, folder: str) -> dict[str, list[dict[str, int]]]:
    os.environ["LOCAL_RANK"] = str(rank)
    results, bad = {}, BadSamples(Path(folder), 0, 0)
    if num_ranks == 2:
        limits = {"prefetch_bucket_size": BUCKET_NUMBERS, "max_live_parameters": BUCKET_NUMBERS}
        with with_zero3_limits(param_persistence_threshold=SMALL, **limits):
            engine = build_engine(BiomedClip(MODEL).train(), config_of("zero3").engine, OPTIM, 24)
            for _ in range(2):
                run_step(CONFIG, engine, 2, bad, CollectiveCounter())
            results["small bucket"] = [count_step(CONFIG, engine, 2, bad)]
            engine.close()
    with with_zero3_limits(param_persistence_threshold=SMALL):
        for name, counts, configs in cases(num_ranks):
            torch.manual_seed(0)
            engine = build_engine(BiomedClip(configs[0].model).train(), configs[0].engine, OPTIM, 24)
            for count in counts:
                for _ in range(WARM_UP.get(name, 2)):
                    run_step(configs[0], engine, count, bad, CollectiveCounter())
                results[f"{name} {count}"] = [count_step(config, engine, count, bad) for config in configs]
            engine.close()
    return results


def modelled(config: TrainConfig, num_ranks: int, count: int) -> dict[str, int]:
    parameters = traffic.Parameters.of(BiomedClip(config.model), config)
    sizes = {"num_ranks": num_ranks, "batch_size": num_ranks * count * PAIRS, "num_micro_batches": count}
    total: collections.Counter[str] = collections.Counter()
    for part in traffic.step_traffic(config, parameters, **sizes, teacher_width=TEACHER_WIDTH):
        # GradCache's backward pass contains that of the loss.
        total[f"{part.phase.removeprefix('loss ')} {part.operation}"] += round(part.num_bytes)
    return dict(total)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_modelled_bytes_of_each_collective_equal_those_of_real_steps(num_ranks: int, tmp_path: Path):
    counted = on_ranks(num_ranks, count_on_ranks, num_ranks, str(tmp_path))
    with mock.patch.object(traffic, "PERSISTENT_NUMBERS", SMALL):
        expected = {
            f"{name} {count}": [modelled(config, num_ranks, count) for config in configs]
            for name, counts, configs in cases(num_ranks)
            for count in counts
        }
    for name, results in expected.items():
        for rank in range(num_ranks):
            assert counted[rank][name] == results, f"{name}, rank {rank}"
    if num_ranks == 2:
        check_small_bucket(counted[0]["small bucket"][0])


def check_small_bucket(counted: dict[str, int]) -> None:
    """A bucket that cannot hold the model keeps some weights for the backward pass, at most those of its size."""
    parameters = traffic.Parameters.of(BiomedClip(MODEL), CONFIG)
    with mock.patch.object(traffic, "PERSISTENT_NUMBERS", SMALL):
        parts = list(traffic._zero3_traffic(parameters, 2, 2, 4 * BUCKET_NUMBERS))
    modelled = sum(part.num_bytes for part in parts if part.name == "weights")
    gathered = counted["embedding all-gather"] + counted["backward all-gather"]
    assert modelled - 2 * 4 * BUCKET_NUMBERS <= gathered <= modelled
