"""Micro-batches and engines for tests of GradCache."""

from __future__ import annotations

import torch

from bclip_fast.data.batch import Batch
from bclip_fast.train.engine import EngineConfig
from bclip_fast.train.grad_cache import SpillBuffer
from bclip_fast.train.schedule import OptimConfig

# Number of pairs in each micro-batch, as a token budget divides a batch. Two ranks have different numbers, too. With 2
# pairs, a batch norm of one pixel divides by a difference of two numbers, which may be close to 0.
SIZES = (4, 3, 5, 3, 3, 6, 3, 5)
NUM_PARTS, NUM_PAIRS = len(SIZES), sum(SIZES)
ENGINES = {"ddp": EngineConfig(name="ddp", precision="fp32")} | {
    f"zero{stage}": EngineConfig(zero_stage=stage, precision="fp32") for stage in (0, 1, 2, 3)
}
# AdamW's first step is nearly the sign of the gradient, so a small eps would amplify rounding errors. With the
# published eps of 1e-6, one element in 6,000 differed by 2e-6.
OPTIM = OptimConfig(lr=1e-3, warmup_steps=0, grad_clip_norm=1.0, eps=1e-3)


def micro_batches() -> list[tuple[Batch, int]]:
    """The micro-batches of all ranks, each with the seed of its random numbers."""
    generator = torch.Generator().manual_seed(0)
    parts = []
    for number, size in enumerate(SIZES):
        images = torch.randint(0, 256, (size, 32, 32, 3), dtype=torch.uint8, generator=generator)
        lengths = torch.randint(1, 12, (size,), generator=generator).tolist()
        ids = torch.randint(5, 90, (sum(lengths),), generator=generator)
        parts.append((Batch(images, ids, lengths, [""] * size, 0), 100 + number))
    return parts


def spill_buffer() -> SpillBuffer:
    """A buffer that keeps the first three micro-batches in memory and the others in a file."""
    return SpillBuffer(sum(SIZES[:3]) * (32 * 32 * 3 + 96))
