"""The memory of an engine: weights, gradients and optimiser states."""

from __future__ import annotations

from dataclasses import dataclass

from bclip_fast.hardware import Cluster
from bclip_fast.model.biomedclip import BiomedClip
from bclip_fast.train.config import TrainConfig
from bclip_fast.train.engine.optimizer import state_sizes

from .activations import Gradients


@dataclass(frozen=True)
class EngineMemory:
    """Bytes of a rank's engine, by part.

    always: from step to step.
    backward, update: in this phase, in addition to `always`.
    checkpoint: the copy that rank 0 makes to write a checkpoint.
    gradients: as for `measure_activations`.
    offloaded: on the host.
    """

    always: dict[str, float]
    backward: dict[str, float]
    update: dict[str, float]
    checkpoint: float
    gradients: Gradients
    offloaded: dict[str, float]

    @classmethod
    def of(cls, config: TrainConfig, model: BiomedClip, cluster: Cluster, has_micro_batches: bool) -> EngineMemory:
        """The memory under `config`."""
        weights = 4.0 * sum(p.numel() for p in model.parameters())
        trainable = 4.0 * sum(p.numel() for p in model.parameters() if p.requires_grad)
        engine, ranks = config.engine, cluster.ranks
        stage = engine.zero_stage if engine.name == "deepspeed" else 0
        bucket, shard = {"communication": float(min(engine.bucket_mib << 20, trainable))}, trainable / ranks
        ema = trainable if config.ema_decay else 0.0
        states = state_sizes(model, config.optim)
        always: dict[str, float] = {"weights": weights, "optimiser": states}
        # With micro-batches, every engine keeps unsharded gradients from the first micro-batch to the last.
        gradients: Gradients = "present" if has_micro_batches else "allocated"
        backward = {"unsharded gradients": trainable} if has_micro_batches else {}
        if engine.name == "ddp":
            if ranks > 1:
                # DDP copies the gradients to its buckets and replaces them by views.
                always["gradients"], gradients = trainable, "present" if has_micro_batches else "collected"
            update: dict[str, float] = {"gradients": trainable}
        elif stage == 0:
            # DeepSpeed reduces a flat copy of up to 500 million gradients (deepspeed.runtime.engine).
            update = {"gradients": trainable, "communication": min(trainable, 4 * 500e6) if ranks > 1 else 0.0}
        elif stage < 3:
            # Each rank also has an fp32 copy of the shard that it updates. It collects the gradients of the shard, and
            # copies them once more for the update (deepspeed.runtime.zero.stage_1_and_2).
            always["optimiser"] = shard + states / ranks
            update = {"gradients": max(trainable + shard, 2 * shard) if stage == 1 else 2 * shard, **bucket}
            if stage == 2 and not has_micro_batches:
                backward, gradients = {"gradients": shard, **bucket}, "collected"
        else:
            # DeepSpeed gathers the prefetched weights and those of the current layer. The largest layer is an
            # embedding.
            gathered = min(weights, float(engine.bucket_mib << 20) + 4.0 * max(p.numel() for p in model.parameters()))
            always = {"weights": shard, "optimiser": states / ranks, "gradients": shard, **bucket}
            gradients = "present" if has_micro_batches else "collected"
            backward = {"gathered weights": gathered, **backward}
            update = {}
        if ema:
            always["EMA"] = ema / ranks if stage == 3 else ema
        # Weights, moments and EMA, and the weights again for the exported model.
        checkpoint = weights + states + ema + weights
        offloaded: dict[str, float] = {}
        if engine.offload_optimizer:
            # Includes the gradients of the shard and, below stage 3, the pinned copy of its weights that goes back.
            offloaded["optimiser"] = (2 if stage == 3 else 3) * shard + states / ranks
            always.pop("optimiser")
            if stage == 3:
                always.pop("gradients")
        if engine.offload_parameters:
            offloaded["weights"] = always.pop("weights")
        return cls(always, backward, update, checkpoint, gradients, offloaded)
