"""The estimate of a run's memory, operations and hours, without ranks, GPUs or training.

The engine's rules give the memory that it keeps from step to step (engine_memory.py). The model itself gives the
activations (activations.py) and the operations (bclip_fast.model.flops). `bclip bench` measured the rates that give the
time (rates.py). The output says which numbers were not measured.

On a CPU, the resident memory also includes holes between the blocks of glibc's heap. The estimate ignores them. They
took a quarter of the activations if all were kept, and more than the activations if they were recomputed. RN50's
convolutions also allocate memory inside the library, together 43 % of RN50's activations.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from bclip_fast.data.sampler import ShardSampler
from bclip_fast.errors import UserError
from bclip_fast.hardware import GIB, Cluster, has_float8
from bclip_fast.model.biomedclip import BiomedClip
from bclip_fast.model.flops import forward_flops
from bclip_fast.ops.contrastive.checks import default_chunk_size
from bclip_fast.train.config import TrainConfig
from bclip_fast.train.float8 import cast_bytes
from bclip_fast.train.init_weights import new_model
from bclip_fast.train.run_teacher import CHUNK

from .activations import measure_activations, measure_saved
from .engine_memory import EngineMemory
from .rates import Rates
from .samples import Samples
from .teacher import TeacherCost, teacher_cost
from .timeline import StepTime, step_time, update_seconds
from .traffic import Parameters, step_traffic
from .types import Plan, Stage, largest_stage

# Resident memory of a process after it trained a model of negligible size on a CPU, by engine (torch 2.13, DeepSpeed
# 0.19, x86-64).
_PROCESS = {"ddp": 417 << 20, "deepspeed": 525 << 20}
# The same with CUDA. On the host: its libraries. On the device: its context and the buffers of NCCL and cuBLAS. Not
# measured.
_CUDA_HOST, _CUDA_DEVICE = 3 * GIB, 1.5 * GIB

_Phases = dict[str, dict[str, float]]
"""Bytes by phase of a step and by part."""


def build_plan(config: TrainConfig, samples: Samples, cluster: Cluster) -> Plan:
    """The plan of a run: a function of its arguments and of the rates in benchmarks/results.

    Raises:
        UserError: the ranks and micro-batches cannot share the batch, or the batch is larger than the dataset.
    """
    config = resolve_config(config, cluster)
    if cluster.cpu and (config.engine.offload_optimizer or config.engine.offload_parameters):
        raise UserError(
            "engine.offload_* requires GPUs, but the planned cluster has none; turn it off or plan for a GPU machine"
        )
    model = _model(config)
    if config.engine.precision == "fp8" and not has_float8(cluster.device.name):
        raise UserError(
            f"engine.precision=fp8 needs GPUs with FP8, such as an H100, but the plan is for {cluster.device.name}; "
            "set engine.precision=bf16, or cluster.device=h100"
        )
    stages, rates = _stages(config, samples, cluster), Rates(cluster, config.engine.precision)
    shape = Parameters.of(model, config)
    for number, stage in enumerate(stages):
        step = step_of(config, shape, samples, cluster, rates, stage)
        if step is not None:
            seconds = {**step.compute, "exposed communication": step.exposed}
            stages[number] = replace(stage, seconds=seconds)
    memory, host = _memory(config, model, samples, cluster, largest_stage(stages))
    towers = {"image tower": model.visual, "text tower": model.text}
    parameters = {name: sum(p.numel() for p in tower.parameters()) for name, tower in towers.items()}
    if model.decoder is not None:
        parameters["caption decoder"] = sum(p.numel() for p in model.decoder.parameters())
    parameters["trained"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    teacher = _teacher(config, samples)
    return Plan(parameters, samples, cluster, stages, memory, host, rates.source, teacher)


def step_of(
    config: TrainConfig, parameters: Parameters, samples: Samples, cluster: Cluster, rates: Rates, stage: Stage
) -> StepTime | None:
    """The duration of a step of a resolved configuration. None if no rate is known."""
    compute = rates.compute(stage.flops, cluster.ranks)
    if compute is None:
        return None
    compute["update"] = update_seconds(config, parameters, cluster)
    count = -(-stage.rank_batch // stage.micro_batch)
    traffic = step_traffic(
        config,
        parameters,
        num_ranks=cluster.ranks,
        batch_size=stage.batch_size,
        num_micro_batches=count,
        teacher_width=_teacher(config, samples).width,
    )
    return step_time(config, cluster, compute, traffic, count)


def shape_of(config: TrainConfig) -> Parameters:
    """The sizes of the parameters of a resolved configuration."""
    return Parameters.of(_model(config), config)


def fits(config: TrainConfig, samples: Samples, cluster: Cluster, stage: Stage) -> bool:
    """Whether a stage of a resolved configuration fits into the memory of the cluster."""
    memory, host = _memory(config, _model(config), samples, cluster, stage)
    sums = [max((sum(parts.values()) for parts in phases.values()), default=0.0) for phases in (memory, host)]
    limits = cluster.device.memory, cluster.host_memory
    return all(not limit or peak <= limit for peak, limit in zip(sums, limits, strict=True))


def stage_of(config: TrainConfig, samples: Samples, cluster: Cluster, batch_size: int) -> Stage:
    """A stage of one step with this global batch size."""
    rank_batch = batch_size // cluster.ranks
    micro_batch = min(config.micro_batch_size, rank_batch) or rank_batch
    if config.micro_batch_tokens:
        limits = config.micro_batch_tokens, config.image_tokens, config.model.text.context_length
        micro_batch = samples.pairs_within(*limits, rank_batch)
    flops = _flops(config, samples, batch_size, micro_batch < rank_batch)
    return Stage(0, 1, batch_size, rank_batch, micro_batch, 1, flops, None)


def resolve_config(config: TrainConfig, cluster: Cluster) -> TrainConfig:
    """`config` with the preset written out, and with the cluster's precision for "auto"."""
    config = config.resolved()
    return config.with_precision(cluster.precision) if config.engine.precision == "auto" else config


def saved_by_text_layout(
    config: TrainConfig, samples: Samples, cluster: Cluster, stage: Stage
) -> dict[str, tuple[int, int]]:
    """Bytes (image tower, text tower) that a micro-batch saves for its backward pass.

    The keys are packed and padded texts, each with and without gradient checkpointing.
    """
    rows, context_length, model = {}, config.model.text.context_length, _model(config)
    packed, padded = _longest_captions(config, samples, stage), [context_length] * stage.micro_batch
    for checkpointing in (False, True):
        for name, lengths in (("packed", packed), (f"padded to {context_length}", padded)):
            model.set_grad_checkpointing(checkpointing)
            saved = measure_saved(model, lengths, precision=config.engine.precision, accelerator=not cluster.cpu)
            rows[f"{name}, {'checkpointed' if checkpointing else 'not checkpointed'}"] = saved
    return rows


def _model(config: TrainConfig) -> BiomedClip:
    """The trainer's model for a resolved configuration, without storage."""
    with torch.device("meta"):
        model = new_model(config)
    # Activations without storage cannot be offloaded, so checkpoint without offloading.
    model.set_grad_checkpointing(config.engine.grad_checkpointing)
    if config.patch_dropout_until < 1:
        # The last steps see complete images and need most memory.
        model.visual.patch_dropout = 0.0
    return model


def _stages(config: TrainConfig, samples: Samples, cluster: Cluster) -> list[Stage]:
    sampler = ShardSampler(
        [samples.count],
        "",
        batch_size=config.batch_size,
        schedule=config.batch_schedule,
        micro_batch_size=config.micro_batch_size,
        world_size=cluster.ranks,
    )
    num_steps = config.max_steps or sampler.num_batches_of(config.epochs)
    last = sampler.locate(num_steps - 1)[0]
    firsts = sorted({0, *(epoch for epoch, _ in config.batch_schedule)})
    stages = []
    for first, following in zip(firsts, [*firsts[1:], last + 1], strict=True):
        end = min(following, last + 1)
        count = min(num_steps, sampler.num_batches_of(end)) - sampler.num_batches_of(first) if end > first else 0
        if count > 0:
            stage = stage_of(config, samples, cluster, sampler.batch_size_of(first))
            stages.append(replace(stage, first_epoch=first, epochs=end - first, num_steps=count))
    return stages


def _flops(config: TrainConfig, samples: Samples, batch_size: int, has_micro_batches: bool) -> dict[str, float]:
    """Floating-point operations of a step over all ranks, by part."""
    lengths = samples.lengths(config.model.text.context_length)
    dropout, captions = config.model.vision.patch_dropout, config.model.decoder.layers > 0
    embedding, forward = (
        batch_size / len(lengths) * sum(forward_flops(config.model, lengths, dropout, captions=with_captions))
        for with_captions in (False, captions)
    )
    # A locked tower has no backward pass. The estimate ignores this.
    flops = {"forward": forward, "backward": 2 * forward}
    if has_micro_batches:
        # The first pass only embeds.
        flops |= {"forward": embedding, "replay": forward}
    if config.engine.grad_checkpointing:
        flops["recomputation"] = forward
    # Four matrix products: the similarities in the forward pass and again in the backward pass, and the products of
    # their gradient with both features. The sigmoid loss computes its gradient in the forward pass, with one product
    # less. The benchmarks count them in the same way.
    flops["loss"] = (3 if config.loss.kind == "siglip" else 4) * 2.0 * batch_size**2 * config.model.embed_dim
    teacher = _teacher(config, samples)
    # The teacher's similarities are computed in both passes of the loss.
    flops["loss"] += 2 * 2.0 * batch_size**2 * teacher.width
    if teacher.flops and not teacher.is_cached:
        flops["teacher"] = batch_size * teacher.flops
    return flops


def _memory(
    config: TrainConfig, model: BiomedClip, samples: Samples, cluster: Cluster, stage: Stage
) -> tuple[_Phases, _Phases]:
    """Bytes on the device and on the host. The host's are empty if the device is its CPU."""
    micro_batch, rank_batch = stage.micro_batch, stage.rank_batch
    has_micro_batches = micro_batch < rank_batch
    teacher = _teacher(config, samples)
    engine = EngineMemory.of(config, model, cluster, has_micro_batches)
    activations = measure_activations(
        model,
        _longest_captions(config, samples, stage),
        gradients=engine.gradients,
        precision=config.engine.precision,
        accelerator=not cluster.cpu,
    )
    pixels = 3 * config.model.vision.image_size**2
    # The images of a step wait on the host for GradCache's second pass, up to a limit, and the rest in a file.
    waiting_images = float(rank_batch * pixels)
    if has_micro_batches:
        waiting_images = min(waiting_images, (config.data.spool_above_mib << 20) + micro_batch * pixels)
    # In addition, the loader holds prefetched micro-batches, and one as it was read.
    prefetched = config.data.prefetch_batches * micro_batch * pixels
    loader = {"loader": waiting_images + prefetched + micro_batch * samples.image_bytes}
    copies = {"checkpoint": engine.checkpoint}
    # The last checkpoint of a run comes after the last step. Earlier ones are written while training goes on.
    overlap = copies if config.checkpoint.background and config.checkpoint.every_steps else {}
    towers = {"image tower's activations": activations.image, "text tower's activations": activations.text}
    if model.decoder is not None:
        towers["caption decoder's activations"] = activations.decoder
    features, similarities = _loss(config, cluster, rank_batch, stage.batch_size)
    temporary: float = activations.step - activations.saved
    if config.engine.precision == "fp8":
        temporary += cast_bytes(model.visual, micro_batch * config.image_tokens)
    on_host: dict[str, float] = {}
    if config.engine.offload_activations and not cluster.cpu:
        # autocast's half-precision copies of the layers' weights stay on the device.
        saved = activations.saved
        on_device = min(saved, sum(p.numel() for p in model.parameters()) * 2)
        on_host = {"activations": saved - on_device}
        towers = {"towers' activations": on_device}
    always: dict[str, float] = {**engine.always, "features": features}
    if config.loss.teacher:
        always["features"] += teacher.features(rank_batch, stage.batch_size, cluster.ranks)
    if not teacher.is_cached and teacher.weights:
        always["teacher"] = teacher.weights
    always["process"] = _PROCESS[config.engine.name] if cluster.cpu else _CUDA_DEVICE
    if has_micro_batches:
        phases = {
            "embedding": {**always, "temporary": activations.embed},
            "loss": {**always, "similarities": similarities},
        }
    else:
        phases = {"loss": {**always, **towers, "similarities": similarities}}
    phases["backward"] = {**always, **engine.backward, **towers, "temporary": temporary}
    phases["update"] = {**always, **engine.update}
    if config.loss.teacher:
        # It embeds a micro-batch before the towers do, or all samples before the first step.
        num_pairs = CHUNK if teacher.is_cached else micro_batch
        phases["teacher"] = {**always, "teacher": teacher.weights, "temporary": teacher.temporary(num_pairs)}
    if cluster.cpu:
        steps = {name: {**parts, **loader, **overlap} for name, parts in phases.items()}
        return {**steps, "checkpoint": {**always, **loader, **copies}}, {}
    for parts in phases.values():
        parts["batch"] = micro_batch * pixels
    host = {"process": float(_CUDA_HOST), **loader, **engine.offloaded, **on_host}
    return phases, {"step": {**host, **overlap}, "checkpoint": {**host, **copies}}


def _teacher(config: TrainConfig, samples: Samples) -> TeacherCost:
    return teacher_cost(config.loss, config.engine.precision, samples.lengths(max(samples.tokens)))


def _longest_captions(config: TrainConfig, samples: Samples, stage: Stage) -> list[int]:
    size = stage.micro_batch
    if config.micro_batch_tokens and size < stage.rank_batch:
        # The micro-batches of a rank have nearly equally many tokens, at most the budget.
        total = config.micro_batch_tokens - size * config.image_tokens
        total = max(size, min(total, size * config.model.text.context_length))
        return [total // size + (i < total % size) for i in range(size)]
    return samples.longest(config.model.text.context_length, stage.micro_batch, stage.batch_size, stage.num_steps)


def _loss(config: TrainConfig, cluster: Cluster, local_batch: int, global_batch: int) -> tuple[float, float]:
    """Bytes of the features and their gradients, and of a chunk of similarities and its gradient."""
    width, operand_bytes = config.model.embed_dim, 4 if config.engine.precision == "fp32" else 2
    rows = default_chunk_size(local_batch, global_batch, torch.device("cpu" if cluster.cpu else "cuda"))
    # The local features of both towers and their gradients are fp32. The texts of all ranks are operands, with an fp32
    # gradient.
    features = 4 * local_batch * width * 4
    if cluster.ranks > 1:
        features += global_batch * width * (operand_bytes + 4)
    return features, 2 * 4 * rows * global_batch
