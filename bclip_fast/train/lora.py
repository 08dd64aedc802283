"""Low-rank adapters for fine-tuning (LoRA, arXiv 2106.09685), through peft."""

from __future__ import annotations

from typing import Any

from torch import nn

from bclip_fast.errors import UserError
from bclip_fast.model.biomedclip import BiomedClip
from bclip_fast.model.transformer import Linear

# The linear layers of both towers' blocks. LoRA leaves the patch projection and the output projections as they are.
_TARGETS = ("qkv", "proj", "fc1", "fc2")


def add_lora(clip: BiomedClip, rank: int, alpha: int) -> Any:
    """Add adapters to the towers' blocks and freeze all other weights. Return peft's model, which can merge them.

    Raises:
        UserError: the image tower is a ResNet.
    """
    if clip.config.vision.kind == "resnet":
        raise UserError(f"lora_rank={rank} needs transformers, but vision.kind is resnet; set lora_rank=0")
    import peft

    lora = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=rf".*layers\.\d+\.({'|'.join(_TARGETS)})")
    adapted = peft.LoraModel(clip, lora, "default")
    for module in adapted.modules():
        # peft's two factors are plain nn.Linear. Our Linear selects the fastest bfloat16 product on each CPU.
        if type(module) is nn.Linear:
            module.__class__ = Linear
    return adapted
