"""The collectives of a training step and their bytes, as `loss/` and the engines issue them.

A test compares all of them with those of real steps on 2 and 4 ranks (tests/plan/test_traffic.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from bclip_fast.train.config import TrainConfig
from bclip_fast.train.engine import EngineConfig
from bclip_fast.train.schedule import parameter_groups

Operation = Literal["all-gather", "reduce-scatter", "all-reduce"]
Phase = Literal["embedding", "loss", "loss backward", "backward", "update"]

# Largest parameters that ZeRO 3 keeps gathered, in numbers (param_persistence_threshold of deepspeed.runtime.zero).
PERSISTENT_NUMBERS = 100_000
# DeepSpeed's stage 0 reduces a flat copy of so many gradients at a time (deepspeed.runtime.engine).
_ZERO0_NUMBERS = 500_000_000
# DDP's first bucket is smaller, so that the communication starts early (torch.distributed._DEFAULT_FIRST_BUCKET_BYTES).
_DDP_FIRST_BYTES = 1 << 20


@dataclass(frozen=True)
class Collective:
    """Collectives of a step that send the same thing.

    phase: part of the step. With one micro-batch, "embedding" is its forward pass. With more, the second forward passes
        of all micro-batches belong to "backward".
    num_bytes: size of the gathered tensor, of the tensor before it is scattered, or of the summed tensor. The sum over
        all calls.
    count: number of calls.
    on_host: whether the hosts send the tensor, beside the GPUs' work.
    """

    name: str
    operation: Operation
    phase: Phase
    num_bytes: float
    count: float = 1
    on_host: bool = False

    def sent(self, num_ranks: int) -> float:
        """Bytes that each rank sends in a ring.

        The factors are those of NVIDIA/nccl-tests, doc/PERFORMANCE.md, "Bus bandwidth".
        """
        return self.num_bytes * (num_ranks - 1) / num_ranks * (2 if self.operation == "all-reduce" else 1)


@dataclass(frozen=True)
class Parameters:
    """Sizes of a model's parameters, in numbers.

    all: the size of each parameter.
    trainable: the size of each trainable parameter.
    groups: the size of each of the optimiser's groups.
    """

    all: Sequence[int]
    trainable: Sequence[int]
    groups: Sequence[int]

    @classmethod
    def of(cls, model: nn.Module, config: TrainConfig) -> Parameters:
        """The parameters of a model, which may be on the device "meta"."""
        scales, vectors = getattr(model, "lr_scales", None), getattr(model, "vectors", ())
        groups = parameter_groups(model.named_parameters(), config.optim, scales, vectors)
        return cls(
            [p.numel() for p in model.parameters()],
            [p.numel() for p in model.parameters() if p.requires_grad],
            [sum(p.numel() for p in group["params"]) for group in groups],
        )


def step_traffic(
    config: TrainConfig,
    parameters: Parameters,
    *,
    num_ranks: int,
    batch_size: int,
    num_micro_batches: int,
    teacher_width: int = 0,
) -> list[Collective]:
    """All collectives of a step, after the first steps. Empty for one rank.

    Args:
        config: configuration with a resolved precision.
        batch_size: global batch size.
        num_micro_batches: number of micro-batches of a rank.
        teacher_width: number of features of the loss's teacher.
    """
    if num_ranks == 1:
        return []
    loss = _loss_traffic(config, num_ranks, batch_size, num_micro_batches, teacher_width)
    engine = _engine_traffic(config.engine, parameters, num_ranks, num_micro_batches)
    agreement = Collective(
        "agreement on the batch", "all-reduce", "embedding", 8.0 * num_micro_batches, num_micro_batches, True
    )
    return [agreement, *loss, *engine]


def _loss_traffic(
    config: TrainConfig, num_ranks: int, batch_size: int, num_micro_batches: int, teacher_width: int
) -> Iterator[Collective]:
    kind, width = config.loss.kind, config.model.embed_dim
    half = 4 if config.engine.precision == "fp32" else 2
    # GradCache keeps the features in float32, but the operands of the products have the dtype of the towers' output.
    feature = half if num_micro_batches == 1 else 4
    with_groups = config.data.positives != "pair"
    if with_groups:
        yield Collective("numbers of groups", "all-reduce", "loss", 8.0 * num_ranks, 1, True)
        yield Collective("groups, for the metric", "all-gather", "loss", 8.0 * batch_size)
    yield Collective("batch sizes", "all-gather", "loss", 8.0 * 5 * num_ranks, 1, True)
    text_bytes = feature if kind == "distill" else half
    yield Collective("text features", "all-gather", "loss", float(batch_size * width * text_bytes))
    if with_groups:
        yield Collective("groups of images and texts", "all-gather", "loss", 2 * 8.0 * batch_size, 2)
    if kind == "distill":
        yield Collective("teacher's text features", "all-gather", "loss", 4.0 * batch_size * teacher_width)
        # Maxima and sums of the student's and of the teacher's columns, and the means of the columns.
        yield Collective("column sums", "all-reduce", "loss", 5 * 4.0 * batch_size, 5)
        yield Collective("losses", "all-reduce", "loss", 2 * 4.0)
        yield Collective("positive logits", "all-gather", "loss", 4.0 * batch_size)
    elif kind == "siglip":
        yield Collective("loss", "all-reduce", "loss", 4.0)
    else:
        # Log-sum-exps are float64: their maxima, then their sums.
        yield Collective("column sums", "all-reduce", "loss", 2 * 8.0 * batch_size, 2)
        if not with_groups:
            yield Collective("column log-sum-exps", "all-gather", "loss", 8.0 * batch_size)
        yield Collective("loss", "all-reduce", "loss", 8.0)
    if config.loss.label_smoothing:
        sums = 2 * width + 3 if kind == "siglip" else 3 * width + 3
        yield Collective("sums of features", "all-reduce", "loss", 4.0 * sums)
    if kind == "coca":
        yield Collective("number of predicted tokens", "all-reduce", "loss", 8.0, 1, True)
        yield Collective("captions' loss", "all-reduce", "backward", 4.0)
    text_grad = 4 if kind == "siglip" and config.engine.precision == "fp16" else feature
    # The projection of a locked tower trains, so its gradients travel, too. The sigmoid loss computes them in its
    # forward pass.
    phase: Phase = "loss" if kind == "siglip" else "loss backward"
    yield Collective("text gradients", "reduce-scatter", phase, float(batch_size * width * text_grad))


def _engine_traffic(
    engine: EngineConfig, parameters: Parameters, num_ranks: int, num_micro_batches: int
) -> Iterator[Collective]:
    gradients, bucket = 4.0 * sum(parameters.trainable), engine.bucket_mib << 20
    if engine.name == "ddp":
        count = 1 + math.ceil(max(0.0, gradients - _DDP_FIRST_BYTES) / bucket)
        yield Collective("gradients", "all-reduce", "backward", gradients, count)
        return
    if engine.zero_stage == 0:
        count = math.ceil(gradients / (4 * _ZERO0_NUMBERS))
        yield Collective("gradients", "all-reduce", "backward", gradients, count)
        return
    if engine.zero_stage < 3:
        # By default DeepSpeed sums whole buckets on all ranks, and each rank keeps its shard (allreduce_and_scatter in
        # deepspeed.runtime.zero.stage_1_and_2). So shards don't save communication.
        yield Collective("gradients", "all-reduce", "backward", gradients, math.ceil(gradients / bucket))
        # The start of each shard is aligned to 2 numbers.
        weights = sum(4.0 * padded(size, 2 * num_ranks) for size in parameters.groups)
        yield Collective("updated weights", "all-gather", "update", weights, len(parameters.groups))
    else:
        yield from _zero3_traffic(parameters, num_ranks, num_micro_batches, bucket)
    # Each group's norm. ZeRO 3 sums it in float64.
    yield Collective(
        "norms of the gradients",
        "all-reduce",
        "update",
        (8.0 if engine.zero_stage == 3 else 4.0) * len(parameters.groups),
        len(parameters.groups),
    )


def _zero3_traffic(parameters: Parameters, num_ranks: int, num_micro_batches: int, bucket: int) -> Iterator[Collective]:
    large = sum(4.0 * padded(size, num_ranks) for size in parameters.all if size > PERSISTENT_NUMBERS)
    small = [4.0 * padded(size, num_ranks) for size in parameters.all if size <= PERSISTENT_NUMBERS]
    # Weights that the prefetch bucket holds at the end of a forward pass stay for the backward pass. If it can't hold
    # all, this ignores them: an upper bound, by at most a bucket for each backward pass.
    num_again = num_micro_batches * ((num_micro_batches > 1) + (large > bucket))
    calls = math.ceil(large / bucket)
    passes: tuple[tuple[Phase, int], ...] = (("embedding", num_micro_batches), ("backward", num_again))
    for phase, num_passes in passes:
        if large and num_passes:
            yield Collective("weights", "all-gather", phase, num_passes * large, num_passes * calls)
    gradients = sum(4.0 * padded(size, num_ranks) for size in parameters.trainable)
    yield Collective("gradients", "reduce-scatter", "backward", gradients, math.ceil(gradients / bucket))
    if small:
        # One call for each small parameter.
        yield Collective("small weights", "all-gather", "update", sum(small), len(small))


def padded(size: int, multiple: int) -> int:
    """The smallest multiple that is at least `size`."""
    return -(-size // multiple) * multiple
