"""The engine section of the configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from bclip_fast.errors import UserError
from bclip_fast.train.schedule import OptimConfig

# The dtype of autocast. With fp8, the towers' linear layers cast further (train/float8.py).
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}


@dataclass(frozen=True)
class EngineConfig:
    """How the ranks share the model, and the precision in which they compute."""

    name: Literal["deepspeed", "ddp"] = "deepspeed"
    """deepspeed: DeepSpeed ZeRO, with the stage `zero_stage`. ddp: DistributedDataParallel of torch."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """ZeRO stage of DeepSpeed. 1 shards the optimiser states, 2 also the gradients, 3 also the parameters. 0 shards
    nothing."""
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp8"] = "auto"
    """Precision of the computation. Parameters, gradients and optimiser states are always fp32. `auto` selects bf16 if
    the devices of all ranks multiply it in hardware, and fp32 otherwise. fp8: bf16, but the linear layers of the towers
    multiply in FP8 by torchao, on GPUs like the H100. The run's config.toml records the choice. --resume keeps it.
    Another precision needs --allow_changes."""
    grad_checkpointing: bool = False
    """Recompute the activations in the backward pass."""
    offload_activations: bool = False
    """Keep the input of each checkpointed layer in host memory until the layer's backward pass. Needs
    grad_checkpointing."""
    offload_optimizer: bool = False
    """With ZeRO 1 to 3 on a GPU: keep AdamW, its states and its fp32 shards of the weights on the host. The host needs
    12 bytes a weight."""
    cpu_adam: Literal["torch", "deepspeed"] = "torch"
    """AdamW implementation for weights on the host: torch's fused one, or DeepSpeed's (needs name deepspeed). Both were
    equally fast in our measurements. DeepSpeed's is compiled at its first use, with a C++ compiler and ninja.
    TORCH_EXTENSIONS_DIR is the folder that keeps it."""
    offload_parameters: bool = False
    """With ZeRO 3 on a GPU: keep the shards of the parameters on the host, too."""
    compile: bool = False
    """Compile each transformer layer with torch.compile. Compilation takes minutes at the start. On a CPU it needs a
    C++ compiler."""
    cuda_graphs: bool = False
    """With compile on a GPU: replay the layers of the image tower as CUDA graphs. Their shapes never change."""
    bucket_mib: int = 64
    """Size (MiB) of the pieces in which gradients are communicated. It also limits the weights that ZeRO 3
    prefetches."""

    def check_optimizer(self, optim: OptimConfig) -> None:
        """Check that the engine can run the optimiser.

        Raises:
            UserError: Muon with shards, or DeepSpeed's AdamW for another optimiser.
        """
        if optim.name == "muon" and self.name == "deepspeed" and self.zero_stage:
            raise UserError(
                f"optim.name=muon updates a matrix as a whole, but engine.zero_stage={self.zero_stage} gives it "
                "shards; set engine.zero_stage=0 or engine.name=ddp"
            )
        if optim.name != "adamw" and self.cpu_adam == "deepspeed":
            raise UserError(f"engine.cpu_adam=deepspeed is an AdamW, but optim.name={optim.name}; set cpu_adam=torch")

    def __post_init__(self) -> None:
        if self.bucket_mib < 1:
            raise UserError(f"engine.bucket_mib={self.bucket_mib} must be at least 1")
        stage = self.zero_stage if self.name == "deepspeed" else 0
        for option, lowest in (("offload_optimizer", 1), ("offload_parameters", 3)):
            if getattr(self, option) and stage < lowest:
                raise UserError(f"engine.{option}=true needs engine.name=deepspeed and engine.zero_stage >= {lowest}")
        if self.cpu_adam == "deepspeed" and self.name != "deepspeed":
            raise UserError("engine.cpu_adam=deepspeed needs engine.name=deepspeed")
        if self.cuda_graphs and (not self.compile or self.grad_checkpointing):
            raise UserError("engine.cuda_graphs=true needs engine.compile=true and engine.grad_checkpointing=false")
        if self.precision == "fp8" and stage == 3 and not self.grad_checkpointing:
            raise UserError(
                "engine.precision=fp8 with engine.zero_stage=3 needs engine.grad_checkpointing=true: otherwise "
                "torchao's layers keep all gathered weights until the backward pass, and the shards save no memory"
            )
        if self.offload_activations and not self.grad_checkpointing:
            raise UserError("engine.offload_activations=true needs engine.grad_checkpointing=true")
        if self.name == "deepspeed" and self.zero_stage == 3 and self.compile:
            raise UserError(
                "engine.compile=true cannot trace the parameters of engine.zero_stage=3, which come and go; "
                "use a lower stage"
            )
