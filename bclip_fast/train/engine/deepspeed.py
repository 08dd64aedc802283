"""What differs between DeepSpeed and plain PyTorch, behind one small interface; the only import of deepspeed.

Both engines keep fp32 parameters and compute under autocast, take the same optimiser, and give the same optimiser
state by parameter name. So a checkpoint knows neither the engine, nor the ZeRO stage, nor the number of ranks.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import io
import logging
import math
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bclip_fast import distributed
from bclip_fast.errors import UserError
from bclip_fast.model.packed import Packed
from bclip_fast.model.transformer import PreProjection
from bclip_fast.train.precision import resolve
from bclip_fast.train.schedule import OptimConfig

from .malloc import keep_freed_memory
from .optimizer import AdamW, Guarded, LossScale, OptimizerState, is_within, make_optimizer, set_learning_rate

log = logging.getLogger(__name__)

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class EngineConfig:
    """How the model is spread over the ranks and in which precision it computes."""

    name: Literal["deepspeed", "ddp"] = "deepspeed"
    zero_stage: Literal[0, 1, 2, 3] = 1
    """What DeepSpeed shards: 1 optimiser states, 2 also gradients, 3 also parameters; 0 nothing."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of the computation; parameters, gradients and optimiser states are fp32. auto: bf16 if the devices of all ranks
    multiply it in hardware, else fp32. config.toml of the run records the choice, and --resume keeps it."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    offload_activations: bool = False
    """What grad_checkpointing keeps of a layer, its input, waits on the host until the layer's backward pass."""
    offload_optimizer: bool = False
    """ZeRO 1 to 3 on a GPU: AdamW with its states and the fp32 shards it updates are on the host: 12 bytes a weight."""
    cpu_adam: Literal["torch", "deepspeed"] = "torch"
    """Whose AdamW updates weights on the host: torch's fused one or, with name deepspeed, DeepSpeed's, measured equally
    fast, which a C++ compiler and ninja make at its first use; TORCH_EXTENSIONS_DIR keeps it."""
    offload_parameters: bool = False
    """ZeRO 3 on a GPU: the shards of the parameters wait on the host as well."""
    compile: bool = False
    """Have torch.compile make a graph of each transformer layer: minutes at the start, a C++ compiler on a CPU."""
    cuda_graphs: bool = False
    """With compile on a GPU: the layers of the image tower, whose shapes stay, are replayed as CUDA graphs."""
    bucket_mib: int = 64
    """Gradients are communicated in pieces of this size; under ZeRO 3 that much of the weights is fetched ahead."""

    def __post_init__(self) -> None:
        if self.bucket_mib < 1:
            raise UserError(f"engine.bucket_mib={self.bucket_mib}: must be at least 1")
        stage = self.zero_stage if self.name == "deepspeed" else 0
        for option, lowest in (("offload_optimizer", 1), ("offload_parameters", 3)):
            if getattr(self, option) and stage < lowest:
                raise UserError(f"engine.{option}: only with engine.name deepspeed, zero_stage {lowest} or higher")
        if self.cpu_adam == "deepspeed" and self.name != "deepspeed":
            raise UserError("engine.cpu_adam deepspeed: only with engine.name deepspeed")
        if self.cuda_graphs and (not self.compile or self.grad_checkpointing):
            raise UserError("engine.cuda_graphs: only with engine.compile, and without engine.grad_checkpointing")
        if self.offload_activations and not self.grad_checkpointing:
            raise UserError("engine.offload_activations: only with engine.grad_checkpointing")
        if self.name == "deepspeed" and self.zero_stage == 3 and self.compile:
            raise UserError("engine.compile with engine.zero_stage 3: its parameters come and go; use a lower stage")


@dataclass(frozen=True)
class StepResult:
    """`grad_norm`: of the whole averaged gradient before clipping. `skipped`: nothing was updated, for the norm is
    above the limit or not finite; `overflow`: because fp16's loss scale was too large, and is smaller now."""

    grad_norm: float
    skipped: bool
    overflow: bool = False


class Engine(ABC):
    """One training step is `engine(image, text)`, a loss, `backward(loss)` or `accumulate`, and `step(lr, limit)`."""

    device: torch.device
    module: nn.Module
    """What runs forward; parameters may be sharded or renamed by a prefix inside."""
    _model: nn.Module
    _before: list[Tensor]
    """The model's buffers after the last update. Each rank's are its own: training reads them nowhere."""

    def __call__(self, image: Tensor | PreProjection, text: Packed | PreProjection) -> dict[str, Tensor]:
        return self.module(image, text)

    def pooled(self) -> tuple[Tensor | None, Tensor | None]:
        """(b, width) each: what image and text tower projected last, where all before the projection is locked."""
        model: Any = self._model
        return model.visual.pre_projection, model.text.pre_projection

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Gradients of the loss, averaged over ranks."""

    @abstractmethod
    def accumulate(self, losses: Sequence[Callable[[], Tensor]]) -> None:
        """Gradients of the sum of the losses, averaged over ranks.

        Each function runs forward and gives its loss () when the one before it has gone backward. Gradients are
        communicated once, at the end, and lie whole on each rank until then, under ZeRO 2 and 3 too.
        """

    def trained(self, prefix: str) -> bool:
        """Whether a parameter of the model whose name begins so takes gradients."""
        return any(part.requires_grad for name, part in self._model.named_parameters() if name.startswith(prefix))

    def step(self, lr: float, limit: float = math.inf) -> StepResult:
        """Clip, update with learning rate `lr`, clear the gradients; no update where their norm isn't finite, or is
        above `limit`, which is the same on all ranks. Then batch norms' statistics are those before the step, too."""
        result = self._step(lr, limit)
        if buffers := list(self._model.buffers()):
            torch._foreach_copy_(*((buffers, self._before) if result.skipped else (self._before, buffers)))
        return result

    @abstractmethod
    def _step(self, lr: float, limit: float) -> StepResult:
        """`step` of the weights."""

    def communication(self) -> dict[str, float]:
        """communication_seconds: what the last backward pass but one waited for gradients of other ranks beyond its own
        work, where that is known without making anything wait; DeepSpeed doesn't tell."""
        return {}

    @abstractmethod
    def model_state(self) -> dict[str, Tensor]:
        """The whole fp32 model on the CPU, under the model's own names; empty except on rank 0. Collective.

        Its buffers, statistics of batch norms, are those of rank 0."""

    def own_weights(self) -> dict[str, Tensor]:
        """Of the trained fp32 weights those of which this rank keeps the average: all on rank 0, but for ZeRO 3. And
        the buffers, of which it is kept likewise."""
        if not distributed.is_main():
            return {}
        weights = {name: part.detach() for name, part in self._model.named_parameters() if part.requires_grad}
        return weights | dict(self._model.named_buffers())

    def own_part(self, name: str, whole: Tensor) -> Tensor:
        """What `own_weights` has of a whole tensor like the weight of that name."""
        weight = attrgetter(name)(self._model)
        return whole.to(weight.device, torch.float32, copy=True).view_as(weight)

    def whole_weights(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors like `own_weights()` put together, on the CPU; empty except on rank 0. Collective."""
        return {name: _to_cpu(tensor) for name, tensor in own.items()}

    @abstractmethod
    def optimizer_state(self) -> OptimizerState:
        """Collective; the moments are empty except on rank 0."""

    @abstractmethod
    def load_optimizer_state(self, state: OptimizerState) -> None:
        """Takes `optimizer_state()` back; every rank gives the whole. The model is loaded before the engine is made."""

    @abstractmethod
    def close(self) -> None:
        """Frees what the engine holds; it cannot be used afterwards."""


def make(model: nn.Module, config: EngineConfig, optim: OptimConfig, batch_size: int) -> Engine:
    """Wraps `model`, whose parameters are the same on all ranks, for a global batch of `batch_size`."""
    device, config = distributed.device(), replace(config, precision=resolve(config.precision))
    for option in ("offload_optimizer", "offload_parameters", "cuda_graphs"):
        if device.type == "cpu" and getattr(config, option):
            raise UserError(f"engine.{option}: there is no GPU here; leave it out")
    if device.type == "cuda" and config.cpu_adam == "deepspeed" and not config.offload_optimizer:
        raise UserError("engine.cpu_adam deepspeed: without engine.offload_optimizer weights are updated on the GPU")
    if device.type == "cpu":
        keep_freed_memory()
    if config.grad_checkpointing:
        model.set_grad_checkpointing(True, config.offload_activations)  # type: ignore[operator]
    if config.compile:
        model.compile_layers(config.cuda_graphs)  # type: ignore[operator]
    engine = DeepSpeedEngine if config.name == "deepspeed" else PlainEngine
    return engine(model.to(device), config, optim, batch_size, device)


def _cpu_adam() -> Callable[..., Guarded]:
    """DeepSpeed's AdamW for weights on the host."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam
    from deepspeed.ops.op_builder import CPUAdamBuilder

    try:
        with _quiet():
            CPUAdamBuilder().load()
    except Exception as error:
        raise UserError(
            f"engine.cpu_adam=deepspeed: its kernel can't be made: {error}; it takes a C++ compiler, ninja and a "
            f"folder to write to, TORCH_EXTENSIONS_DIR; or use engine.cpu_adam=torch"
        ) from error

    class CpuAdamW(Guarded, DeepSpeedCPUAdam):
        def step(self, closure: Any = None) -> Any:
            # It carries powers of the betas on; a resume computes them, which rounds otherwise: begin each time anew.
            self.ds_opt_adam.create_adam(self.opt_id, 0.0, *self.defaults["betas"], 0.0, 0.0, True, False)
            return super().step(closure)

    return CpuAdamW


def _to_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True)


class PlainEngine(Engine):
    """DistributedDataParallel, or the bare model where there is one process."""

    def __init__(
        self, model: nn.Module, config: EngineConfig, optim: OptimConfig, batch_size: int, device: torch.device
    ) -> None:
        self.device, self._model = device, model
        self._optimizer = make_optimizer(model, optim)
        self._clip = optim.grad_clip_norm
        self._dtype = _DTYPES[config.precision]
        self._scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        self._num_steps = 0
        self._before = [buffer.clone() for buffer in model.buffers()]
        self.module = model
        if distributed.world_size() > 1:
            self.module = nn.parallel.DistributedDataParallel(
                model,
                device_ids=[device.index] if device.type == "cuda" else None,
                bucket_cap_mb=config.bucket_mib,
                gradient_as_bucket_view=True,
            )
            # Rank 0's are the model's, whether it sends them to the others before each pass or not. The argument of
            # that name is deprecated.
            self.module.broadcast_buffers = False
            # Said of convolutions of side 1, whose two layouts are the same bytes.
            warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides", UserWarning)
            if device.type == "cpu":
                # On a GPU its timers wait for events, so there it stays with every hundredth step.
                self.module._set_ddp_runtime_logging_sample_rate(1)

    def communication(self) -> dict[str, float]:
        wrapped: Any = self.module
        found = wrapped._get_ddp_logging_data() if wrapped is not self._model else {}
        if "backward_comm_time" not in found:
            return {}
        waited = found["backward_comm_time"] - found["backward_compute_comm_overlap_time"]
        return {"communication_seconds": max(0, waited) / 1e9}

    def __call__(self, image: Tensor | PreProjection, text: Packed | PreProjection) -> dict[str, Tensor]:
        with torch.autocast(self.device.type, self._dtype, enabled=self._dtype != torch.float32):
            return self.module(image, text)

    def backward(self, loss: Tensor) -> None:
        self._scaler.scale(loss).backward()

    def accumulate(self, losses: Sequence[Callable[[], Tensor]]) -> None:
        over_ranks = self.module if isinstance(self.module, nn.parallel.DistributedDataParallel) else None
        if over_ranks is None:
            # Side by side: made by the first backward pass they leave holes among the activations that come and go.
            for parameter in self._model.parameters():
                if parameter.requires_grad and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        for number, loss in enumerate(losses, start=1):
            with over_ranks.no_sync() if over_ranks and number < len(losses) else contextlib.nullcontext():
                self.backward(loss())

    def _step(self, lr: float, limit: float) -> StepResult:
        set_learning_rate(self._optimizer, lr)
        self._scaler.unscale_(self._optimizer)
        norm = float(nn.utils.clip_grad_norm_(self._model.parameters(), self._clip or float("inf")))
        allowed = is_within(norm, limit)
        self._optimizer.allowed = lambda: allowed
        scale = self._scaler.get_scale()
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        overflow = self._scaler.get_scale() < scale
        skipped = overflow or not allowed
        self._num_steps += not skipped
        return StepResult(norm, skipped, overflow)

    def model_state(self) -> dict[str, Tensor]:
        if not distributed.is_main():
            return {}
        return {name: tensor.detach().cpu().clone() for name, tensor in self._model.state_dict().items()}

    def optimizer_state(self) -> OptimizerState:
        moments = {}
        if distributed.is_main():
            for name, parameter in self._model.named_parameters():
                if state := self._optimizer.state.get(parameter):
                    moments[name] = {key: _to_cpu(state[key]) for key in _MOMENTS}
        return OptimizerState(self._num_steps, moments, self._scaler.state_dict())

    def load_optimizer_state(self, state: OptimizerState) -> None:
        for name, parameter in self._model.named_parameters():
            if name in state.moments:
                moments = {key: tensor.to(parameter.device) for key, tensor in state.moments[name].items()}
                self._optimizer.set_state(parameter, state.num_steps, moments)
        self._num_steps = state.num_steps
        if state.loss_scale and self._scaler.is_enabled():
            self._scaler.load_state_dict(state.loss_scale)

    def close(self) -> None:
        self.module = self._model


class DeepSpeedEngine(Engine):
    """DeepSpeed with ZeRO stage 0 to 3; its JSON is derived from EngineConfig.

    Optimiser states are read and written through DeepSpeed's tensor fragments, by parameter, so they fit any stage and
    number of ranks.
    """

    def __init__(
        self, model: nn.Module, config: EngineConfig, optim: OptimConfig, batch_size: int, device: torch.device
    ) -> None:
        self.device, self._model = device, model
        self._stage = config.zero_stage
        self._before = [buffer.clone() for buffer in model.buffers()]
        self._clip = optim.grad_clip_norm
        self._shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        for parameter in model.parameters():
            # DeepSpeed sends parameters as bytes, and torch cannot view a scalar, such as the logit scale, as bytes.
            if parameter.ndim == 0:
                parameter.data = parameter.data.view(1)
        _ensure_group()
        deepspeed = _import_deepspeed()
        # Globals of the process: an engine in half precision would leave the next fp32 one with its loss scaler.
        autocast: Any = importlib.import_module("deepspeed.runtime.torch_autocast")
        autocast.TORCH_AUTOCAST_INITIALIZED, autocast.TORCH_AUTOCAST_DTYPE = False, None
        optimizer = make_optimizer(model, optim, _cpu_adam() if config.cpu_adam == "deepspeed" else AdamW)
        with _quiet():
            deepspeed.init_distributed(dist_init_required=False, auto_mpi_discovery=False, verbose=False)
            self._engine = deepspeed.initialize(
                model=model,
                optimizer=optimizer,
                config=deepspeed_config(config, optim, batch_size),
                dist_init_required=False,
            )[0]
        self.module = self._engine
        self._scale = self._engine.torch_autocast_z0_gradscaler
        if self._stage > 0:
            self._create_states(0)
        if self._stage > 0 and config.precision == "fp16":
            # Under ZeRO DeepSpeed's autocast takes a GradScaler that clips the gradient before it unscales it, and that
            # each rank steps by what overflowed in its own shard of a group. A scale from outside is divided out of the
            # norm and of the gradient before clipping, and a norm that isn't finite skips the step on every rank.
            self._scale = LossScale()
            self._engine.optimizer.torch_autocast_gradscaler = None
            self._engine.optimizer.override_loss_scale(self._scale.value)

    @property
    def _flat_groups(self) -> list[Tensor]:
        """The fp32 shards of this rank that the wrapped AdamW updates, under ZeRO 1 to 3."""
        zero = self._engine.optimizer
        return zero.fp32_partitioned_groups_flat if self._stage == 3 else zero.single_partition_of_fp32_groups

    def _create_states(self, num_steps: int) -> None:
        """AdamW's states before its first step: DeepSpeed links them to the parameters once, at that step, when the
        states of all but the first parameter group would still be missing."""
        zero = self._engine.optimizer
        for flat in self._flat_groups:
            zero.optimizer.set_state(flat, num_steps, {key: torch.zeros_like(flat.data) for key in _MOMENTS})
        if self._stage < 3:
            zero._lazy_init_hp_params_optimizer_state()

    def __call__(self, image: Tensor | PreProjection, text: Packed | PreProjection) -> dict[str, Tensor]:
        output = self._engine(image, text)
        scalars = {name: output[name].view(()) for name in ("logit_scale", "logit_bias") if name in output}
        return {**output, **scalars}

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    def accumulate(self, losses: Sequence[Callable[[], Tensor]]) -> None:
        if self._stage > 0:
            with self._engine.coalesce_grad_reduction():
                for loss in losses:
                    self.backward(loss())
            return
        for number, loss in enumerate(losses, start=1):
            with self._engine.no_sync() if number < len(losses) else contextlib.nullcontext():
                self.backward(loss())

    def _step(self, lr: float, limit: float) -> StepResult:
        set_learning_rate(self._engine.optimizer, lr)
        if self._stage > 0:
            zero = self._engine.optimizer
            # The norm is taken inside, before the wrapped optimiser steps, group after group.
            zero.optimizer.allowed = lambda: is_within(float(zero._global_grad_norm), limit)
            self._engine.step()
            norm, overflow = float(self._engine.get_global_grad_norm()), self._scale is not None and zero.overflow
            if self._scale is not None:
                self._scale.update(overflow)
                zero.override_loss_scale(self._scale.value)
            return StepResult(norm, not is_within(norm, limit), overflow)
        # Stage 0 is plain data parallelism: the gradients lie whole in the parameters, and DeepSpeed takes no norm.
        scaler = self._scale
        scale = scaler.get_scale() if scaler else 1.0
        if scaler:
            scaler.unscale_(self._engine.optimizer)
        norm = float(nn.utils.clip_grad_norm_(self._model.parameters(), self._clip or float("inf")))
        allowed = is_within(norm, limit)
        self._engine.optimizer.allowed = lambda: allowed
        self._engine.step()
        overflow = bool(scaler) and scaler.get_scale() < scale
        return StepResult(norm, overflow or not allowed, overflow)

    def model_state(self) -> dict[str, Tensor]:
        parameters = dict(self._model.named_parameters())
        state = {}
        for name, tensor in self._model.state_dict().items():
            if self._stage == 3 and name in parameters:
                tensor = self._gather(parameters[name])
            if distributed.is_main():
                state[name] = tensor.detach().to("cpu", copy=True).view(self._shapes.get(name, tensor.shape))
        return state

    def own_weights(self) -> dict[str, Tensor]:
        if self._stage < 3:
            return super().own_weights()
        parameters: Iterable[tuple[str, Any]] = self._model.named_parameters()
        weights = {name: part.ds_tensor.detach() for name, part in parameters if part.requires_grad}
        return weights | dict(self._model.named_buffers())

    def own_part(self, name: str, whole: Tensor) -> Tensor:
        if self._stage < 3 or name not in self._shapes:
            return super().own_part(name, whole)
        parameter: Any = self._model.get_parameter(name)
        return _own_shard(whole.to(parameter.ds_tensor.device, torch.float32), parameter).clone()

    def whole_weights(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        whole = {}
        for name, tensor in own.items():
            shape = self._shapes.get(name, tensor.shape)
            if self._stage == 3 and name in self._shapes:
                parts = [torch.empty_like(tensor) for _ in range(distributed.world_size())]
                dist.all_gather(parts, tensor.to(self.device))
                tensor = torch.cat(parts)[: shape.numel()]
            if distributed.is_main():
                whole[name] = _to_cpu(tensor).view(shape)
        return whole

    def _gather(self, parameter: nn.Parameter) -> Tensor:
        """A parameter of ZeRO 3, whole; for one that isn't trained DeepSpeed has no fp32 copy beside its own shards."""
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_get_full_fp32_param

        if parameter.requires_grad:
            return safe_get_full_fp32_param(parameter)
        with GatheredParameters([parameter]):
            return parameter.detach().clone()

    def optimizer_state(self) -> OptimizerState:
        from deepspeed.utils import safe_get_full_optimizer_state

        moments: dict[str, dict[str, Tensor]] = {}
        num_steps = 0
        wrapped = self._engine.optimizer.optimizer if self._stage > 0 else self._engine.optimizer
        for state in wrapped.state.values():
            num_steps = int(state["step"])
        for name, parameter in self._model.named_parameters():
            if not parameter.requires_grad:
                continue
            if self._stage > 0:
                whole = {key: safe_get_full_optimizer_state(parameter, key) for key in _MOMENTS}
            elif parameter in wrapped.state:
                whole = {key: wrapped.state[parameter][key] for key in _MOMENTS}
            else:
                continue
            if distributed.is_main():
                moments[name] = {key: _to_cpu(tensor).view(self._shapes[name]) for key, tensor in whole.items()}
        return OptimizerState(num_steps, moments, self._scale.state_dict() if self._scale else {})

    def load_optimizer_state(self, state: OptimizerState) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self._stage > 0:
            self._create_states(state.num_steps)
            if self._stage < 3:
                self._engine.optimizer._hp_optimizer_states_linked = False
                self._engine.optimizer._lazy_init_hp_params_optimizer_state()
        for name, parameter in self._model.named_parameters():
            if name not in state.moments:
                continue
            moments = {key: tensor.to(self.device) for key, tensor in state.moments[name].items()}
            if self._stage == 3:
                for key, tensor in moments.items():
                    safe_set_local_optimizer_state(parameter, _own_shard(tensor, parameter), key)
            elif self._stage > 0:
                for key, tensor in moments.items():
                    safe_set_full_optimizer_state(parameter, tensor, key)
            else:
                moments = {key: tensor.view_as(parameter) for key, tensor in moments.items()}
                self._engine.optimizer.set_state(parameter, state.num_steps, moments)
        if self._scale and state.loss_scale:
            self._scale.load_state_dict(state.loss_scale)
            if self._stage > 0:
                self._engine.optimizer.override_loss_scale(self._scale.value)

    def close(self) -> None:
        self._engine.destroy()


def _own_shard(tensor: Tensor, parameter: Any) -> Tensor:
    """This rank's part under ZeRO 3, padded: DeepSpeed's own setter forgets that sizes may not divide by the ranks."""
    flat, length = tensor.flatten(), parameter.ds_tensor.numel()
    flat = nn.functional.pad(flat, (0, length * distributed.world_size() - flat.numel()))
    return flat.narrow(0, length * distributed.rank(), length)


def deepspeed_config(config: EngineConfig, optim: OptimConfig, batch_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration for a global batch of `batch_size`, without gradient accumulation."""
    bucket = config.bucket_mib * (1 << 20) // 4
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if config.zero_stage > 0:
        zero.update(reduce_bucket_size=bucket, allgather_bucket_size=bucket)
    if config.zero_stage == 3:
        zero.update(stage3_prefetch_bucket_size=bucket, sub_group_size=1 << 30)
        # By default weights stay gathered until the backward pass, and what it needs is fetched ahead without end.
        zero.update(stage3_max_reuse_distance=0, stage3_max_live_parameters=bucket)
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if config.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_batch_size": batch_size,
        "train_micro_batch_size_per_gpu": batch_size // distributed.world_size(),
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optim.grad_clip_norm if config.zero_stage > 0 else 0.0,
        "steps_per_print": None,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # Autocast as in plain PyTorch; the empty list keeps gradients fp32 on the wire.
        "torch_autocast": {
            "enabled": config.precision != "fp32",
            "dtype": str(_DTYPES[config.precision]).removeprefix("torch."),
            "lower_precision_safe_modules": [],
        },
    }


def _ensure_group() -> None:
    """A group of one where no launcher made any; DeepSpeed needs one, and keeps it until the process ends."""
    # DeepSpeed insists on the variable, which only launchers set.
    os.environ.setdefault("LOCAL_RANK", str(distributed.local_rank()))
    if dist.is_initialized():
        return
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    atexit.register(distributed.shutdown)


def _import_deepspeed() -> Any:
    # Its logger has a handler of its own on stdout, and says a good deal while it is imported.
    with _quiet():
        try:
            import deepspeed
        except ImportError as error:
            raise UserError(
                f"engine.name=deepspeed: {error}; pip install 'bclip_fast[train]' or use engine.name ddp"
            ) from error
    # Its shared-memory collectives for CPUs would be compiled now, for a minute, if a compiler is there; gloo serves.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # It calls collectives by names that newer torch releases deprecate, with a warning at every call.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    return deepspeed


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Sends what is printed to our log at DEBUG."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    if text.getvalue().strip():
        log.debug("%s", text.getvalue().strip())
