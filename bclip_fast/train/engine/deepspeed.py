"""DeepSpeed's ZeRO. This is the only module that imports deepspeed."""

from __future__ import annotations

import atexit
import contextlib
import copy
import importlib
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bclip_fast import distributed
from bclip_fast.errors import UserError
from bclip_fast.model.packed import Packed
from bclip_fast.model.transformer import PreProjection
from bclip_fast.train.schedule import OptimConfig

from .base import Engine, Outputs, StepTensors, copy_to_cpu, persistent_buffers, to_cpu
from .config import EngineConfig
from .deepspeed_config import deepspeed_config
from .optimizer import (
    AdamW,
    GatedOptimizer,
    LossScale,
    OptimizerState,
    make_optimizer,
    refusal,
    scalar,
    set_learning_rate,
)

log = logging.getLogger(__name__)


class DeepSpeedEngine(Engine):
    """DeepSpeed with ZeRO stage 0 to 3. EngineConfig determines its JSON.

    The engine reads and writes the optimiser states by parameter, through DeepSpeed's tensor fragments. So they fit any
    stage and any number of ranks.
    """

    def __init__(
        self, model: nn.Module, config: EngineConfig, optim: OptimConfig, batch_size: int, device: torch.device
    ) -> None:
        self.device, self._model = device, model
        self._stage = config.zero_stage
        self._saved_statistics = [buffer.clone() for buffer in persistent_buffers(model).values()]
        self._clip = optim.grad_clip_norm
        self._shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        for parameter in model.parameters():
            # DeepSpeed sends parameters as bytes, and torch cannot view a scalar such as the logit scale as bytes.
            if parameter.ndim == 0:
                parameter.data = parameter.data.view(1)
        _ensure_process_group()
        deepspeed = _import_deepspeed()
        # Globals of the process: an fp32 engine would inherit the loss scaler of a half-precision engine.
        autocast: Any = importlib.import_module("deepspeed.runtime.torch_autocast")
        autocast.TORCH_AUTOCAST_INITIALIZED, autocast.TORCH_AUTOCAST_DTYPE = False, None
        self._linear = torch.nn.functional.linear
        optimizer = make_optimizer(model, optim, _cpu_adam() if config.cpu_adam == "deepspeed" else AdamW)
        if self._stage > 0 and not optimizer.is_elementwise:
            raise UserError(
                f"optim.name={optim.name} updates a parameter as a whole, but engine.zero_stage={self._stage} gives it "
                "shards; set engine.zero_stage=0 or engine.name=ddp"
            )
        with _quiet():
            deepspeed.init_distributed(dist_init_required=False, auto_mpi_discovery=False, verbose=False)
            settings = deepspeed_config(config, optim, batch_size)
            self._engine = deepspeed.initialize(
                model=model, optimizer=optimizer, config=settings, dist_init_required=False
            )[0]
        self.module = self._engine
        if self._stage == 3:
            self._separate_traces()
        self._scale = self._engine.torch_autocast_z0_gradscaler
        if self._stage > 0 and optimizer.creates_states:
            self._create_states({}, 0)
        if self._stage > 0 and config.precision == "fp16":
            # Under ZeRO, DeepSpeed's own GradScaler has two faults. It clips the gradient before it unscales it, and
            # each rank decides by the overflows in its shard. With an external scale, DeepSpeed unscales the norm and
            # the gradient before clipping. A norm that is not finite then skips the step on every rank.
            self._scale = LossScale()
            self._engine.optimizer.torch_autocast_gradscaler = None
            self._engine.optimizer.override_loss_scale(self._scale.value)

    def _separate_traces(self) -> None:
        """Give ZeRO 3 one trace of modules for passes with gradients, and one for passes without.

        DeepSpeed prefetches the weights by the trace of the last pass, from its forward to its backward pass. GradCache
        alternates passes with and without a backward pass. With one trace, each change would discard it, and then
        DeepSpeed prefetches nothing and gathers the small weights that it otherwise keeps.
        """
        with_gradients = self._engine.optimizer.parameter_offload.param_coordinator
        without = copy.copy(with_gradients)
        without._clear_trace_structures()
        self._coordinators = {True: with_gradients, False: without}

    @property
    def _flat_groups(self) -> list[Tensor]:
        """This rank's fp32 shards, which the wrapped AdamW updates under ZeRO 1 to 3."""
        zero = self._engine.optimizer
        return zero.fp32_partitioned_groups_flat if self._stage == 3 else zero.single_partition_of_fp32_groups

    def _create_states(self, numbers: Mapping[str, Tensor], num_steps: int) -> None:
        """Create the states of the shards: moments of zeros, and the numbers that a class of the user's keeps.

        DeepSpeed links the states to the parameters only once, during the first step. At that moment, all parameter
        groups except the first would still have no states.
        """
        wrapped = self._engine.optimizer.optimizer
        for flat in self._flat_groups:
            moments = {key: torch.zeros_like(flat.data) for key in wrapped.moments}
            wrapped.set_state(flat, num_steps, {**moments, **numbers})
        self._link_states()

    def _link_states(self) -> None:
        """Let DeepSpeed find the parts of the shards' states that belong to each parameter."""
        if self._stage < 3:
            self._engine.optimizer._hp_optimizer_states_linked = False
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def __call__(self, image: Tensor | PreProjection, text: Packed | PreProjection, **options: bool) -> Outputs:
        if self._stage == 3:
            self._engine.optimizer.parameter_offload.param_coordinator = self._coordinators[torch.is_grad_enabled()]
        output = self._engine(image, text, **options)
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

    def _start_step(self, lr: float, limit: float, allowed: Tensor | None) -> StepTensors:
        set_learning_rate(self._engine.optimizer, lr)
        if self._stage > 0:
            zero = self._engine.optimizer
            # DeepSpeed computes the norm inside `step`, before it calls the wrapped optimiser for each group.
            zero.optimizer.refusal = lambda: refusal(scalar(zero._global_grad_norm, self.device), limit, allowed)
            self._engine.step()
            norm = scalar(self._engine.get_global_grad_norm(), self.device)
            # DeepSpeed has read this flag: it calls no optimiser after an overflow.
            overflow = self._scale is not None and zero.overflow
            if self._scale is not None:
                self._scale.update(overflow)
                zero.override_loss_scale(self._scale.value)
            return StepTensors(norm, refusal(norm, limit, allowed), scalar(float(overflow), self.device))
        # Stage 0 is plain data parallelism: the gradients are unsharded, and DeepSpeed computes no norm.
        if self._scale:
            self._scale.unscale_(self._engine.optimizer)
        norm = nn.utils.clip_grad_norm_(self._model.parameters(), self._clip or float("inf"))
        refused = refusal(norm, limit, allowed)
        self._engine.optimizer.refusal = lambda: refused
        self._engine.step()
        overflow = self._engine.optimizer.overflow_of(refused)
        return StepTensors(norm, torch.maximum(refused, overflow), overflow)

    def model_state(self) -> dict[str, Tensor]:
        parameters = dict(self._model.named_parameters())
        state = {}
        for name, tensor in self._model.state_dict().items():
            if self._stage == 3 and name in parameters:
                tensor = self._gather(parameters[name])
            if distributed.is_main():
                state[name] = tensor.detach().to("cpu", copy=True).view(self._shapes.get(name, tensor.shape))
        return state

    def local_weights(self) -> dict[str, Tensor]:
        if self._stage < 3:
            return super().local_weights()
        parameters: Iterable[tuple[str, Any]] = self._model.named_parameters()
        weights = {name: part.ds_tensor.detach() for name, part in parameters if part.requires_grad}
        return weights | self._statistics_after_update()

    def local_shard(self, name: str, tensor: Tensor) -> Tensor:
        if self._stage < 3 or name not in self._shapes:
            return super().local_shard(name, tensor)
        parameter: Any = self._model.get_parameter(name)
        return _zero3_shard(tensor.to(parameter.ds_tensor.device, torch.float32), parameter).clone()

    def gather_weights(self, shards: Mapping[str, Tensor]) -> dict[str, Tensor]:
        weights = {}
        for name, tensor in shards.items():
            shape = self._shapes.get(name, tensor.shape)
            if self._stage == 3 and name in self._shapes:
                # With offloaded parameters, the shard is on the host, and NCCL sends only from a GPU.
                tensor = tensor.to(self.device)
                parts = [torch.empty_like(tensor) for _ in range(distributed.world_size())]
                dist.all_gather(parts, tensor)
                tensor = torch.cat(parts)[: shape.numel()]
            if distributed.is_main():
                weights[name] = to_cpu(tensor).view(shape)
        return weights

    def _gather(self, parameter: nn.Parameter) -> Tensor:
        """A gathered parameter of ZeRO 3. DeepSpeed has no fp32 copy of a locked parameter beside its shards."""
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_get_full_fp32_param

        if parameter.requires_grad:
            return safe_get_full_fp32_param(parameter)
        with GatheredParameters([parameter]):
            return parameter.detach().clone()

    def optimizer_state(self) -> OptimizerState:
        from deepspeed.utils import safe_get_full_optimizer_state

        moments: dict[str, dict[str, Tensor]] = {}
        wrapped = self._engine.optimizer.optimizer if self._stage > 0 else self._engine.optimizer
        # The numbers of a class of the user's depend on no element, so they are equal in all shards.
        shard: dict[str, Tensor] = wrapped.saved_state(self._flat_groups[0]) if self._stage > 0 else {}
        numbers = {key: tensor for key, tensor in shard.items() if key not in wrapped.moments}
        if self._stage > 0 and not wrapped.creates_states:
            self._link_states()
        for name, parameter in self._model.named_parameters():
            if not parameter.requires_grad:
                continue
            if self._stage > 0:
                keys = [key for key in wrapped.moments if key in shard]
                state = {key: safe_get_full_optimizer_state(parameter, key) for key in keys} | numbers
            else:
                state = wrapped.saved_state(parameter)
            if distributed.is_main() and state:
                # The logit scale has one dimension here, and none in the model.
                moments[name] = {
                    key: copy_to_cpu(tensor).view(self._shapes[name] if key in wrapped.moments else tensor.shape)
                    for key, tensor in state.items()
                }
        return OptimizerState(wrapped.num_updates, moments, self._scale.state_dict() if self._scale else {})

    def load_optimizer_state(self, state: OptimizerState) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        wrapped = self._engine.optimizer.optimizer if self._stage > 0 else self._engine.optimizer
        if self._stage > 0 and (state.moments or wrapped.creates_states):
            first = next(iter(state.moments.values()), {})
            numbers = {key: tensor for key, tensor in first.items() if key not in wrapped.moments}
            self._create_states(numbers, state.num_steps)
        for name, parameter in self._model.named_parameters():
            if name not in state.moments:
                continue
            saved = {key: tensor.to(self.device) for key, tensor in state.moments[name].items()}
            moments = {key: tensor for key, tensor in saved.items() if key in wrapped.moments}
            if self._stage == 3:
                for key, tensor in moments.items():
                    safe_set_local_optimizer_state(parameter, _zero3_shard(tensor, parameter), key)
            elif self._stage > 0:
                for key, tensor in moments.items():
                    safe_set_full_optimizer_state(parameter, tensor, key)
            else:
                moments = {key: tensor.view_as(parameter) for key, tensor in moments.items()}
                wrapped.set_state(parameter, state.num_steps, saved | moments)
        if self._scale and state.loss_scale:
            self._scale.load_state_dict(state.loss_scale)
            if self._stage > 0:
                self._engine.optimizer.override_loss_scale(self._scale.value)

    def close(self) -> None:
        self._engine.destroy()
        # ZeRO 3's stays in the process and can be neither traced nor exported.
        torch.nn.functional.linear = self._linear


def _cpu_adam() -> Callable[..., GatedOptimizer]:
    """The class of DeepSpeed's AdamW for weights on the host, compiled if necessary."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam
    from deepspeed.ops.op_builder import CPUAdamBuilder

    try:
        with _quiet():
            CPUAdamBuilder().load()
    except Exception as error:
        raise UserError(
            f"engine.cpu_adam=deepspeed: its kernel cannot be compiled: {error}; install a C++ compiler and ninja, set "
            f"TORCH_EXTENSIONS_DIR to a writable folder, or set engine.cpu_adam=torch"
        ) from error

    class CpuAdamW(GatedOptimizer, DeepSpeedCPUAdam):
        takes_found_inf = False

        def step(self, closure: Any = None) -> Any:
            # The kernel multiplies the powers of the betas from step to step. After a resume it computes them with
            # `pow`, which rounds differently. A new kernel object for each step always uses `pow`.
            self.ds_opt_adam.create_adam(self.opt_id, 0.0, *self.defaults["betas"], 0.0, 0.0, True, False)
            return super().step(closure)

    return CpuAdamW


def _zero3_shard(tensor: Tensor, parameter: Any) -> Tensor:
    """This rank's shard of a gathered tensor under ZeRO 3, padded to equal sizes.

    DeepSpeed's own setter assumes that the size is a multiple of the number of ranks.
    """
    flat, length = tensor.flatten(), parameter.ds_tensor.numel()
    flat = nn.functional.pad(flat, (0, length * distributed.world_size() - flat.numel()))
    return flat.narrow(0, length * distributed.rank(), length)


def _ensure_process_group() -> None:
    """Create a process group of one rank if no launcher created a group. DeepSpeed needs it until the process ends."""
    # DeepSpeed requires this variable, which only launchers set.
    os.environ.setdefault("LOCAL_RANK", str(distributed.local_rank()))
    if dist.is_initialized():
        return
    dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1, **distributed.group_options())
    atexit.register(distributed.shutdown)


def _import_deepspeed() -> Any:
    # DeepSpeed's logger has its own handler on stdout and writes a lot during the import.
    with _quiet():
        try:
            import deepspeed
        except ImportError as error:
            problem = f"engine.name=deepspeed: {error}; pip install 'bclip_fast[train]', or set engine.name=ddp"
            raise UserError(problem) from error
    # With a C++ compiler, DeepSpeed would now compile shared-memory collectives for a minute. gloo is enough.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed calls collectives by names for which newer torch releases print a warning at every call.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    return deepspeed


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Send DeepSpeed's output on stdout to our log at level DEBUG, and ignore its warnings."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    if text := printed.getvalue().strip():
        log.debug("%s", text)
