"""CPU time of a step with micro-batches of equally many pairs, and of a token budget, at equal peak memory.

    python -m benchmarks.micro_batches CAPTIONS.jsonl.gz --vocabulary FOLDER

Both divide the same global batches. The budget is the number of tokens in the largest micro-batch of equally many
pairs, so both need the same memory. They alternate in one process.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bclip_fast.data.batch import Batch
from bclip_fast.data.sampler import ShardSampler
from bclip_fast.loss import ClipLoss
from bclip_fast.model.biomedclip import BiomedClip, BiomedClipConfig
from bclip_fast.model.presets import preset
from bclip_fast.model.tokenizer import Tokenizer
from bclip_fast.train.engine import Engine, EngineConfig, build_engine
from bclip_fast.train.grad_cache import GradCache
from bclip_fast.train.schedule import OptimConfig
from bclip_fast.train.spill import SpillBuffer


def small_model(patch_size: int) -> BiomedClipConfig:
    """The published model with a quarter of its width and four layers a tower."""
    model = preset("biomedclip_b16")
    vision = replace(model.vision, patch_size=patch_size, width=192, heads=3, layers=4)
    return replace(model, vision=vision, text=replace(model.text, width=192, heads=3, layers=4))


def parts_of(sampler: ShardSampler, number: int, image_tokens: int, lengths: list[int]) -> list[list[int]]:
    """The caption lengths of each micro-batch of a global batch."""
    return [
        [lengths[sampler.sample(epoch, position)] for position in positions]
        for epoch, positions in (sampler.batch(number, part) for part in range(sampler.num_micro_batches(number)))
    ]


def seconds_of_step(engine: Engine, parts: list[list[int]], image_size: int) -> float:
    """Train one step of random pixels and tokens. Return its CPU time, because other processes may share the cores."""
    batches = [
        Batch(
            torch.randint(0, 256, (len(part), image_size, image_size, 3), dtype=torch.uint8),
            torch.randint(5, 20000, (sum(part),)),
            part,
            [""] * len(part),
            0,
        )
        for part in parts
    ]
    start = time.process_time()
    cache = GradCache(engine, ClipLoss(), [len(part) for part in parts], SpillBuffer(1 << 30))
    for seed, batch in enumerate(batches):
        cache.add(batch, seed)
    cache.loss()
    cache.backward()
    engine.step(1e-5)
    return time.process_time() - start


def main() -> None:
    """Print a line for each size of patches and micro-batches."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("captions", type=Path)
    parser.add_argument("--vocabulary", required=True)
    parser.add_argument("--batch", type=int, default=120)
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    tokenizer = Tokenizer.from_file(options.vocabulary, 256)
    with gzip.open(options.captions, "rt", encoding="utf-8") as lines:
        captions = [json.loads(line)["caption"] for line in lines]
    captions = random.Random(0).sample(captions, 2000)
    lengths = [len(ids) for ids in tokenizer.encode(captions)]
    print(f"{len(lengths)} captions, mean {statistics.fmean(lengths):.0f} tokens, at most {max(lengths)}")
    for patch_size in (32, 16):
        model = small_model(patch_size)
        engine = build_engine(
            BiomedClip(model).train(),
            EngineConfig(name="ddp", precision="fp32"),
            OptimConfig(),
            options.batch,
        )
        for size in (8, 24):
            compare(engine, model, size, lengths, options.batch, options.steps)


def compare(engine: Engine, model: BiomedClipConfig, size: int, lengths: list[int], batch: int, steps: int) -> None:
    """Print the times for micro-batches of `size` pairs: in slices, balanced by cost, and of at most as many tokens."""
    image_tokens = model.vision.num_tokens
    settings: dict[str, Any] = {"batch_size": batch, "shuffle_block": 64}

    def tokens(parts: list[list[int]]) -> int:
        return max(sum(part) + image_tokens * len(part) for part in parts)

    balanced = ShardSampler([len(lengths)], "", **settings, micro_batch_size=size, cost=lambda _, i: lengths[i])
    sliced = ShardSampler([len(lengths)], "", **settings, micro_batch_size=size)
    numbers = range(balanced.num_batches_of(1))
    budget = max(tokens(parts_of(balanced, number, image_tokens, lengths)) for number in numbers)
    largest_slice = max(tokens(parts_of(sliced, number, image_tokens, lengths)) for number in numbers)
    budgeted = ShardSampler([len(lengths)], "", **settings, token_budget=budget)
    budgeted.count_tokens(image_tokens, lambda _, i: lengths[i])
    counts = [budgeted.num_micro_batches(number) for number in numbers]
    times: dict[str, list[float]] = {"pairs": [], "tokens": []}
    for number in range(steps + 1):
        for name, sampler in (("pairs", balanced), ("tokens", budgeted)):
            parts = parts_of(sampler, number, image_tokens, lengths)
            seconds = seconds_of_step(engine, parts, model.vision.image_size)
            if number:
                times[name].append(seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(
        f"patches of {model.vision.patch_size}: {size} pairs in {batch // size} micro-batches, at most {budget} tokens "
        f"(slices: {largest_slice}); within this budget {min(counts)} to {max(counts)} micro-batches; "
        f"{medians['pairs']:.2f} s and {medians['tokens']:.2f} s, ratio {medians['pairs'] / medians['tokens']:.2f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
