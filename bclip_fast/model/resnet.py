"""The image tower of OpenAI's CLIP RN50 and its larger variants (arXiv 2103.00020, section 2.4).

It is a ResNet whose stem has three convolutions, which averages before it strides, and which ends in an attention pool
instead of an average.

The batch norms compute their statistics over one micro-batch on one rank. So does open_clip with `--accum-freq`, and
without `--use-bn-sync` on several ranks. The result of training therefore depends on `micro_batch_size` and on the
number of ranks. Running statistics change once for each micro-batch. In open_clip they also change in the pass
without a graph. Each rank keeps its own statistics, and a checkpoint holds those of rank 0.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bclip_fast.ops.convolution import conv2d

from .transformer import Linear, QueryKeyValue, Sequences, Tower, attend
from .vision import Normalization, VisionConfig, check_images


class Block(NamedTuple):
    """Position and sizes of a block. The first block of every stage except the first strides by 2."""

    stage: int
    position: int
    inputs: int
    width: int

    @property
    def stride(self) -> int:
        """2 if the block halves the image's side, else 1."""
        return 2 if self.stage and not self.position else 1


def blocks(config: VisionConfig) -> Iterator[Block]:
    """Yield the blocks of a tower of kind resnet in order. Each stage is twice as wide as the previous one."""
    inputs = config.width
    for stage, count in enumerate(config.blocks or ()):
        for position in range(count):
            yield Block(stage, position, inputs, config.width << stage)
            inputs = 4 * config.width << stage


class BatchNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) * weight + bias for each channel of (B, C, H, W).

    Training uses the statistics of the batch, evaluation and locked norms the running ones. Running statistics change
    only in a pass with a graph: neither in the first pass of GradCache, nor in the recomputation of a block.
    """

    momentum, eps = 0.1, 1e-5
    update_statistics = True
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        # torch's count of batches is left out: with a fixed momentum, nothing reads it.
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        use_batch = self.training and self.weight.requires_grad
        mean, var = self.running_mean, self.running_var
        if use_batch and not (self.update_statistics and torch.is_grad_enabled()):
            # Copies instead of None: a recomputation must save as many tensors as the pass that it repeats.
            mean, var = mean.clone(), var.clone()
        return F.batch_norm(x, mean, var, self.weight, self.bias, use_batch, self.momentum, self.eps)


@contextlib.contextmanager
def frozen_statistics(layer: nn.Module) -> Iterator[None]:
    """Keep the running statistics of a layer unchanged."""
    norms = [module for module in layer.modules() if isinstance(module, BatchNorm)]
    for norm in norms:
        norm.update_statistics = False
    try:
        yield
    finally:
        for norm in norms:
            norm.update_statistics = True


class Convolution(nn.Conv2d):
    """`ops.convolution.conv2d` with its parameters."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, H / stride, W / stride)."""
        return conv2d(x, self.weight, self.stride, self.padding)  # type: ignore[arg-type]


class ConvNorm(nn.Module):
    """A convolution without bias, and its batch norm."""

    def __init__(self, inputs: int, outputs: int, side: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv = Convolution(inputs, outputs, side, stride, side // 2, bias=False)
        self.norm = BatchNorm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H / stride, W / stride)."""
        return self.norm(self.conv(x))


class Stem(nn.Module):
    """Three convolutions and an average: (B, 3, S, S) -> (B, width, S / 4, S / 4)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(3, width // 2, 3, 2)
        self.conv2 = ConvNorm(width // 2, width // 2, 3)
        self.conv3 = ConvNorm(width // 2, width, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, width, S / 4, S / 4)."""
        for conv in (self.conv1, self.conv2, self.conv3):
            x = F.relu(conv(x), inplace=True)
        return F.avg_pool2d(x, 2)


class Bottleneck(nn.Module):
    """Convolutions of side 1, 3 and 1 (4 times as wide) beside a shortcut. An average does the stride."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        width, self.stride = block.width, block.stride
        self.conv1 = ConvNorm(block.inputs, width)
        self.conv2 = ConvNorm(width, width, 3)
        self.conv3 = ConvNorm(width, 4 * width)
        self.short = ConvNorm(block.inputs, 4 * width) if block.position == 0 else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, 4 * width, H / stride, W / stride)."""
        out = F.relu(self.conv1(x), inplace=True)
        out = F.relu(self.conv2(out), inplace=True)
        if self.stride > 1:
            x, out = F.avg_pool2d(x, self.stride), F.avg_pool2d(out, self.stride)
        out = self.conv3(out).add_(x if self.short is None else self.short(x))
        return F.relu(out, inplace=True)


class AttentionPool(nn.Module):
    """Attention with one query, the mean of all positions. Its keys are that mean and the positions."""

    def __init__(self, width: int, heads: int, num_positions: int) -> None:
        super().__init__()
        self.heads = heads
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + num_positions, width))
        self.qkv = QueryKeyValue(width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, H, W) -> (B, width), without the output projection."""
        x = x.flatten(2).transpose(1, 2)
        x = (torch.cat([x.mean(1, keepdim=True), x], dim=1) + self.pos_embed).to(x.dtype)
        tokens = x.shape[1]
        x = x.flatten(0, 1)
        return attend(self.qkv, self.heads, x, Sequences(tokens), torch.arange(0, x.shape[0], tokens, device=x.device))


class ResNetTower(Tower):
    """Stem, blocks, attention pool and projection. The trainer reads `patch_dropout`, which is always 0."""

    def __init__(self, config: VisionConfig, embed_dim: int) -> None:
        super().__init__()
        self.config = config
        self.patch_dropout = 0.0
        self.normalization = Normalization()
        width = 32 * config.width
        self.stem = Stem(config.width)
        self.layers = nn.ModuleList(map(Bottleneck, blocks(config)))
        self.pool = AttentionPool(width, config.heads, config.num_patches)
        self.head = Linear(width, embed_dim)
        # CLIP's initialisation. Parameters that aren't named here keep PyTorch's.
        for weight in (self.pool.pos_embed, self.pool.qkv.weight, self.head.weight):
            nn.init.normal_(weight, std=width**-0.5)
        for layer in self.layers:
            assert isinstance(layer, Bottleneck)
            nn.init.zeros_(layer.conv3.norm.weight)

    def set_normalization(self, mean: tuple[float, float, float], std: tuple[float, float, float]) -> None:
        """Set the mean and standard deviation by which the tower normalises raw pixels."""
        self.normalization.set(mean, std)

    def recompute_contexts(self, layer: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Change running statistics in the first run of a layer, not in its recomputation."""
        return contextlib.nullcontext(), frozen_statistics(layer)

    def forward(self, image: Tensor) -> Tensor:
        """Embed images -> (B, embed_dim), not normalised to unit length.

        Args:
            image: normalised (B, 3, S, S), or raw uint8 (B, S, S, 3) or (B, 3, S, S).

        Raises:
            UserError: the image doesn't have the configured size.
        """
        check_images(image, self.config.image_size)
        if image.dtype == torch.uint8:
            # The first convolution can't absorb this: the zeros around the image are those of normalised pixels.
            image = image if image.shape[1] == 3 else image.permute(0, 3, 1, 2)
            image = (image / 255 - self.normalization.mean) / self.normalization.std
        # Libraries have their fastest convolutions in this memory format.
        x = image.to(self.head.weight.dtype, memory_format=torch.channels_last)
        for layer in (self.stem, *self.layers):
            x = self.run_layer(layer, x)
        return self.head(self.pool(x))
