"""The duration of a step over ranks: computation, and the communication that it does not hide.

The code decides which computation hides a transfer:

- The texts travel while a rank compares its images with its own texts, 1 / ranks of the loss's forward pass. The
  gathering starts after both towers, so no tower hides it. The texts' gradients travel during the same part of the
  backward pass. The sigmoid loss has no such part for the gradients, and distillation hides neither.
- DDP sums a bucket of gradients while the backward pass of the last micro-batch computes the others.
- DeepSpeed's stages 0 to 2 sum them after the backward pass, or on its stream, and gather the weights after the update.
- ZeRO 3 gathers weights during each pass, and scatters gradients during the backward pass. With micro-batches it
  scatters them at the end.

Collectives that run beside kernels slow them. The estimate ignores this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bclip_fast.hardware import Cluster
from bclip_fast.train.config import TrainConfig

from .network import seconds
from .traffic import Collective, Parameters

# Bytes that AdamW reads and writes for a weight: weight, gradient and two moments, and all but the gradient again.
_ADAMW_BYTES = 28
# Shares of the loss's operations in its forward pass.
_FORWARD_SHARE = {"clip": 1 / 4, "coca": 1 / 4, "siglip": 1.0}


@dataclass(frozen=True)
class Exposed:
    """A collective in a step.

    total: duration in seconds.
    exposed: seconds of it that no computation hides.
    """

    collective: Collective
    total: float
    exposed: float


@dataclass(frozen=True)
class StepTime:
    """A step in seconds.

    compute: by part.
    communication: all collectives.
    """

    compute: Mapping[str, float]
    communication: Sequence[Exposed]

    @property
    def exposed(self) -> float:
        """Communication that no computation hides."""
        return sum(part.exposed for part in self.communication)

    @property
    def total(self) -> float:
        """Duration of the step."""
        return sum(self.compute.values()) + self.exposed

    @property
    def efficiency(self) -> float:
        """Share of the step in which the devices compute."""
        return sum(self.compute.values()) / self.total

    def exposed_of(self, *names: str) -> float:
        """Exposed seconds of the collectives with these names."""
        return sum(part.exposed for part in self.communication if part.collective.name in names)


def update_seconds(config: TrainConfig, parameters: Parameters, cluster: Cluster) -> float:
    """Duration of an update by AdamW, which the memory limits. 0 if the rate of the memory is unknown."""
    if not cluster.device.memory_rate:
        return 0.0
    is_sharded = config.engine.name == "deepspeed" and config.engine.zero_stage > 0
    weights = sum(parameters.trainable) / (cluster.ranks if is_sharded else 1)
    return _ADAMW_BYTES * weights / cluster.device.memory_rate


def step_time(
    config: TrainConfig,
    cluster: Cluster,
    compute: Mapping[str, float],
    traffic: Sequence[Collective],
    num_micro_batches: int,
) -> StepTime:
    """The duration of a step.

    Args:
        compute: seconds of computation by part, with the names of `Stage.flops`.
        traffic: `step_traffic` of the step.
    """
    loss, share = compute.get("loss", 0.0), _FORWARD_SHARE.get(config.loss.kind, 0.0)
    hides_texts = share * loss / cluster.ranks
    hides_text_grads = (1 - share) * loss / cluster.ranks if share else 0.0
    backward = (compute.get("backward", 0.0) + compute.get("recomputation", 0.0)) / num_micro_batches
    # Computation that can still hide transfers: of each micro-batch the first pass, and the second and backward passes.
    free = {
        "embedding": compute.get("forward", 0.0),
        "backward": compute.get("replay", 0.0) + num_micro_batches * backward,
    }
    stage = config.engine.zero_stage if config.engine.name == "deepspeed" else None
    parts = []
    for collective in traffic:
        total, phase, hidden = seconds(collective, cluster), collective.phase, 0.0
        one = total / collective.count
        if collective.name == "text features":
            hidden = min(total, hides_texts)
        elif collective.name == "text gradients":
            hidden = min(total, hides_text_grads)
        elif collective.name == "weights":
            # The first weights of a step have no computation before them.
            hidden = min(total - one, free[phase])
            free[phase] -= hidden
        elif collective.name == "gradients" and (stage is None or (stage == 3 and num_micro_batches == 1)):
            # The last bucket is complete at the end of the backward pass.
            hidden = min(total - one, backward * (1 - 1 / collective.count), free[phase])
        parts.append(Exposed(collective, total, total - hidden))
    return StepTime(compute, parts)
