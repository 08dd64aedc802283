"""Engines average the gradients over the ranks, clip them and update the weights: DDP, and DeepSpeed's ZeRO."""

from __future__ import annotations

import logging
from dataclasses import replace

from torch import nn

from bclip_fast import distributed
from bclip_fast.errors import UserError
from bclip_fast.train import float8
from bclip_fast.train.precision import resolve_precision
from bclip_fast.train.schedule import OptimConfig

from .base import Engine, StepResult
from .config import EngineConfig
from .ddp import DdpEngine
from .deepspeed import DeepSpeedEngine
from .malloc import set_malloc_trim

log = logging.getLogger(__name__)

__all__ = ["Engine", "EngineConfig", "StepResult", "build_engine"]


def build_engine(model: nn.Module, config: EngineConfig, optim: OptimConfig, batch_size: int) -> Engine:
    """Move `model` to this rank's device and wrap it in the engine that `config` names.

    Args:
        model: model whose parameters are equal on all ranks.
        batch_size: global batch size.

    Raises:
        UserError: `config` asks for a GPU feature on a CPU, or for a CPU feature on a GPU. Or it cannot run the
            optimiser. Or the device or the model's dimensions exclude FP8.
    """
    config.check_optimizer(optim)
    device, config = distributed.device(), replace(config, precision=resolve_precision(config.precision))
    for option in ("offload_optimizer", "offload_parameters", "cuda_graphs"):
        if device.type == "cpu" and getattr(config, option):
            raise UserError(f"engine.{option}=true needs a GPU, and this machine has none; turn it off")
    if device.type == "cuda" and config.cpu_adam == "deepspeed" and not config.offload_optimizer:
        raise UserError(
            "engine.cpu_adam=deepspeed needs engine.offload_optimizer=true; without it, the GPU updates the weights"
        )
    if device.type == "cpu":
        set_malloc_trim()
    if config.precision == "fp8":
        float8.convert(model)
        if device.type == "cuda" and not config.compile and distributed.is_main():
            log.warning(
                "engine.precision=fp8 without engine.compile=true casts each operand in several kernels of its own, "
                "which can take longer than the products save"
            )
    if config.grad_checkpointing:
        model.set_grad_checkpointing(True, config.offload_activations)  # type: ignore[operator]
    if config.compile:
        model.compile_layers(config.cuda_graphs)  # type: ignore[operator]
    engine = DeepSpeedEngine if config.name == "deepspeed" else DdpEngine
    return engine(model.to(device), config, optim, batch_size, device)
