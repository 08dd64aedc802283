"""The efficiency of a run on more GPUs, where the overlap ends, and the settings that help."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from bclip_fast.errors import UserError
from bclip_fast.hardware import Cluster
from bclip_fast.train.config import TrainConfig

from .estimate import fits, resolve_config, shape_of, stage_of, step_of
from .rates import Rates
from .samples import Samples
from .timeline import StepTime
from .types import Plan, Stage, largest_stage

WEIGHTS = ("gradients", "weights", "updated weights", "small weights")
"""Names of the collectives of the engines."""
TEXTS = ("text features", "text gradients")


@dataclass(frozen=True)
class ScaleConfig:
    """A table of the efficiency on several numbers of GPUs, by a model of the communication."""

    gpus: tuple[int, ...] = ()
    """Numbers of GPUs, such as 8 16 32 64 128 256 512 1024. Empty: no table."""
    keep: Literal["rank", "global"] = "rank"
    """rank: every GPU has as many pairs as in the plan, and the batch grows with the GPUs. global: the GPUs share the
    plan's batch."""

    def __post_init__(self) -> None:
        if self.keep not in ("rank", "global"):
            raise UserError(f"scale.keep={self.keep} must be rank or global")
        if any(count < 1 for count in self.gpus):
            raise UserError(f"scale.gpus={self.gpus} must be at least 1 each")


@dataclass(frozen=True)
class ScalePoint:
    """A step on a number of GPUs.

    change: the settings that differ from the plan's. Empty for the plan's.
    keeps_batch: whether the global batch is that of the plan's settings on as many GPUs.
    does_fit: whether it fits into memory. None if it was not computed.
    """

    cluster: Cluster
    stage: Stage
    step: StepTime
    change: str = ""
    keeps_batch: bool = True
    does_fit: bool | None = None

    @property
    def pairs_per_second(self) -> float:
        """Pairs of a GPU per second."""
        return self.stage.rank_batch / self.step.total

    def hidden(self, names: Sequence[str]) -> float | None:
        """Share of the duration of these collectives that computation hides. None without such collectives."""
        parts = [part for part in self.step.communication if part.collective.name in names]
        total = sum(part.total for part in parts)
        return 1 - sum(part.exposed for part in parts) / total if total else None

    def as_json(self) -> dict[str, Any]:
        """The values of a JSON file."""
        return {
            "gpus": self.cluster.ranks,
            "nodes": self.cluster.nodes,
            "change": self.change,
            "batch_size": self.stage.batch_size,
            "rank_batch": self.stage.rank_batch,
            "micro_batch": self.stage.micro_batch,
            "seconds": self.step.total,
            "compute": dict(self.step.compute),
            "communication": {
                f"{part.collective.name}, {part.collective.phase}": {
                    "operation": part.collective.operation,
                    "bytes": part.collective.num_bytes,
                    "calls": part.collective.count,
                    "seconds": part.total,
                    "exposed_seconds": part.exposed,
                }
                for part in self.step.communication
            },
            "efficiency": self.step.efficiency,
            "pairs_per_second_of_gpu": self.pairs_per_second,
            "keeps_batch": self.keeps_batch,
            "fits": self.does_fit,
        }


class Scaling:
    """Steps of a run on several numbers of GPUs.

    points: the plan's settings on each number of GPUs.
    alternatives: other settings on the largest number, the fastest first.

    Raises:
        UserError: the GPUs do not fill whole nodes, cannot share the batch, or no rate is known.
    """

    def __init__(self, config: TrainConfig, scale: ScaleConfig, plan: Plan) -> None:
        self._config, self._plan = resolve_config(config, plan.cluster), plan
        self._samples: Samples = plan.samples
        self._rates = Rates(plan.cluster, self._config.engine.precision)
        if self._rates.tower is None:
            raise UserError(f"scale.gpus={scale.gpus}: no rate of this device is known: {self._rates.source}")
        self._shape = shape_of(self._config)
        self._largest = largest_stage(plan.stages)
        self._ranks_per_node = plan.cluster.ranks_per_node
        if not config.cluster.devices_per_node and not plan.cluster.cpu:
            self._ranks_per_node = 8
        self.points = [
            self._point(self._config, count, self._batch_size(count, scale.keep)) for count in sorted(set(scale.gpus))
        ]
        self.alternatives = sorted(self._alternatives(), key=lambda point: -point.pairs_per_second)

    @property
    def best(self) -> ScalePoint | None:
        """The fastest alternative with the same batch that fits. None if the plan's settings are the fastest."""
        now = self.points[-1]
        for point in self.alternatives:
            if point.keeps_batch and point.does_fit is not False:
                return point if point.pairs_per_second > 1.005 * now.pairs_per_second else None
        return None

    def overlap(self, names: Sequence[str], share: float = 0.5) -> int | None:
        """The smallest number of GPUs on which less than `share` of the collectives is hidden. None: on none."""
        for point in self.points:
            hidden = point.hidden(names)
            if hidden is not None and hidden < share:
                return point.cluster.ranks
        return None

    def _batch_size(self, count: int, keep: str) -> int:
        batch_size = self._largest.rank_batch * count if keep == "rank" else self._largest.batch_size
        if batch_size % count:
            raise UserError(
                f"scale.gpus: {count} GPUs cannot share a batch of {batch_size}; leave it out, or set scale.keep=rank"
            )
        return batch_size

    def _point(
        self, config: TrainConfig, count: int, batch_size: int, ranks_per_node: int = 0, **facts: Any
    ) -> ScalePoint:
        ranks_per_node = min(ranks_per_node or self._ranks_per_node, count)
        if count % ranks_per_node:
            raise UserError(f"scale.gpus: {count} GPUs do not fill nodes of {ranks_per_node}; choose a multiple of it")
        cluster, was = self._plan.cluster, self._plan.cluster.ranks_per_node
        # Nodes keep their cards and cores, unless each GPU has its own card.
        nics = config.cluster.nics_per_node or ranks_per_node
        cores = cluster.cores * was / ranks_per_node if config.cluster.cores_per_node else cluster.cores
        cluster = replace(
            cluster, nodes=count // ranks_per_node, ranks_per_node=ranks_per_node, nics_per_node=nics, cores=cores
        )
        stage = stage_of(config, self._samples, cluster, batch_size)
        step = step_of(config, self._shape, self._samples, cluster, self._rates, stage)
        assert step is not None
        return ScalePoint(cluster, stage, step, **facts)

    def _alternatives(self) -> Iterator[ScalePoint]:
        if not self.points:
            return
        now, config = self.points[-1], self._config
        count, batch_size, pairs = now.cluster.ranks, now.stage.batch_size, now.stage.rank_batch
        changed = list(_changed_settings(config, pairs, now.stage.micro_batch))
        for change, other in changed:
            point = self._point(other, count, batch_size, change=change)
            yield replace(point, does_fit=self._does_fit(other, point)) if _may_help(point, now) else point
        for ranks_per_node in (1, 2, 4, 8):
            if ranks_per_node != now.cluster.ranks_per_node and count % ranks_per_node == 0:
                change = f"cluster.devices_per_node={ranks_per_node}"
                yield self._point(config, count, batch_size, ranks_per_node, change=change)
        if not config.micro_batch_tokens:
            # More pairs, in micro-batches of the size that fits, for one exchange of gradients.
            parts = replace(config, micro_batch_size=now.stage.micro_batch)
            for factor in (2, 4, 8):
                change = f"batch_size={factor * batch_size}, micro_batch_size={now.stage.micro_batch}"
                yield self._point(parts, count, factor * batch_size, change=change, keeps_batch=False)

    def _does_fit(self, config: TrainConfig, point: ScalePoint) -> bool:
        return fits(config, self._samples, point.cluster, point.stage)


def _changed_settings(config: TrainConfig, pairs: int, micro_batch: int) -> Iterator[tuple[str, TrainConfig]]:
    """Settings that don't change what the model learns, each with the changed configuration."""
    if not config.micro_batch_tokens:
        for size in (pairs, micro_batch // 2, micro_batch // 4):
            if size and size != micro_batch and pairs % size == 0:
                yield f"micro_batch_size={size}", replace(config, micro_batch_size=size)
    engine = config.engine
    settings: list[tuple[str, dict[str, Any]]] = []
    if engine.grad_checkpointing:
        changes = {"grad_checkpointing": False, "offload_activations": False}
        settings.append(("engine.grad_checkpointing=false", changes))
    if not engine.offload_optimizer and not engine.offload_parameters:
        if engine.name != "ddp" and engine.cpu_adam == "torch":
            settings.append(("engine.name=ddp", {"name": "ddp", "zero_stage": 1}))
        # Muon updates whole matrices, which the higher stages shard.
        stages = (0,) if config.optim.name == "muon" else (0, 1, 3)
        now = ("deepspeed", engine.zero_stage)
        settings += [
            (f"engine.zero_stage={stage}", {"name": "deepspeed", "zero_stage": stage})
            for stage in stages
            if (engine.name, stage) != now
        ]
    for change, values in settings:
        if other := with_engine(config, **values):
            yield change, other


def with_engine(config: TrainConfig, **changes: Any) -> TrainConfig | None:
    """The configuration with other settings of the engine. None if the engine cannot combine them."""
    try:
        return replace(config, engine=replace(config.engine, **changes))
    except UserError:
        return None


def _may_help(point: ScalePoint, now: ScalePoint) -> bool:
    return point.pairs_per_second > 1.005 * now.pairs_per_second
