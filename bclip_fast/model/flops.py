"""The floating-point operations of a training step, for metrics, plans of runs and benchmarks.

The count covers the matmuls and convolutions that the mathematics needs, with two operations for each multiplication
and its addition. It covers only real tokens, and in the last layers only the token that is read. Padding counts only
for a tower that attends to it, such as SigLIP's. MFU stays comparable because recomputation, other padding, norms and
the loss aren't counted. The loss needs 4 * 2 * b * B * D operations: less than 1 % of the towers' up to B = 65536.
"""

from __future__ import annotations

from collections.abc import Sequence

from .biomedclip import BiomedClipConfig
from .resnet import blocks
from .text import TextConfig
from .vision import VisionConfig, num_kept_patches


def step_flops(
    config: BiomedClipConfig, lengths: Sequence[int], patch_dropout: float = 0.0, locked: tuple[int, int] = (0, 0)
) -> float:
    """FLOPs of a step: forward, and twice as many in the backward pass.

    Args:
        lengths: number of tokens of each pair's caption.
        locked: `Tower.num_locked` of the image and the text tower. The backward pass skips these groups.
    """
    vision, text = config.vision, config.text
    forward = forward_flops(config, lengths, patch_dropout)
    tokens = [_image_tokens(vision, patch_dropout)] * len(lengths)
    trainable = list(forward)
    if vision.kind == "resnet":
        trainable[0] = len(lengths) * sum(resnet_flops(vision)[locked[0] :])
    elif locked[0]:
        pool = vision.kind == "siglip"
        trainable[0] = tower_flops(tokens, vision.width, 1 + vision.layers - locked[0], vision.mlp_ratio, pool=pool)
    if locked[1]:
        lengths = _text_tokens(text, lengths)
        trainable[1] = tower_flops(lengths, text.width, 1 + text.layers - locked[1], text.mlp_ratio)
    return sum(forward) + 2 * sum(trainable)


def forward_flops(config: BiomedClipConfig, lengths: Sequence[int], patch_dropout: float = 0.0) -> tuple[float, float]:
    """FLOPs of the forward pass of the image tower and of the text tower."""
    vision, text = config.vision, config.text
    text_flops = tower_flops(_text_tokens(text, lengths), text.width, text.layers, text.mlp_ratio)
    if vision.kind == "resnet":
        return len(lengths) * sum(resnet_flops(vision)), text_flops
    tokens, pool = [_image_tokens(vision, patch_dropout)], vision.kind == "siglip"
    image_flops = tower_flops(tokens, vision.width, vision.layers, vision.mlp_ratio, pool=pool)
    image_flops += 2 * vision.num_patches * vision.width * 3 * vision.patch_size**2
    return len(lengths) * image_flops, text_flops


def _image_tokens(vision: VisionConfig, patch_dropout: float) -> int:
    return vision.num_tokens - vision.num_patches + num_kept_patches(vision.num_patches, patch_dropout)


def _text_tokens(text: TextConfig, lengths: Sequence[int]) -> Sequence[int]:
    return [text.context_length] * len(lengths) if text.computes_padding else lengths


def resnet_flops(config: VisionConfig) -> list[float]:
    """Forward FLOPs of one image in each group of `Tower.lock`: the stem, then the blocks, the last with the pool."""
    side, half = config.image_size // 2, config.width // 2
    groups = [2.0 * 9 * side**2 * half * (3 + half + config.width)]
    side //= 2
    for block in blocks(config):
        input_side, side = side, side // block.stride
        first_two = block.width * (block.inputs + 9 * block.width)
        # The last convolution and, in the first block of a stage, the shortcut's.
        last = 4 * block.width * (block.width + (block.position == 0) * block.inputs)
        groups.append(2.0 * (input_side**2 * first_two + side**2 * last))
    tokens, width = 1 + side**2, 32 * config.width
    groups[-1] += 2 * width**2 * (1 + 2 * tokens) + 4 * width * tokens
    return groups


def tower_flops(lengths: Sequence[int], width: int, layers: int, mlp_ratio: float, *, pool: bool = False) -> float:
    """Forward FLOPs of transformer layers. The last one computes queries, projection and MLP for one token each.

    pool: every layer computes all tokens, and an attention pool of the same width follows. Its query is learned.
    """
    if layers == 0:
        return 0.0
    tokens, squares, rest = sum(lengths), sum(n * n for n in lengths), 2 * width**2 * (2 + 2 * mlp_ratio)
    full_layer = (4 * width**2 + rest) * tokens + 4 * width * squares
    last_layer = 4 * width**2 * tokens + rest * len(lengths) + 4 * width * tokens
    if pool:
        return layers * full_layer + last_layer - 2 * width**2 * len(lengths)
    return (layers - 1) * full_layer + last_layer
