"""The floating-point operations of a training step, counted once: for metrics, the plan of a run and benchmarks.

Counted is what the mathematics asks of matmuls and convolutions, two for a multiplication with its addition: on the
tokens that there are, the last layers for the token that is read. Recomputation, padding, norms and the loss
(4 * 2 * b * B * D, under a hundredth of the towers' share up to B = 65536) are not, so that MFU is comparable.
"""

from __future__ import annotations

from collections.abc import Sequence

from bclip_fast.model.biomedclip import BiomedClipConfig
from bclip_fast.model.resnet import blocks
from bclip_fast.model.vision import VisionConfig, num_kept_patches


def step_flops(
    config: BiomedClipConfig, lengths: Sequence[int], patch_dropout: float = 0.0, locked: tuple[int, int] = (0, 0)
) -> float:
    """Forward and backward, twice forward, of len(lengths) pairs whose captions have so many tokens.

    locked: `Tower.num_locked` of the image and the text tower: no backward pass goes through those groups.
    """
    vision, text = config.vision, config.text
    forward = forward_flops(config, lengths, patch_dropout)
    patches = [1 + num_kept_patches(vision.num_patches, patch_dropout)] * len(lengths)
    back = list(forward)
    if vision.kind == "resnet":
        back[0] = len(lengths) * sum(resnet_flops(vision)[locked[0] :])
    elif locked[0]:
        back[0] = tower_flops(patches, vision.width, 1 + vision.layers - locked[0], vision.mlp_ratio)
    if locked[1]:
        back[1] = tower_flops(lengths, text.width, 1 + text.layers - locked[1], text.mlp_ratio)
    return sum(forward) + 2 * sum(back)


def forward_flops(config: BiomedClipConfig, lengths: Sequence[int], patch_dropout: float = 0.0) -> tuple[float, float]:
    """Of the image and the text tower."""
    vision, text = config.vision, config.text
    of_text = tower_flops(lengths, text.width, text.layers, text.mlp_ratio)
    if vision.kind == "resnet":
        return len(lengths) * sum(resnet_flops(vision)), of_text
    tokens = 1 + num_kept_patches(vision.num_patches, patch_dropout)
    image = tower_flops([tokens], vision.width, vision.layers, vision.mlp_ratio)
    image += 2 * vision.num_patches * vision.width * 3 * vision.patch_size**2
    return len(lengths) * image, of_text


def resnet_flops(config: VisionConfig) -> list[float]:
    """Forward of one image by group of `Tower.lock`: the stem, then the blocks, the last with the attention pool."""
    side, half = config.image_size // 2, config.width // 2
    groups = [2.0 * 9 * side**2 * half * (3 + half + config.width)]
    side //= 2
    for block in blocks(config):
        before, side = side, side // block.stride
        first = block.width * (block.inputs + 9 * block.width)
        # The last convolution and, of a stage's first block, the shortcut's.
        last = 4 * block.width * (block.width + (block.index == 0) * block.inputs)
        groups.append(2.0 * (before**2 * first + side**2 * last))
    tokens, width = 1 + side**2, 32 * config.width
    groups[-1] += 2 * width**2 * (1 + 2 * tokens) + 4 * width * tokens
    return groups


def tower_flops(lengths: Sequence[int], width: int, layers: int, mlp_ratio: float) -> float:
    """Forward, with the last layer's queries, projection and MLP for one token of each sequence; 0 of no layers."""
    if layers == 0:
        return 0.0
    tokens, squares, rest = sum(lengths), sum(n * n for n in lengths), 2 * width**2 * (2 + 2 * mlp_ratio)
    whole = (4 * width**2 + rest) * tokens + 4 * width * squares
    last = 4 * width**2 * tokens + rest * len(lengths) + 4 * width * tokens
    return (layers - 1) * whole + last
