"""`bclip plan`, and `bclip train`, which prints the plan if its configuration has `dry_run`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from bclip_fast.errors import UserError
from bclip_fast.hardware import GIB, Cluster, cluster_of
from bclip_fast.train import trainer
from bclip_fast.train.config import TrainConfig

from .estimate import build_plan, resolve_config, saved_by_text_layout
from .loader import LoaderPlan, check_loader, plan_loader
from .micro_batches import largest_micro_batch
from .network import bandwidth
from .samples import samples_of
from .scale_report import loader_lines, scale_parts
from .scaling import ScaleConfig, Scaling, with_engine
from .table import table
from .types import Plan, largest_stage


@dataclass(frozen=True)
class PlanCommand(TrainConfig):
    """The configuration of a pretraining run, and how to print its plan."""

    json: bool = False
    """Print the plan as JSON: bytes, operations and seconds by part. The exit status is 2 if the run does not fit."""
    scale: ScaleConfig = field(default_factory=ScaleConfig)


def run(config: TrainConfig) -> Plan:
    """Print the plan of a run.

    Raises:
        UserError: the ranks cannot share the batch, the run does not fit into the memory of the cluster, or its loader
            cannot keep up.
    """
    config = config.resolved()
    plan = build_plan(config, samples_of(config), cluster_of(config.cluster))
    loader, scaling = loader_of(config, plan), None
    if isinstance(config, PlanCommand) and config.scale.gpus:
        scaling = Scaling(config, config.scale, plan)
    if isinstance(config, PlanCommand) and config.json:
        content = as_json(plan) | {"loader": loader and asdict(loader)}
        if scaling is not None:
            best = scaling.best
            content["scale"] = {
                "points": [point.as_json() for point in scaling.points],
                "alternatives": [point.as_json() for point in scaling.alternatives],
                "best": best and best.change,
            }
        print(json.dumps(content))
    else:
        show(config, plan, loader, scaling)
    check_fits(config, plan)
    if loader is not None:
        check_loader(config, plan.cluster, plan.samples, loader)
    return plan


def loader_of(config: TrainConfig, plan: Plan) -> LoaderPlan | None:
    """The loader's part of the stage that takes most images a second. None if no rate of the devices is known."""
    rates = [(stage.rank_batch, sum(stage.seconds.values())) for stage in plan.stages if stage.seconds]
    if not rates:
        return None
    rank_batch, seconds = max(rates, key=lambda rate: rate[0] / rate[1])
    return plan_loader(config, plan.cluster, plan.samples, rank_batch, seconds)


def as_json(plan: Plan) -> dict[str, Any]:
    """Return a plan as the values of a JSON file. Its keys are the fields of `Plan` and `Stage`."""
    sums = {"peak": plan.peak, "host_peak": plan.host_peak, "hours": plan.hours}
    stages = [{**asdict(stage), "hours": stage.hours} for stage in plan.stages]
    cluster = {"ranks": plan.cluster.ranks, "nodes": plan.cluster.nodes, "device": plan.cluster.device.name}
    return {
        **sums,
        "parameters": dict(plan.parameters),
        "samples": {"count": plan.samples.count, "source": plan.samples.source},
        "cluster": cluster,
        "stages": stages,
        "memory": plan.memory,
        "host": plan.host,
        "rates": plan.rates,
    }


def train(config: TrainConfig) -> Path:
    """Train to the end, or print the plan under `dry_run`. Returns the run folder, which a plan does not create."""
    if config.dry_run:
        run(config)
        return Path(config.run)
    return trainer.train(config)


def check_fits(config: TrainConfig, plan: Plan) -> None:
    """Check that the run fits into the memory of the cluster.

    Raises:
        UserError: it does not fit. The message names the largest part, and the settings that would help.
    """
    for owner, phases, peak, limit in (
        ("a rank", plan.memory, plan.peak, plan.cluster.device.memory),
        ("a rank's share of its host", plan.host, plan.host_peak, plan.cluster.host_memory),
    ):
        if not limit or peak <= limit:
            continue
        phase, parts = max(phases.items(), key=lambda item: sum(item[1].values()))
        part = max(parts, key=lambda name: parts[name])
        remedies = []
        for setting, changed in _memory_savers(config, plan.cluster):
            other = build_plan(changed, plan.samples, plan.cluster)
            lower = other.peak if phases is plan.memory else other.host_peak
            if lower < 0.98 * peak:
                remedies.append((lower, f"{setting}: {_size(lower)}{'' if lower <= limit else ', still too much'}"))
        raise UserError(
            f"this run does not fit: {owner} needs {_size(peak)} but has {_size(limit)}; the largest part, "
            f"{_size(parts[part])} in phase {phase}, is: {part}. "
            + (
                "These settings help: " + "; ".join(text for _, text in sorted(remedies))
                if remedies
                else "Use more or larger devices"
            )
        )


def _memory_savers(config: TrainConfig, cluster: Cluster) -> list[tuple[str, TrainConfig]]:
    """Settings that save memory and don't change what the model learns, each with the changed configuration."""
    engine, data = config.engine, config.data
    savers: list[tuple[str, TrainConfig | None]] = []
    sizes = [config.first_batch_size, *(size for _, size in config.batch_schedule)]
    rank_batch = min(size // cluster.ranks for size in sizes)
    micro = config.micro_batch_size or rank_batch
    smaller = [size for size in (micro // 2, micro // 4, micro // 8) if size]
    smaller = [size for size in smaller if not micro % size and not rank_batch % size]
    context_length = config.model.text.context_length
    if config.micro_batch_tokens:
        smaller = []
        budgets = [config.micro_batch_tokens // divisor for divisor in (2, 4, 8)]
        budgets = [tokens for tokens in budgets if tokens >= config.image_tokens + context_length]
        savers += [(f"micro_batch_tokens={tokens}", replace(config, micro_batch_tokens=tokens)) for tokens in budgets]
    savers += [(f"micro_batch_size={size}", replace(config, micro_batch_size=size)) for size in smaller]
    if not cluster.cpu and engine.grad_checkpointing and not engine.offload_activations:
        savers.append(("engine.offload_activations=true", with_engine(config, offload_activations=True)))
    if not cluster.cpu and engine.name == "deepspeed" and engine.zero_stage and not engine.offload_optimizer:
        savers.append(("engine.offload_optimizer=true", with_engine(config, offload_optimizer=True)))
    if not engine.grad_checkpointing:
        savers.append(("engine.grad_checkpointing=true", with_engine(config, grad_checkpointing=True)))
    if cluster.ranks > 1 and (engine.name != "deepspeed" or engine.zero_stage < 1):
        savers.append(("engine.zero_stage=1", with_engine(config, name="deepspeed", zero_stage=1)))
    if cluster.ranks > 1 and (engine.name != "deepspeed" or engine.zero_stage < 2):
        savers.append(("engine.zero_stage=2", with_engine(config, name="deepspeed", zero_stage=2)))
    if cluster.ranks == 1 and engine.name == "deepspeed" and engine.zero_stage:
        savers.append(("engine.zero_stage=0", with_engine(config, zero_stage=0)))
    if config.checkpoint.background:
        changed = replace(config, checkpoint=replace(config.checkpoint, background=False))
        savers.append(("checkpoint.background=false", changed))
    if data.prefetch_batches > 0:
        savers.append(("data.prefetch_batches=0", replace(config, data=replace(data, prefetch_batches=0))))
    return [(setting, changed) for setting, changed in savers if changed is not None]


def show(config: TrainConfig, plan: Plan, loader: LoaderPlan | None, scaling: Scaling | None) -> None:
    """Print a plan as text and tables."""
    from rich.console import Console

    console = Console() if os.isatty(1) else Console(width=120)
    heading = _heading(config, plan)
    if loader is not None:
        heading += f"\n{loader_lines(loader, plan.cluster)}"
    more = [] if scaling is None else scale_parts(scaling)
    for part in (heading, *_tables(resolve_config(config, plan.cluster), plan), *more):
        console.print(part)
        console.print()


def _heading(config: TrainConfig, plan: Plan) -> str:
    cluster, counts = plan.cluster, plan.parameters
    towers = ", ".join(f"{name} {count:,}" for name, count in counts.items() if name != "trained")
    auto = config.engine.precision == "auto"
    precision = f"{cluster.precision} (auto): {cluster.precision_reason}" if auto else config.engine.precision
    steps = sum(stage.num_steps for stage in plan.stages)
    seen = sum(stage.num_steps * stage.batch_size for stage in plan.stages)
    time = "unknown" if plan.hours is None else f"{plan.hours:,.1f} h, {plan.hours * cluster.ranks:,.0f} device-hours"
    holes = " (holes of the heap not counted)" if cluster.cpu else ""
    lines = [] if not config.loss.teacher else [_teacher_line(config, plan)]
    if config.micro_batch_size or config.micro_batch_tokens:
        lines.append(_micro_batch_line(config, plan))
    return "\n".join(
        [
            f"World       {cluster.ranks} rank(s) on {cluster.nodes} node(s), {cluster.device.name}, "
            f"{_size(cluster.device.memory)} a rank{holes}, {bandwidth(cluster) / 1e9:.3g} GB/s a rank in collectives",
            f"Precision   {precision}",
            f"Samples     {plan.samples.count:,} an epoch: {plan.samples.source}",
            f"Parameters  {towers}; trained {counts['trained']:,}",
            *lines,
            f"Length      {steps:,} steps, {seen:,} pairs seen",
            f"Time        {time}; {plan.rates}; communication by a model",
        ]
    )


def _micro_batch_line(config: TrainConfig, plan: Plan) -> str:
    batch_sizes = [stage.batch_size for stage in plan.stages]
    name, largest = largest_micro_batch(config, plan.samples, plan.cluster, batch_sizes)
    fitting = f"{name}={largest} is the largest that fits" if largest else f"no {name} fits"
    return f"Micro-batch {name}={getattr(config, name)}; {fitting}"


def _teacher_line(config: TrainConfig, plan: Plan) -> str:
    teacher, count = plan.teacher, plan.samples.count
    cost = f"{config.loss.teacher}, {teacher.width} features, {teacher.flops / 1e9:,.3g} GFLOP a pair"
    if teacher.is_cached:
        disk, flops = _size(count * teacher.cache_bytes), count * teacher.flops / 1e12
        return f"Teacher     {cost}; {flops:,.0f} TFLOP before the first step, {disk} in the run folder"
    return f"Teacher     {cost} in each step; loss.teacher_cache embeds each sample only once"


def _tables(config: TrainConfig, plan: Plan) -> Iterator[Any]:
    largest = largest_stage(plan.stages)
    head = ["from epoch", "steps", "batch", "of a rank", "micro-batch"]
    flops = _union(stage.flops for stage in plan.stages)
    yield table(
        "Steps and their TFLOP, all ranks",
        [*head, *flops],
        [
            [
                *map(str, (stage.first_epoch, stage.num_steps, stage.batch_size, stage.rank_batch, stage.micro_batch)),
                *(f"{stage.flops.get(name, 0) / 1e12:,.1f}" for name in flops),
            ]
            for stage in plan.stages
        ],
    )
    if plan.hours is not None:
        parts = _union(stage.seconds or {} for stage in plan.stages)
        yield table(
            "Seconds a step",
            [*head[:1], *parts, "step", "hours"],
            [
                [
                    str(stage.first_epoch),
                    *(f"{seconds.get(name, 0):.3g}" for name in parts),
                    f"{sum(seconds.values()):.3g}",
                    f"{stage.hours:,.1f}",
                ]
                for stage in plan.stages
                if (seconds := stage.seconds)
            ],
        )
    for title, phases, limit in (
        ("Memory of a rank, GiB by phase of a step", plan.memory, plan.cluster.device.memory),
        ("Memory of a rank on its host, GiB", plan.host, plan.cluster.host_memory),
    ):
        if phases:
            parts = _union(phases.values())
            rows = [[name, *(f"{phase.get(name, 0) / GIB:.2f}" for phase in phases.values())] for name in parts]
            total = ["sum", *(f"{sum(phase.values()) / GIB:.2f}" for phase in phases.values())]
            bound = f"; it has {limit / GIB:.2f}" if limit else ""
            yield table(title + bound, ["part", *phases], [*rows, total])
    saved = saved_by_text_layout(config, plan.samples, plan.cluster, largest)
    yield table(
        f"Kept for the backward pass of {largest.micro_batch} pairs, GiB",
        ["text", "image tower", "text tower"],
        [[name, *(f"{count / GIB:.2f}" for count in counts)] for name, counts in saved.items()],
    )


def _union(mappings: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for mapping in mappings for name in mapping))


def _size(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.2f} GiB"
