"""Plain PyTorch: DistributedDataParallel, or the bare model in a single process."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bclip_fast import distributed
from bclip_fast.model.packed import Packed
from bclip_fast.model.transformer import PreProjection
from bclip_fast.train.schedule import OptimConfig

from .base import Engine, Outputs, StepTensors, copy_to_cpu, persistent_buffers
from .config import DTYPES, EngineConfig
from .optimizer import OptimizerState, make_optimizer, refusal, set_learning_rate


class DdpEngine(Engine):
    """DistributedDataParallel, or the bare model in a single process."""

    def __init__(
        self, model: nn.Module, config: EngineConfig, optim: OptimConfig, batch_size: int, device: torch.device
    ) -> None:
        self.device, self._model = device, model
        self._optimizer = make_optimizer(model, optim)
        self._clip = optim.grad_clip_norm
        self._dtype = DTYPES[config.precision]
        self._scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        self._saved_statistics = [buffer.clone() for buffer in persistent_buffers(model).values()]
        self.module = model
        if distributed.world_size() > 1:
            self.module = nn.parallel.DistributedDataParallel(
                model,
                device_ids=[device.index] if device.type == "cuda" else None,
                bucket_cap_mb=config.bucket_mib,
                gradient_as_bucket_view=True,
            )
            # A checkpoint holds rank 0's buffers, so a broadcast before each pass would change nothing. The argument
            # of this name is deprecated.
            self.module.broadcast_buffers = False
            # DDP warns about 1 x 1 convolutions, for which both memory formats are the same bytes.
            warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides", UserWarning)
            if device.type == "cpu":
                # On a GPU the timers wait for events, so DDP keeps its default there: every hundredth step.
                self.module._set_ddp_runtime_logging_sample_rate(1)

    def communication(self) -> dict[str, float]:
        wrapped: Any = self.module
        logged = wrapped._get_ddp_logging_data() if wrapped is not self._model else {}
        if "backward_comm_time" not in logged:
            return {}
        waited = logged["backward_comm_time"] - logged["backward_compute_comm_overlap_time"]
        return {"communication_seconds": max(0, waited) / 1e9}

    def __call__(self, image: Tensor | PreProjection, text: Packed | PreProjection, **options: bool) -> Outputs:
        with torch.autocast(self.device.type, self._dtype, enabled=self._dtype != torch.float32):
            return self.module(image, text, **options)

    def backward(self, loss: Tensor) -> None:
        self._scaler.scale(loss).backward()

    def accumulate(self, losses: Sequence[Callable[[], Tensor]]) -> None:
        ddp = self.module if isinstance(self.module, nn.parallel.DistributedDataParallel) else None
        if ddp is None:
            # Allocate the gradients side by side. If the first backward pass allocated them, they would leave holes
            # among the activations.
            for parameter in self._model.parameters():
                if parameter.requires_grad and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        for number, loss in enumerate(losses, start=1):
            with ddp.no_sync() if ddp and number < len(losses) else contextlib.nullcontext():
                self.backward(loss())

    def _start_step(self, lr: float, limit: float, allowed: Tensor | None) -> StepTensors:
        set_learning_rate(self._optimizer, lr)
        self._scaler.unscale_(self._optimizer)
        norm = nn.utils.clip_grad_norm_(self._model.parameters(), self._clip or float("inf"))
        refused = refusal(norm, limit, allowed)
        self._optimizer.refusal = lambda: refused
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        overflow = self._optimizer.overflow_of(refused)
        return StepTensors(norm, torch.maximum(refused, overflow), overflow)

    def model_state(self) -> dict[str, Tensor]:
        if not distributed.is_main():
            return {}
        return {name: tensor.detach().cpu().clone() for name, tensor in self._model.state_dict().items()}

    def optimizer_state(self) -> OptimizerState:
        moments = {}
        if distributed.is_main():
            for name, parameter in self._model.named_parameters():
                if state := self._optimizer.saved_state(parameter):
                    moments[name] = {key: copy_to_cpu(tensor) for key, tensor in state.items()}
        return OptimizerState(self._optimizer.num_updates, moments, self._scaler.state_dict())

    def load_optimizer_state(self, state: OptimizerState) -> None:
        for name, parameter in self._model.named_parameters():
            if name in state.moments:
                moments = {key: tensor.to(parameter.device) for key, tensor in state.moments[name].items()}
                self._optimizer.set_state(parameter, state.num_steps, moments)
        if state.loss_scale and self._scaler.is_enabled():
            self._scaler.load_state_dict(state.loss_scale)

    def close(self) -> None:
        self.module = self._model
