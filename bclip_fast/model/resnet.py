"""The image tower of OpenAI's CLIP RN50 and its larger sisters: a ResNet whose stem is three convolutions, which
averages before it strides, and which ends in attention instead of an average (arXiv 2103.00020, section 2.4).

The batch norms' statistics are of one micro-batch on one rank, as in open_clip, both with `--accum-freq` and on several
ranks without `--use-bn-sync`: so `micro_batch_size` and the number of ranks are a part of what is trained. Running
statistics move once for each micro-batch (open_clip's move in its pass without a graph, too). Ranks keep their own;
rank 0's are the model's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.convolution import conv2d
from ..ops.image import CLIP_MEAN, CLIP_STD
from .transformer import Linear, QueryKeyValue, Sequences, Tower, attend
from .vision import VisionConfig, check_images


class Block(NamedTuple):
    """Where a block is and what it takes: the first of a stage but the first stage's strides by 2."""

    stage: int
    place: int
    inputs: int
    width: int

    @property
    def stride(self) -> int:
        return 2 if self.stage and not self.place else 1


def blocks(config: VisionConfig) -> Iterator[Block]:
    """The blocks of a tower of kind resnet, in order; a stage is twice as wide as that before it."""
    inputs = config.width
    for stage, count in enumerate(config.blocks or ()):
        for place in range(count):
            yield Block(stage, place, inputs, config.width << stage)
            inputs = 4 * config.width << stage


class BatchNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) * weight + bias by channel, (B, C, H, W): the batch's in training, else the running.

    Running statistics move in a pass with a graph alone, not where micro-batches are embedded to be embedded again, nor
    where a block is recomputed. A norm that isn't trained keeps them and is normalised by them.
    """

    momentum, eps = 0.1, 1e-5
    moving = True
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        # Without torch's count of batches, which nothing reads where the momentum is given.
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        batch = self.training and self.weight.requires_grad
        mean, var = self.running_mean, self.running_var
        if batch and not (self.moving and torch.is_grad_enabled()):
            # Not None: a recomputation has to save as many tensors as what it repeats.
            mean, var = mean.clone(), var.clone()
        return F.batch_norm(x, mean, var, self.weight, self.bias, batch, self.momentum, self.eps)


@contextlib.contextmanager
def standing(layer: nn.Module) -> Iterator[None]:
    """Has the running statistics of a layer stand still."""
    norms = [module for module in layer.modules() if isinstance(module, BatchNorm)]
    for norm in norms:
        norm.moving = False
    try:
        yield
    finally:
        for norm in norms:
            norm.moving = True


class Convolution(nn.Conv2d):
    """`ops.convolution.conv2d` with its parameters."""

    def forward(self, x: Tensor) -> Tensor:
        return conv2d(x, self.weight, self.stride, self.padding)  # type: ignore[arg-type]


class ConvNorm(nn.Module):
    def __init__(self, inputs: int, outputs: int, side: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv = Convolution(inputs, outputs, side, stride, side // 2, bias=False)
        self.norm = BatchNorm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class Stem(nn.Module):
    """(B, 3, S, S) -> (B, width, S / 4, S / 4)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(3, width // 2, 3, 2)
        self.conv2 = ConvNorm(width // 2, width // 2, 3)
        self.conv3 = ConvNorm(width // 2, width, 3)

    def forward(self, x: Tensor) -> Tensor:
        for conv in (self.conv1, self.conv2, self.conv3):
            x = F.relu(conv(x), inplace=True)
        return F.avg_pool2d(x, 2)


class Bottleneck(nn.Module):
    """Convolutions of side 1, 3 and 1, the last 4 times as wide, beside a shortcut; an average makes the stride."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        width, self.stride = block.width, block.stride
        self.conv1 = ConvNorm(block.inputs, width)
        self.conv2 = ConvNorm(width, width, 3)
        self.conv3 = ConvNorm(width, 4 * width)
        self.short = ConvNorm(block.inputs, 4 * width) if block.place == 0 else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, 4 * width, H / stride, W / stride)."""
        out = F.relu(self.conv1(x), inplace=True)
        out = F.relu(self.conv2(out), inplace=True)
        if self.stride > 1:
            x, out = F.avg_pool2d(x, self.stride), F.avg_pool2d(out, self.stride)
        out = self.conv3(out).add_(x if self.short is None else self.short(x))
        return F.relu(out, inplace=True)


class AttentionPool(nn.Module):
    """What the mean of all positions, as a query, gets of itself and of them."""

    def __init__(self, width: int, heads: int, num_positions: int) -> None:
        super().__init__()
        self.heads = heads
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + num_positions, width))
        self.qkv = QueryKeyValue(width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, H, W) -> (B, width), before its projection."""
        x = x.flatten(2).transpose(1, 2)
        x = (torch.cat([x.mean(1, keepdim=True), x], dim=1) + self.pos_embed).to(x.dtype)
        tokens = x.shape[1]
        x = x.flatten(0, 1)
        return attend(self.qkv, self.heads, x, Sequences(tokens), torch.arange(0, len(x), tokens, device=x.device))


class ResNetTower(Tower):
    """Stem, blocks, attention pool, projection. `patch_dropout` is there for the trainer, and is 0."""

    def __init__(self, config: VisionConfig, embed_dim: int) -> None:
        super().__init__()
        self.config = config
        self.patch_dropout = 0.0
        self.set_pixels(CLIP_MEAN, CLIP_STD)
        width = 32 * config.width
        self.stem = Stem(config.width)
        self.layers = nn.ModuleList(map(Bottleneck, blocks(config)))
        self.pool = AttentionPool(width, config.heads, config.num_patches)
        self.head = Linear(width, embed_dim)
        # CLIP's; what isn't named here keeps PyTorch's.
        for weight in (self.pool.pos_embed, self.pool.qkv.weight, self.head.weight):
            nn.init.normal_(weight, std=width**-0.5)
        for layer in self.layers:
            assert isinstance(layer, Bottleneck)
            nn.init.zeros_(layer.conv3.norm.weight)

    def set_pixels(self, mean: tuple[float, float, float], std: tuple[float, float, float]) -> None:
        """By which raw pixels are normalised."""
        self.mean, self.std = mean, std

    def contexts(self, layer: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return contextlib.nullcontext(), standing(layer)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, S, S), normalised, or uint8 (B, S, S, 3) or (B, 3, S, S), raw -> (B, embed_dim), not normalised.

        Raises:
            UserError: the image doesn't have the configured size.
        """
        check_images(image, self.config.image_size)
        if image.dtype == torch.uint8:
            # Not folded into the first convolution, whose zeros around the image are those of normalised pixels.
            image = image if image.shape[1] == 3 else image.permute(0, 3, 1, 2)
            mean, std = (torch.tensor(values, device=image.device).view(3, 1, 1) for values in (self.mean, self.std))
            image = (image / 255 - mean) / std
        # The layout in which libraries have their fastest convolutions.
        x = image.to(self.head.weight.dtype, memory_format=torch.channels_last)
        for layer in (self.stem, *self.layers):
            x = self.run(layer, x)
        return self.head(self.pool(x))
