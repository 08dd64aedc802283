"""`bclip plan`: what a run would take, in memory, operations and hours, without ranks, GPUs or training.

What is held from step to step follows from the engine's rules, activations from the model itself (`memory.py`),
operations from `flops.py`, time from rates that `bclip bench` measured on such a device. What was not measured is said.

On a CPU the resident memory also has the holes that glibc's heap leaves between blocks. They aren't counted: a quarter
of the activations was seen where all were kept, and more than they are where they were recomputed; of RN50's, whose
convolutions also take room inside the library, 43 %.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bclip_fast.data.sampler import SampleStream
from bclip_fast.data.shards.reader import ShardDataset
from bclip_fast.errors import UserError
from bclip_fast.hardware import GIB, Cluster, peak_flops_per_second, results_name
from bclip_fast.io.jsonl import read_lines
from bclip_fast.model.biomedclip import BiomedClip
from bclip_fast.model.flops import forward_flops
from bclip_fast.ops.contrastive import default_chunk_size
from bclip_fast.train.config import TrainConfig
from bclip_fast.train.init_weights import new_model

from .activations import Gradients, activations, kept

Bytes = Mapping[str, float]

# What a process has resident that trained a model of no size on a CPU, by engine (torch 2.13, DeepSpeed 0.19, x86-64).
_PROCESS = {"ddp": 417 << 20, "deepspeed": 525 << 20}
# With CUDA beside it: its libraries on the host; its context, NCCL's and cuBLAS's buffers on the device. Not measured.
_CUDA_HOST, _CUDA_DEVICE = 3 * GIB, 1.5 * GIB
# Of the peak rate, where no measurement of this device is at hand. Not measured.
_FRACTION = 0.4
# PMC-15M's training split (arXiv 2303.00915, table 1).
_PMC_SAMPLES = 13_900_000
# Tokens of PubMedBERT at 20 equally distant quantiles of 558 captions of PMC articles, [CLS] and [SEP] among them, and
# bytes of a token in captions of that kind.
_PMC_TOKENS = (8, 12, 15, 18, 21, 25, 29, 33, 39, 45, 54, 64, 77, 87, 106, 121, 145, 167, 254, 399)
_BYTES_PER_TOKEN = 4.4
_PMC_IMAGE_BYTES = 80_000


@dataclass(frozen=True)
class Samples:
    """count: in an epoch. tokens: of captions, uncut, at equally distant quantiles. image_bytes: of a stored image."""

    count: int
    tokens: Sequence[int]
    image_bytes: float
    source: str

    def lengths(self, context_length: int) -> list[int]:
        return [min(tokens, context_length) for tokens in self.tokens]

    def longest(self, context_length: int, size: int, batch_size: int, num_batches: int) -> list[int]:
        """Lengths of the `size` captions of a micro-batch in that of `num_batches` batches which has the most tokens.

        The stream deals those of a batch evenly, so a micro-batch differs as the mean of its batch does, and the
        largest of n normal numbers lies sqrt(2 ln n) standard deviations above their mean.
        """
        cut = self.lengths(context_length)
        above = statistics.pstdev(cut) * math.sqrt(2 * math.log(max(num_batches, 1)) / batch_size)
        total = min(size * context_length, round(size * (statistics.fmean(cut) + above)))
        return [total // size + (i < total % size) for i in range(size)]


PMC_15M = Samples(
    _PMC_SAMPLES, _PMC_TOKENS, _PMC_IMAGE_BYTES, "PMC-15M's training split, captions as of 558 in PMC articles"
)


@dataclass(frozen=True)
class Stage:
    """Epochs with one batch size. Operations are a step's over all ranks, seconds a step's; None: no rate is known."""

    first_epoch: int
    epochs: int
    batch_size: int
    rank_batch: int
    micro_batch: int
    num_steps: int
    flops: Bytes
    seconds: Mapping[str, float] | None

    @property
    def hours(self) -> float | None:
        return None if self.seconds is None else self.num_steps * sum(self.seconds.values()) / 3600


@dataclass(frozen=True)
class Plan:
    """What `make` found. Memory is bytes of one rank by phase of a step and part, on the device and, where that is
    another memory, on the host; rates says where those of the time come from."""

    parameters: Mapping[str, int]
    samples: Samples
    world: Cluster
    stages: Sequence[Stage]
    memory: Mapping[str, Bytes]
    host: Mapping[str, Bytes]
    rates: str

    @property
    def peak(self) -> float:
        return max(sum(parts.values()) for parts in self.memory.values())

    @property
    def host_peak(self) -> float:
        return max((sum(parts.values()) for parts in self.host.values()), default=0.0)

    @property
    def hours(self) -> float | None:
        hours = [stage.hours for stage in self.stages]
        return None if None in hours else sum(hour for hour in hours if hour is not None)


def samples_of(config: TrainConfig) -> Samples:
    """Of the shards, by their index alone, or PMC-15M's where none are given."""
    if not config.data.shards:
        return PMC_15M
    data = ShardDataset(config.data.shards, config.data.split, config.data.read)
    # From a few places, as each reads an index file.
    places = [round(i * (len(data) - 1) / 19) for i in range(20)]
    near = sorted({min(place + i, len(data) - 1) for place in places for i in range(50)})
    tokens = sorted(2 + round(data.caption_bytes(i) / _BYTES_PER_TOKEN) for i in near)
    quantiles = [tokens[int((i + 0.5) / 20 * len(tokens))] for i in range(20)]
    return Samples(len(data), quantiles, data.num_bytes / len(data), config.data.shards)


def make(config: TrainConfig, samples: Samples, world: Cluster) -> Plan:
    """The plan of a run, a function of its arguments and of the rates in benchmarks/results.

    Raises:
        UserError: a batch that doesn't divide among ranks and micro-batches, or larger than the samples.
    """
    config = _resolved(config, world)
    if world.cpu and (config.engine.offload_optimizer or config.engine.offload_parameters):
        raise UserError("engine.offload_optimizer and offload_parameters: from a GPU, which the planned ranks have not")
    model = _model(config)
    stages, rates = _stages(config, model, samples, world), _Rates(world, config.engine.precision)
    stages = [replace(stage, seconds=rates.seconds(stage, config, model, world)) for stage in stages]
    memory, host = _memory(config, model, samples, world, _largest(stages))
    towers = {"image tower": model.visual, "text tower": model.text}
    parameters = {name: sum(p.numel() for p in tower.parameters()) for name, tower in towers.items()}
    parameters["trained"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Plan(parameters, samples, world, stages, memory, host, rates.source)


def refuse(config: TrainConfig, plan: Plan) -> None:
    """Raises UserError, naming the largest part and what would help, where memory doesn't suffice."""
    for what, phases, peak, limit in (
        ("a rank", plan.memory, plan.peak, plan.world.device.memory),
        ("a rank's share of its host", plan.host, plan.host_peak, plan.world.host_memory),
    ):
        if not limit or peak <= limit:
            continue
        phase, parts = max(phases.items(), key=lambda item: sum(item[1].values()))
        part = max(parts, key=lambda name: parts[name])
        helps = []
        for knob, changed in _knobs(config, plan.world):
            other = make(changed, plan.samples, plan.world)
            lower = other.peak if phases is plan.memory else other.host_peak
            if lower < 0.98 * peak:
                helps.append((lower, f"{knob}: {_size(lower)}{'' if lower <= limit else ', still too much'}"))
        raise UserError(
            f"this run does not fit: {what} needs {_size(peak)} and has {_size(limit)}; the most, "
            f"{_size(parts[part])} in phase {phase}, goes to: {part}. "
            + (
                "What helps: " + "; ".join(text for _, text in sorted(helps))
                if helps
                else "Take more or larger devices"
            )
        )


def _knobs(config: TrainConfig, world: Cluster) -> list[tuple[str, TrainConfig]]:
    """Changes that keep what is learned, each alone."""
    engine, data = config.engine, config.data
    knobs: list[tuple[str, TrainConfig]] = []
    sizes = [config.first_batch_size, *(size for _, size in config.batch_schedule)]
    rank = min(size // world.ranks for size in sizes)
    micro = config.micro_batch_size or rank
    smaller = [size for size in (micro // 2, micro // 4, micro // 8) if size and not micro % size and not rank % size]
    knobs += [(f"micro_batch_size={size}", replace(config, micro_batch_size=size)) for size in smaller]
    if not world.cpu and engine.grad_checkpointing and not engine.offload_activations:
        knobs.append(("engine.offload_activations=true", _with(config, offload_activations=True)))
    if not world.cpu and engine.name == "deepspeed" and engine.zero_stage and not engine.offload_optimizer:
        knobs.append(("engine.offload_optimizer=true", _with(config, offload_optimizer=True)))
    if not engine.grad_checkpointing:
        knobs.append(("engine.grad_checkpointing=true", _with(config, grad_checkpointing=True)))
    if world.ranks > 1 and (engine.name != "deepspeed" or engine.zero_stage < 1):
        knobs.append(("engine.zero_stage=1", _with(config, name="deepspeed", zero_stage=1)))
    if world.ranks > 1 and (engine.name != "deepspeed" or engine.zero_stage < 2):
        knobs.append(("engine.zero_stage=2", _with(config, name="deepspeed", zero_stage=2)))
    if world.ranks == 1 and engine.name == "deepspeed" and engine.zero_stage:
        knobs.append(("engine.zero_stage=0", _with(config, zero_stage=0)))
    if config.checkpoint.background:
        changed = replace(config, checkpoint=replace(config.checkpoint, background=False))
        knobs.append(("checkpoint.background=false", changed))
    if data.prefetch_batches > 0:
        knobs.append(("data.prefetch_batches=0", replace(config, data=replace(data, prefetch_batches=0))))
    return knobs


def _with(config: TrainConfig, **changes: Any) -> TrainConfig:
    return replace(config, engine=replace(config.engine, **changes))


def _model(config: TrainConfig) -> BiomedClip:
    """Of a resolved configuration, without storage, as the trainer would have it."""
    with torch.device("meta"):
        model = new_model(config)
    # Without offloading: there is no host beside tensors that have no storage.
    model.set_grad_checkpointing(config.engine.grad_checkpointing)
    if config.patch_dropout_until < 1:
        # The last steps, which see whole images, take the most.
        model.visual.patch_dropout = 0.0
    return model


def _stages(config: TrainConfig, model: BiomedClip, samples: Samples, world: Cluster) -> list[Stage]:
    stream = SampleStream(
        [samples.count],
        "",
        batch_size=config.batch_size,
        schedule=config.batch_schedule,
        micro_batch_size=config.micro_batch_size,
        world_size=world.ranks,
    )
    num_steps = config.max_steps or stream.num_batches_of(config.epochs)
    last = stream.locate(num_steps - 1)[0]
    firsts = sorted({0, *(epoch for epoch, _ in config.batch_schedule)})
    stages = []
    for first, following in zip(firsts, [*firsts[1:], last + 1], strict=True):
        end = min(following, last + 1)
        count = min(num_steps, stream.num_batches_of(end)) - stream.num_batches_of(first) if end > first else 0
        if count > 0:
            batch_size = stream.batch_size_of(first)
            share = batch_size // world.ranks
            micro = config.micro_batch_size or share
            flops = _flops(config, samples, batch_size, micro < share)
            stages.append(Stage(first, end - first, batch_size, share, micro, count, flops, None))
    return stages


def _largest(stages: Sequence[Stage]) -> Stage:
    return max(stages, key=lambda stage: stage.rank_batch)


def _flops(config: TrainConfig, samples: Samples, batch_size: int, replay: bool) -> dict[str, float]:
    """Of a step over all ranks, by part."""
    lengths = samples.lengths(config.model.text.context_length)
    forward = batch_size / len(lengths) * sum(forward_flops(config.model, lengths, config.model.vision.patch_dropout))
    # A locked tower goes forward alone, which is left to the reader.
    flops = {"forward": forward, "backward": 2 * forward}
    if replay:
        flops["replay"] = forward
    if config.engine.grad_checkpointing:
        flops["recomputation"] = forward
    # S, S again, and the two products with its gradient: as benchmarks/cases counts.
    flops["loss"] = 4 * 2.0 * batch_size**2 * config.model.embed_dim
    return flops


def _traffic(config: TrainConfig, model: BiomedClip, world: Cluster, stage: Stage) -> float:
    """Bytes a step that a ring moves through each rank: gradients and weights in fp32, texts and their gradients."""
    weights = 4.0 * sum(p.numel() for p in model.parameters())
    # An all-reduce, or a reduction and a gathering of what was updated; under ZeRO 3 each pass gathers instead.
    passes = stage.rank_batch // stage.micro_batch
    passes = 2 if passes == 1 else 3 * passes
    times = 1 + passes if config.engine.name == "deepspeed" and config.engine.zero_stage == 3 else 2
    operands = 4 if config.engine.precision == "fp32" else 2
    texts = stage.batch_size * config.model.embed_dim * (operands + 4)
    return (world.ranks - 1) / world.ranks * (times * weights + texts)


class _Rates:
    """Operations a second of a rank: measured by `bclip bench`, else a fraction of what matmuls reach, else unknown."""

    def __init__(self, world: Cluster, precision: str) -> None:
        device, rows = world.device.name, measured(world.device.name)
        # The ranks of a node share its processor, whose rows were measured with all of it.
        shares = world.ranks_per_node if world.cpu else 1
        ours = [row for row in rows if row["contender"].startswith("ours")]
        steps = [row for row in ours if row["operator"] == "step" and row["dtype"] == precision]
        steps = [row for row in steps if row["contender"] == "ours" or row["contender"].startswith("ours:")]
        long = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[precision]
        losses = [row for row in ours if row["operator"] == "contrastive" and row["dtype"] == long]
        losses = [row for row in losses if row["batch"] >= 4096 and not row["contender"].endswith("reference")]
        self.tower = self.loss = None
        self.source = f"not known: no row for {device} in benchmarks/results; `bclip bench step` there writes them"
        peak = peak_flops_per_second(device, precision)
        if peak is None and losses:
            peak = statistics.median(row["matmul_flops_per_second"] for row in losses)
        if steps:
            self.tower = statistics.median(row["flops"] / row["seconds"] for row in steps) / shares
            self.source = f"measured on {device}: {self.tower:.3g} FLOP/s of a rank in a step (median of {len(steps)})"
        elif peak:
            self.tower = _FRACTION * peak / shares
            self.source = f"NOT MEASURED: {_FRACTION:.0%} of the {peak:.3g} FLOP/s that matmuls of {device} reach"
        self.loss = self.tower
        if losses:
            self.loss = statistics.median(row["flops"] / row["seconds"] for row in losses) / shares
            self.source += f"; {self.loss:.3g} in the loss, measured (median of {len(losses)})"

    def seconds(self, stage: Stage, config: TrainConfig, model: BiomedClip, world: Cluster) -> dict[str, float] | None:
        """Of a step, by part; None where no rate is known."""
        if self.tower is None or self.loss is None:
            return None
        rates = {"loss": self.loss}
        seconds = {name: flops / world.ranks / rates.get(name, self.tower) for name, flops in stage.flops.items()}
        return {**seconds, "communication": _traffic(config, model, world, stage) / world.link}


def measured(device: str) -> list[dict[str, Any]]:
    """The rows of benchmarks/results for a device; the folder is beside the package in a source tree, else inside."""
    package = Path(__file__).parents[1]
    paths = [folder / "benchmarks" / "results" / results_name(device) for folder in (package.parent, package)]
    path = next((path for path in paths if path.is_file()), None)
    return [] if path is None else read_lines(path)


def _memory(
    config: TrainConfig, model: BiomedClip, samples: Samples, world: Cluster, stage: Stage
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """Bytes by phase and part, on the device and, where that is another memory, on the host."""
    micro, share = stage.micro_batch, stage.rank_batch
    engine = _EngineState.of(config, model, world, micro < share)
    options: dict[str, Any] = dict(precision=config.engine.precision, accelerator=not world.cpu)
    found = activations(model, _longest(config, samples, stage), gradients=engine.gradients, **options)
    pixels = 3 * config.model.vision.image_size**2
    # Micro-batches of the step wait on the host for their replay, what is above a limit in a file; those prepared ahead
    # come besides, one as it is read.
    waits = (
        share * pixels if micro == share else min(share * pixels, (config.data.spool_above_mib << 20) + micro * pixels)
    )
    loader = {"loader": waits + config.data.prefetch_batches * micro * pixels + micro * samples.image_bytes}
    copies = {"checkpoint": engine.checkpoint}
    # A run's last checkpoint comes when no step follows; those before are written while training goes on.
    overlap = copies if config.checkpoint.background and config.checkpoint.every_steps else {}
    towers = {"image tower's activations": found.image, "text tower's activations": found.text}
    features, similarities = _loss(config, world, share, stage.batch_size)
    passing = found.step - found.image - found.text
    waiting: dict[str, float] = {}
    if config.engine.offload_activations and not world.cpu:
        # But for the weights that autocast made of the layers', which stay.
        kept_here = min(found.image + found.text, sum(p.numel() for p in model.parameters()) * 2)
        waiting = {"activations": found.image + found.text - kept_here}
        towers = {"towers' activations": kept_here}
    always: dict[str, float] = {**engine.always, "features": features}
    always["process"] = _PROCESS[config.engine.name] if world.cpu else _CUDA_DEVICE
    if micro < share:
        phases = {"embedding": {**always, "passing": found.embed}, "loss": {**always, "similarities": similarities}}
    else:
        phases = {"loss": {**always, **towers, "similarities": similarities}}
    phases["backward"] = {**always, **engine.backward, **towers, "passing": passing}
    phases["update"] = {**always, **engine.update}
    if world.cpu:
        steps = {name: {**parts, **loader, **overlap} for name, parts in phases.items()}
        return {**steps, "checkpoint": {**always, **loader, **copies}}, {}
    for parts in phases.values():
        parts["batch"] = micro * pixels
    host = {"process": float(_CUDA_HOST), **loader, **engine.offloaded, **waiting}
    return phases, {"step": {**host, **overlap}, "checkpoint": {**host, **copies}}


def _longest(config: TrainConfig, samples: Samples, stage: Stage) -> list[int]:
    return samples.longest(config.model.text.context_length, stage.micro_batch, stage.batch_size, stage.num_steps)


def _kept(config: TrainConfig, samples: Samples, world: Cluster, stage: Stage) -> dict[str, tuple[int, int]]:
    """What a micro-batch keeps for its backward pass with and without what spares memory: (image tower, text tower)."""
    rows, context_length, model = {}, config.model.text.context_length, _model(config)
    packed, padded = _longest(config, samples, stage), [context_length] * stage.micro_batch
    for checkpointing in (False, True):
        for name, lengths in (("packed", packed), (f"padded to {context_length}", padded)):
            model.set_grad_checkpointing(checkpointing)
            found = kept(model, lengths, precision=config.engine.precision, accelerator=not world.cpu)
            rows[f"{name}, {'checkpointed' if checkpointing else 'not checkpointed'}"] = found
    return rows


@dataclass(frozen=True)
class _EngineState:
    """Bytes that an engine holds of weights, gradients and optimiser: always, in a phase beyond it, what rank 0 copies
    to write a checkpoint, and what is offloaded to the host. `gradients` as in `activations`."""

    always: dict[str, float]
    backward: dict[str, float]
    update: dict[str, float]
    checkpoint: float
    gradients: Gradients
    offloaded: dict[str, float]

    @classmethod
    def of(cls, config: TrainConfig, model: BiomedClip, world: Cluster, replays: bool) -> _EngineState:
        weights = 4.0 * sum(p.numel() for p in model.parameters())
        trained = 4.0 * sum(p.numel() for p in model.parameters() if p.requires_grad)
        engine, ranks = config.engine, world.ranks
        stage = engine.zero_stage if engine.name == "deepspeed" else 0
        bucket, share = {"communication": float(min(engine.bucket_mib << 20, trained))}, trained / ranks
        average = trained if config.ema_decay else 0.0
        whole: dict[str, float] = {"weights": weights, "optimiser": 2 * trained}
        # With micro-batches they lie whole from the first to the last, whatever the engine does with them then.
        grows: Gradients = "there" if replays else "grow"
        backward = {"whole gradients": trained} if replays else {}
        if engine.name == "ddp":
            if ranks > 1:
                # Gradients are copied to buckets that DDP keeps, and become views of them.
                whole["gradients"], grows = trained, "there" if replays else "taken"
            update: dict[str, float] = {"gradients": trained}
        elif stage == 0:
            # They are reduced in a flat copy of up to 500 million numbers (deepspeed.runtime.engine).
            update = {"gradients": trained, "communication": min(trained, 4 * 500e6) if ranks > 1 else 0.0}
        elif stage < 3:
            # Of fp32 weights, too, there is a copy of the shard that this rank updates; its gradients are collected,
            # and copied once more for the update (deepspeed.runtime.zero.stage_1_and_2).
            whole["optimiser"] = 3 * share
            update = {"gradients": max(trained + share, 2 * share) if stage == 1 else 2 * share, **bucket}
            if stage == 2 and not replays:
                backward, grows = {"gradients": share, **bucket}, "taken"
        else:
            # What is fetched ahead, and the weights of the layer that needs more: an embedding at most.
            gathered = min(weights, float(engine.bucket_mib << 20) + 4.0 * max(p.numel() for p in model.parameters()))
            whole = {"weights": share, "optimiser": 2 * share, "gradients": share, **bucket}
            backward, grows = {"gathered weights": gathered, **backward}, "there" if replays else "taken"
            update = {}
        if average:
            whole["average of weights"] = average / ranks if stage == 3 else average
        # Weights, moments and average, and once more the weights as the exported model has them.
        checkpoint = weights + 2 * trained + average + weights
        offloaded: dict[str, float] = {}
        if engine.offload_optimizer:
            # With the gradients of the shard and, below stage 3, what is sent back of its weights, pinned.
            offloaded["optimiser"] = (4 if stage == 3 else 5) * share
            whole.pop("optimiser")
            if stage == 3:
                whole.pop("gradients")
        if engine.offload_parameters:
            offloaded["weights"] = whole.pop("weights")
        return cls(whole, backward, update, checkpoint, grows, offloaded)


def _loss(config: TrainConfig, world: Cluster, local: int, total: int) -> tuple[float, float]:
    """Bytes of features with their gradients, and of a chunk of similarities with its gradient."""
    width, operands = config.model.embed_dim, 4 if config.engine.precision == "fp32" else 2
    rows = default_chunk_size(local, total, torch.device("cpu" if world.cpu else "cuda"))
    # Both towers' local features and gradients in fp32; all ranks' texts as operands, and their gradient.
    features = 4 * local * width * 4 + (total * width * (operands + 4) if world.ranks > 1 else 0)
    return features, 2 * 4 * rows * total


def _size(count: float) -> str:
    return f"{count / GIB:.2f} GiB"


def show(config: TrainConfig, plan: Plan) -> None:
    from rich.console import Console

    console = Console() if os.isatty(1) else Console(width=120)
    for part in (_heading(config, plan), *_tables(_resolved(config, plan.world), plan)):
        console.print(part)
        console.print()


def _resolved(config: TrainConfig, world: Cluster) -> TrainConfig:
    """With the preset spelled out, and precision "auto" as the cluster's devices have it."""
    config = config.resolved()
    return config.with_precision(world.precision) if config.engine.precision == "auto" else config


def _heading(config: TrainConfig, plan: Plan) -> str:
    world, counts = plan.world, plan.parameters
    auto = config.engine.precision == "auto"
    precision = f"{world.precision} (auto): {world.precision_reason}" if auto else config.engine.precision
    steps = sum(stage.num_steps for stage in plan.stages)
    seen = sum(stage.num_steps * stage.batch_size for stage in plan.stages)
    end = "unknown" if plan.hours is None else f"{plan.hours:,.1f} h, {plan.hours * world.ranks:,.0f} device-hours"
    holes = " (holes of the heap not counted)" if world.cpu else ""
    return "\n".join(
        [
            f"World       {world.ranks} rank(s) on {world.nodes} node(s), {world.device.name}, "
            f"{_size(world.device.memory)} a rank{holes}, links of {world.link / 1e9:.3g} GB/s",
            f"Precision   {precision}",
            f"Samples     {plan.samples.count:,} an epoch: {plan.samples.source}",
            f"Parameters  image tower {counts['image tower']:,}, text tower {counts['text tower']:,}; "
            f"trained {counts['trained']:,}",
            f"Length      {steps:,} steps, {seen:,} pairs seen",
            f"Time        {end}; {plan.rates}; links by data sheet, waits none",
        ]
    )


def _tables(config: TrainConfig, plan: Plan) -> Iterator[Any]:
    largest = _largest(plan.stages)
    head = ["from epoch", "steps", "batch", "of a rank", "micro-batch"]
    flops = _union(stage.flops for stage in plan.stages)
    yield _table(
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
        yield _table(
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
        ("Memory of a rank, GiB by phase of a step", plan.memory, plan.world.device.memory),
        ("Memory of a rank on its host, GiB", plan.host, plan.world.host_memory),
    ):
        if phases:
            parts = _union(phases.values())
            rows = [[name, *(f"{phase.get(name, 0) / GIB:.2f}" for phase in phases.values())] for name in parts]
            total = ["sum", *(f"{sum(phase.values()) / GIB:.2f}" for phase in phases.values())]
            bound = f"; there are {limit / GIB:.2f}" if limit else ""
            yield _table(title + bound, ["part", *phases], [*rows, total])
    towers = _kept(config, plan.samples, plan.world, largest)
    yield _table(
        f"Kept for the backward pass of {largest.micro_batch} pairs, GiB",
        ["text", "image tower", "text tower"],
        [[name, *(f"{count / GIB:.2f}" for count in counts)] for name, counts in towers.items()],
    )


def _union(mappings: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for mapping in mappings for name in mapping))


def _table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for number, head in enumerate(heads):
        table.add_column(head, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    return table
