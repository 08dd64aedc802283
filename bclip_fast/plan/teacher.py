"""The memory and the operations of a teacher. It is loaded, as the run would load it, and embeds a few pairs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from bclip_fast.model.biomedclip import BiomedClip
from bclip_fast.model.flops import forward_flops
from bclip_fast.train.losses import LossConfig
from bclip_fast.train.teacher import Teacher, load_teacher

from .activations import MemoryMeter

# More words than the context length of any text tower.
_LONG_CAPTION = "scan " * 2000


@dataclass(frozen=True)
class TeacherCost:
    """The costs of a teacher.

    weights: bytes of its weights.
    width: number of features.
    fixed, per_pair: bytes that embedding takes in addition, for captions of full length.
    flops: floating-point operations for a pair.
    is_cached: whether it embeds all samples before the first step, and none later.
    cache_bytes: size of the cached features of a sample, in bytes. 0 without a cache.
    """

    weights: float = 0.0
    width: int = 0
    fixed: float = 0.0
    per_pair: float = 0.0
    flops: float = 0.0
    is_cached: bool = False
    cache_bytes: float = 0.0

    def temporary(self, num_pairs: int) -> float:
        """Bytes that the teacher takes in addition to its weights while it embeds pairs."""
        return self.fixed + self.per_pair * num_pairs

    def features(self, rank_batch: int, batch_size: int, num_ranks: int) -> float:
        """Bytes of the features in a step: of the rank's micro-batches, of its batch, and of the texts of all ranks."""
        return 4.0 * self.width * (4 * rank_batch + (batch_size if num_ranks > 1 else 0))


def teacher_cost(config: LossConfig, precision: str, lengths: Sequence[int]) -> TeacherCost:
    """The costs of a run's teacher. All are 0 without a teacher.

    Args:
        lengths: numbers of tokens of captions, for the operations of our towers. Others count full captions.

    Raises:
        UserError: the teacher cannot be loaded.
    """
    if not config.teacher:
        return TeacherCost()
    return _measure(config.teacher, config.teacher_cache, precision, tuple(lengths))


@functools.lru_cache(1)
def _measure(name: str, cache: str, precision: str, lengths: tuple[int, ...]) -> TeacherCost:
    # The CPU has no fp16 autocast for all operators, and bf16 takes as much memory.
    teacher = load_teacher(name, torch.device("cpu"), "bf16" if precision == "fp16" else precision)
    one, two = (_peak(teacher, count) for count in (1, 2))
    if isinstance(teacher.model, BiomedClip):
        context_length = teacher.model.config.text.context_length
        shortened = [min(length, context_length) for length in lengths]
        flops = sum(forward_flops(teacher.model.config, shortened)) / len(shortened)
    else:
        with FlopCounterMode(display=False) as counter:
            _embed(teacher, 1)
        flops = float(counter.get_total_flops())
    return TeacherCost(
        weights=float(sum(tensor.nbytes for tensor in teacher.model.state_dict().values())),
        width=teacher.width,
        fixed=float(max(0, 2 * one - two)),
        per_pair=float(two - one),
        flops=flops,
        is_cached=cache != "off",
        cache_bytes={"off": 0.0, "fp32": 8.0, "fp16": 4.0}[cache] * teacher.width,
    )


def _peak(teacher: Teacher, num_pairs: int) -> int:
    with MemoryMeter(teacher.model) as meter:
        _embed(teacher, num_pairs)
    return meter.peak


def _embed(teacher: Teacher, num_pairs: int) -> None:
    size = teacher.pixels.size
    teacher.embed(torch.zeros((num_pairs, size, size, 3), dtype=torch.uint8), [_LONG_CAPTION] * num_pairs)
