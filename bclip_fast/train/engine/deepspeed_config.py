"""DeepSpeed's JSON configuration. This module does not import deepspeed."""

from __future__ import annotations

from typing import Any

import torch

from bclip_fast import distributed
from bclip_fast.train.schedule import OptimConfig

from .config import DTYPES, EngineConfig


def deepspeed_config(config: EngineConfig, optim: OptimConfig, batch_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration for the global batch size `batch_size`, without gradient accumulation."""
    bucket = config.bucket_mib * (1 << 20) // 4
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if config.zero_stage > 0:
        zero.update(reduce_bucket_size=bucket, allgather_bucket_size=bucket)
    if config.zero_stage == 3:
        zero.update(stage3_prefetch_bucket_size=bucket, sub_group_size=1 << 30)
        # By default DeepSpeed keeps weights gathered until the backward pass, and prefetches without a limit.
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
        # By default, DeepSpeed waits for the GPU twice in each step, to log its throughput.
        "timers": {"throughput": {"enabled": False}},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # Use autocast as plain PyTorch does. The empty list makes DeepSpeed communicate fp32 gradients.
        "torch_autocast": {
            "enabled": config.precision != "fp32",
            "dtype": str(DTYPES[config.precision]).removeprefix("torch."),
            "lower_precision_safe_modules": [],
        },
    }
