"""The plan of a run: memory, operations and time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bclip_fast.hardware import Cluster

from .samples import Samples
from .teacher import TeacherCost

Bytes = Mapping[str, float]
"""Numbers of bytes by part."""


@dataclass(frozen=True)
class Stage:
    """Consecutive epochs with one batch size.

    batch_size: global batch size.
    rank_batch: pairs per rank and step.
    micro_batch: pairs per micro-batch. Under micro_batch_tokens, the mean, rounded up.
    flops: floating-point operations of a step over all ranks, by part.
    seconds: duration of a step, by part. None if no rate is known.
    """

    first_epoch: int
    epochs: int
    batch_size: int
    rank_batch: int
    micro_batch: int
    num_steps: int
    flops: Mapping[str, float]
    seconds: Mapping[str, float] | None

    @property
    def hours(self) -> float | None:
        """Duration of the stage. None if no rate is known."""
        return None if self.seconds is None else self.num_steps * sum(self.seconds.values()) / 3600


@dataclass(frozen=True)
class Plan:
    """The plan of a run.

    parameters: number of parameters, by tower, and of the trainable ones.
    memory: bytes of one rank on its device, by phase of a step and by part.
    host: bytes of one rank on its host, by phase and part. Empty if the device is the host's CPU.
    rates: source of the rates for the time.
    teacher: costs of the teacher, 0 without one.
    """

    parameters: Mapping[str, int]
    samples: Samples
    cluster: Cluster
    stages: Sequence[Stage]
    memory: Mapping[str, Bytes]
    host: Mapping[str, Bytes]
    rates: str
    teacher: TeacherCost

    @property
    def peak(self) -> float:
        """Bytes of the phase that needs most memory on the device."""
        return max(sum(parts.values()) for parts in self.memory.values())

    @property
    def host_peak(self) -> float:
        """Bytes of the phase that needs most memory on the host."""
        return max((sum(parts.values()) for parts in self.host.values()), default=0.0)

    @property
    def hours(self) -> float | None:
        """Duration of the run. None if no rate is known."""
        hours = [stage.hours for stage in self.stages]
        return None if None in hours else sum(hour for hour in hours if hour is not None)


def largest_stage(stages: Sequence[Stage]) -> Stage:
    """The stage with the largest batch per rank."""
    return max(stages, key=lambda stage: stage.rank_batch)
