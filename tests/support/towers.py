"""Small models that the tests of several modules share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from bclip_fast.model.biomedclip import BiomedClip, BiomedClipConfig
from bclip_fast.model.presets import preset
from bclip_fast.model.resnet import BatchNorm, ResNetTower
from bclip_fast.model.text import TextConfig
from bclip_fast.model.vision import VisionConfig
from bclip_fast.train.engine.base import persistent_buffers

SMALL = BiomedClipConfig(
    embed_dim=24,
    vision=VisionConfig(image_size=32, patch_size=8, width=48, layers=3, heads=4),
    text=TextConfig(context_length=20, vocab_size=100, width=32, layers=3, heads=2, max_positions=24),
)
GPT = replace(preset("clip_b16").text, context_length=20, vocab_size=100, width=32, layers=3, heads=2, max_positions=20)
RESNET_VISION = VisionConfig(
    kind="resnet", image_size=64, patch_size=32, width=8, layers=6, heads=4, blocks=(1, 2, 1, 2)
)  # fmt: skip
RESNET = BiomedClipConfig(embed_dim=24, vision=RESNET_VISION, text=GPT, quick_gelu=True)
SIGLIP = BiomedClipConfig(
    embed_dim=48,
    vision=VisionConfig(image_size=35, patch_size=8, width=48, layers=2, heads=3, mlp_ratio=2.0, kind="siglip"),
    text=replace(
        preset("siglip_b16").text, context_length=16, vocab_size=100, width=32, layers=2, heads=2, max_positions=16
    ),
    init_logit_scale=preset("siglip_b16").init_logit_scale,
    init_logit_bias=-10.0,
)


def shaken(model: nn.Module) -> nn.Module:
    """Shift all weights away from zero and one, so that a test notices every missing term of the arithmetic."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def padded_ids(lengths: list[int], context_length: int = 20) -> torch.Tensor:
    """Random ids (n, context_length), padded with 0 after each row's length."""
    ids = torch.zeros(len(lengths), context_length, dtype=torch.int64)
    for row, length in zip(ids, lengths, strict=True):
        row[:length] = torch.randint(1, 99, (length,))
    return ids


def gradients(model: nn.Module, run: Callable[[], torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gradients of the scalar that `run` returns, by parameter, with a fixed seed."""
    model.zero_grad()
    torch.manual_seed(3)
    run().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def resnet_tower(config: BiomedClipConfig = RESNET) -> ResNetTower:
    """A tower whose weights and statistics are neither zero nor one."""
    tower = shaken(BiomedClip(config)).visual
    assert isinstance(tower, ResNetTower)
    for module in tower.modules():
        if isinstance(module, BatchNorm):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2.0)
    return tower


def statistics(module: nn.Module) -> list[torch.Tensor]:
    """Copies of the running statistics."""
    buffers = persistent_buffers(module)
    assert buffers
    return [buffer.clone() for buffer in buffers.values()]
