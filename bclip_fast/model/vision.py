"""Sizes of the image towers, and the usual one: a Vision Transformer whose arithmetic is that of timm's `vit_*_patch*`,
with a linear projection. The other one is in resnet.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from ..ops import linear
from ..ops.image import CLIP_MEAN, CLIP_STD
from .transformer import (
    MAX_LAYERS,
    MAX_TOKENS,
    MAX_WIDTH,
    Linear,
    Norm,
    Pooled,
    PreNormLayer,
    Sequences,
    Tower,
    check_range,
    check_sizes,
    linear_std,
)

NORM_EPS = 1e-6
CLIP_NORM_EPS = 1e-5


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of the image tower; the defaults are ViT-B/16 at 224 pixels.

    Of kind resnet, width is that of the stem, a 32nd of the features' (RN50: 64), which the heads of the attention pool
    share; layers is the number of blocks, patch_size 32, by which all strides make the picture smaller.
    """

    image_size: int = 224
    """Side of the square input in pixels."""
    patch_size: int = 16
    """Side of a patch in pixels; divides the image size."""
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    patch_dropout: float = 0.0
    """Share of the patches dropped in training (FLIP, arXiv 2212.00794), in [0, 1); `patch_dropout_until` of
    training ends it."""
    kind: Literal["vit", "clip", "resnet"] = "vit"
    """vit: timm's plain ViT. clip: OpenAI's, with a norm before the layers and patches without a bias. resnet: OpenAI's
    ResNet."""
    blocks: tuple[int, int, int, int] | None = None
    """Of kind resnet: bottleneck blocks by stage, `layers` together."""

    def __post_init__(self) -> None:
        if self.kind not in ("vit", "clip", "resnet"):
            raise UserError(f"vision.kind is {self.kind!r}; choose vit, clip or resnet")
        if self.kind == "resnet":
            self._check_resnet()
        elif self.blocks is not None:
            raise UserError(f"vision.blocks is {self.blocks}, but vision.kind {self.kind} has none")
        else:
            check_sizes("vision", self.width, self.layers, self.heads, self.mlp_ratio)
        check_range("vision.patch_size", self.patch_size, 1, 1024)
        check_range("vision.image_size", self.image_size, self.patch_size, 16384)
        if self.image_size % self.patch_size:
            raise UserError(
                f"vision.image_size {self.image_size} is not a multiple of vision.patch_size {self.patch_size}"
            )
        check_range("number of patches", self.num_patches, 1, MAX_TOKENS)
        check_range("vision.patch_dropout", self.patch_dropout, 0.0, 0.99)

    def _check_resnet(self) -> None:
        if self.blocks is None or len(self.blocks) != 4:
            raise UserError(f"vision.blocks is {self.blocks}; vision.kind resnet needs 4 numbers")
        for count in self.blocks:
            check_range("vision.blocks", count, 1, MAX_LAYERS)
        check_range("vision.width", self.width, 2, MAX_WIDTH // 32)
        check_range("vision.heads", self.heads, 1, 32 * self.width)
        if self.width % 2 or 32 * self.width % self.heads:
            raise UserError(
                f"vision.width {self.width} is odd, or 32 times it no multiple of vision.heads {self.heads}"
            )
        wanted = {"layers": sum(self.blocks), "patch_size": 32, "mlp_ratio": 4.0, "patch_dropout": 0.0}
        for name, value in wanted.items():
            if (found := getattr(self, name)) != value:
                raise UserError(
                    f"vision.{name} is {found}; of vision.kind resnet with blocks {self.blocks} it is {value:g}"
                )

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


class PatchEmbed(nn.Module):
    """The convolution of side and stride p as one matmul over patches; its parameters are those of timm's Conv2d.

    Pixels that come as uint8 are not normalised: (u / 255 - mean) / std is affine, so the weights take it over,
    W' = W / (255 std), and the bias what remains. 128 is subtracted from the pixels, which then are whole numbers that
    bfloat16 holds exactly and whose mean nearly cancels: without it, the sum over a bright patch would be rounded.
    """

    def __init__(self, width: int, patch_size: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, 3, patch_size, patch_size))
        self.bias = nn.Parameter(torch.empty(width)) if bias else None
        self.mean, self.std = CLIP_MEAN, CLIP_STD
        # PyTorch's for a convolution.
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        bound = (3 * patch_size**2) ** -0.5
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, S, S) normalised, or uint8 (B, 3, S, S) or (B, S, S, 3) -> (B, patches, width), rows of patches first.

        The sum is in the wider dtype of matmul and bias.
        """
        weight: Tensor = self.weight
        bias = weight.new_zeros(len(weight)) if self.bias is None else self.bias
        side = weight.shape[-1]
        if image.dtype == torch.uint8:
            std = torch.tensor(self.std, device=weight.device).view(3, 1, 1)
            mean = torch.tensor(self.mean, device=weight.device).view(3, 1, 1)
            scaled = weight.float() / std
            bias = bias + (scaled * (128 / 255 - mean)).sum((1, 2, 3)).to(bias.dtype)
            weight = (scaled / 255).to(weight.dtype)
        if image.dtype == torch.uint8 and image.shape[1] != 3:
            # Within a row of a patch the bytes stay in their order.
            patches = image.unflatten(2, (-1, side)).unflatten(1, (-1, side)).permute(0, 1, 3, 2, 4, 5)
            weight = weight.permute(0, 2, 3, 1)
        else:
            patches = image.unflatten(3, (-1, side)).unflatten(2, (-1, side)).permute(0, 2, 4, 1, 3, 5)
        kind = image.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        patches = patches.flatten(3).flatten(1, 2).to(dtype)
        if image.dtype == torch.uint8:
            patches = patches - 128
        return linear(patches, weight.flatten(1)) + bias


class VisionTower(Tower):
    """Patches, CLS token, learned positions, pre-norm layers, final norm, CLS, projection without bias.

    quick_gelu: the layers of kind clip have OpenAI's approximate GELU.
    """

    def __init__(self, config: VisionConfig, embed_dim: int, quick_gelu: bool = False) -> None:
        super().__init__()
        self.config = config
        self.patch_dropout = config.patch_dropout
        self.cuda_graphs = False
        width = config.width
        clip = config.kind == "clip"
        eps = CLIP_NORM_EPS if clip else NORM_EPS
        self.patch_embed = PatchEmbed(width, config.patch_size, bias=not clip)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + config.num_patches, width))
        self.layers = nn.ModuleList(
            PreNormLayer(width, config.heads, config.mlp_ratio, eps, quick_gelu and clip) for _ in range(config.layers)
        )
        self.pre_norm = Norm(width, eps) if clip else None
        self.norm = Norm(width, eps)
        self.head = Linear(width, embed_dim, bias=False)
        self._initialise()

    def set_pixels(self, mean: tuple[float, float, float], std: tuple[float, float, float]) -> None:
        """By which raw pixels are normalised."""
        self.patch_embed.mean, self.patch_embed.std = mean, std

    def _initialise(self) -> None:
        """timm's: truncated normal, zero biases; 0.02 for positions, and for linear layers at width 768."""
        nn.init.normal_(self.cls_token, std=1e-6)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.layers.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=linear_std(self.config.width))
                nn.init.zeros_(module.bias)

    def forward(self, image: Tensor | Pooled, *, tokens: bool = False) -> Tensor:
        """(B, 3, S, S), normalised, or uint8 (B, S, S, 3) or (B, 3, S, S), raw -> (B, embed_dim), not normalised.

        With `tokens`, the states of all tokens after the final norm instead: (B, 1 + patches, width), CLS first.

        Raises:
            UserError: the image doesn't have the configured size.
        """
        if isinstance(image, Pooled):
            return self.head(image.states)
        check_images(image, self.config.image_size)
        if self.cuda_graphs:
            # What the graphs gave last time is read no more, but for what the head made of it.
            torch.compiler.cudagraph_mark_step_begin()
        x = self.patch_embed(image)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1).to(x.dtype), x], dim=1) + self.pos_embed
        if self.training and self.patch_dropout:
            x = drop_patches(x, self.patch_dropout)
        sequences = Sequences(x.shape[1])
        stream, branch = x.flatten(0, 1), None
        if self.pre_norm is not None:
            stream = self.pre_norm(stream, post=True)[1]
        first = torch.arange(0, len(stream), x.shape[1], device=x.device)
        for layer in self.layers:
            rows = first if layer is self.layers[-1] and not tokens else None
            stream, branch = self.run(layer, stream, branch, sequences, rows)
        states = self.norm(stream, branch)[0]
        return states.unflatten(0, (-1, sequences.max_seqlen)) if tokens else self.head(self.keep(states))


def check_images(image: Tensor, size: int) -> None:
    bytes_last = image.dtype == torch.uint8 and image.shape[1:] == (size, size, 3)
    if image.dim() != 4 or not (image.shape[1:] == (3, size, size) or bytes_last):
        raise UserError(
            f"images have shape {tuple(image.shape)}; this model takes (batch, 3, {size}, {size}), or uint8 "
            f"(batch, {size}, {size}, 3)"
        )


def drop_patches(x: Tensor, share: float) -> Tensor:
    """Keeps the CLS token and a random `num_kept_patches` of the patches of each image.

    (B, 1 + num_patches, D) -> (B, 1 + kept, D).
    """
    batch, tokens, width = x.shape
    kept = num_kept_patches(tokens - 1, share)
    chosen = torch.rand(batch, tokens - 1, device=x.device).topk(kept, dim=1).indices + 1
    patches = x.gather(1, chosen.unsqueeze(-1).expand(-1, -1, width))
    return torch.cat([x[:, :1], patches], dim=1)


def num_kept_patches(num_patches: int, share: float) -> int:
    """How many patches of an image are left when a share of them is dropped: at least one."""
    return max(1, int(num_patches * (1.0 - share)))


def resize_positions(pos_embed: Tensor, num_patches: int) -> Tensor:
    """Position embeddings for another image size: the grid resized bicubic with antialias, the CLS row kept.

    (1, 1 + old patches, D) -> (1, 1 + num_patches, D), as timm's `resample_abs_pos_embed` does it.
    """
    old = round((pos_embed.shape[1] - 1) ** 0.5)
    new = round(num_patches**0.5)
    if old == new:
        return pos_embed
    cls, grid = pos_embed[:, :1], pos_embed[:, 1:]
    grid = grid.float().unflatten(1, (old, old)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", antialias=True)
    return torch.cat([cls, grid.permute(0, 2, 3, 1).flatten(1, 2).to(pos_embed.dtype)], dim=1)
