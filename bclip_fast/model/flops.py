"""The floating-point operations of a training step, for metrics, plans of runs and benchmarks.

The count covers the matmuls and convolutions that the mathematics needs, with two operations for each multiplication
and its addition. It covers only real tokens, and in the last layers only the token that is read. Padding counts only
for a tower that attends to it, such as SigLIP's. MFU stays comparable because recomputation, other padding, norms and
the loss aren't counted. The loss needs 4 * 2 * b * B * D operations: less than 1 % of the towers' up to B = 65536.
"""

from __future__ import annotations

from collections.abc import Sequence

from .biomedclip import BiomedClipConfig
from .coca import MLP_RATIO
from .resnet import blocks
from .text import TextConfig
from .vision import VisionConfig, num_kept_patches


def step_flops(
    config: BiomedClipConfig, lengths: Sequence[int], patch_dropout: float = 0.0, locked: tuple[int, int] = (0, 0)
) -> float:
    """FLOPs of a step: forward, and twice as many in the backward pass. A caption decoder predicts the captions.

    Args:
        lengths: number of tokens of each pair's caption.
        locked: `Tower.num_locked` of the image and the text tower. The backward pass skips these groups.
    """
    vision, text = config.vision, config.text
    captions = config.decoder.layers > 0
    forward = forward_flops(config, lengths, patch_dropout, captions=captions)
    trainable = list(forward)
    if vision.kind == "resnet":
        trainable[0] = len(lengths) * sum(resnet_flops(vision)[locked[0] :])
    elif locked[0]:
        tokens = _image_tokens(vision, patch_dropout)
        trainable[0] = _image_flops(config, len(lengths), tokens, 1 + vision.layers - locked[0], captions)
    if locked[1]:
        trainable[1] = _text_flops(config, lengths, 1 + text.layers - locked[1], captions)
    return sum(forward) + 2 * sum(trainable)


def forward_flops(
    config: BiomedClipConfig, lengths: Sequence[int], patch_dropout: float = 0.0, *, captions: bool = False
) -> tuple[float, ...]:
    """FLOPs of the forward pass of the image tower, of the text tower and, with captions, of the caption decoder."""
    vision = config.vision
    text_flops = _text_flops(config, lengths, config.text.layers, captions)
    if vision.kind == "resnet":
        return len(lengths) * sum(resnet_flops(vision)), text_flops
    image_flops = _image_flops(config, len(lengths), _image_tokens(vision, patch_dropout), vision.layers, captions)
    image_flops += len(lengths) * 2 * vision.num_patches * vision.width * 3 * vision.patch_size**2
    return (image_flops, text_flops, *((_decoder_flops(config, lengths),) if captions else ()))


def _image_flops(config: BiomedClipConfig, num_images: int, tokens: int, layers: int, captions: bool) -> float:
    """The last `layers` layers of a ViT, and its pool. That of a CoCa has one query without captions."""
    vision, width, decoder = config.vision, config.embed_dim, config.decoder
    if not decoder.layers:
        pool = vision.kind == "siglip"
        return num_images * tower_flops([tokens], vision.width, layers, vision.mlp_ratio, pool=pool)
    queries = decoder.pool_queries if captions else 1
    pool_flops = 4 * tokens * vision.width * width + 4 * queries * tokens * width + 2 * queries * width**2
    layer = full_layer_flops([tokens], vision.width, vision.mlp_ratio)
    # The projected queries are the same for all images.
    return num_images * (layers * layer + pool_flops) + 2 * queries * width**2


def _text_flops(config: BiomedClipConfig, lengths: Sequence[int], layers: int, captions: bool) -> float:
    """The last `layers` layers of the text tower. In a CoCa, each caption has two further rows."""
    text = config.text
    if config.decoder.layers:
        lengths = [length + 2 for length in lengths]
    if captions:
        return layers * full_layer_flops(lengths, text.width, text.mlp_ratio)
    return tower_flops(_text_tokens(text, lengths), text.width, layers, text.mlp_ratio)


def _decoder_flops(config: BiomedClipConfig, lengths: Sequence[int]) -> float:
    """The caption decoder, with the logits of all tokens that another one follows."""
    decoder, width, tokens = config.decoder, config.text.width, sum(lengths)
    image_tokens = decoder.pool_queries - 1
    cross = (4 + 4 * MLP_RATIO) * width**2 * tokens + 4 * width * image_tokens * (width * len(lengths) + tokens)
    layer = full_layer_flops(lengths, width, MLP_RATIO) + cross
    return decoder.layers * layer + 2 * (tokens - len(lengths)) * width * config.text.vocab_size


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
    tokens, rest = sum(lengths), 2 * width**2 * (2 + 2 * mlp_ratio)
    full_layer = full_layer_flops(lengths, width, mlp_ratio)
    last_layer = 4 * width**2 * tokens + rest * len(lengths) + 4 * width * tokens
    if pool:
        return layers * full_layer + last_layer - 2 * width**2 * len(lengths)
    return (layers - 1) * full_layer + last_layer


def full_layer_flops(lengths: Sequence[int], width: int, mlp_ratio: float) -> float:
    """Forward FLOPs of a transformer layer that computes all tokens."""
    tokens, squares = sum(lengths), sum(n * n for n in lengths)
    return (4 + 2 * (2 + 2 * mlp_ratio)) * width**2 * tokens + 4 * width * squares
