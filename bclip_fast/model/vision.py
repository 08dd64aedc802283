"""VisionConfig, and the Vision Transformer: the arithmetic of timm's `vit_*_patch*` with a linear projection, or with
SigLIP's attention pooling.

The other image tower is in resnet.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bclip_fast.errors import UserError
from bclip_fast.ops import linear
from bclip_fast.ops.image import CLIP_MEAN, CLIP_STD, SIGLIP_MEAN, SIGLIP_STD

from .attention_pool import MapPool, init_as_big_vision
from .transformer import (
    MAX_LAYERS,
    MAX_TOKENS,
    MAX_WIDTH,
    Linear,
    Norm,
    PreNormLayer,
    PreProjection,
    Sequences,
    Tower,
    check_activation,
    check_range,
    check_sizes,
    linear_std,
)

NORM_EPS = 1e-6
CLIP_NORM_EPS = 1e-5


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of the image tower. The defaults are those of ViT-B/16 at 224 pixels.

    With kind resnet, width is that of the stem (RN50: 64), a 32nd of the features' width. The heads are those of the
    attention pool, layers is the number of blocks, and patch_size is 32, the product of all strides.
    """

    image_size: int = 224
    """Side of the square input in pixels."""
    patch_size: int = 16
    """Side of a patch in pixels. The image size must be a multiple of it. With kind siglip, it need not be: pixels to
    the right of the last complete patch and below it aren't read, as 6 of the 384 pixels of SO400M/14."""
    width: int = 768
    """Dimension of the hidden states, a multiple of heads."""
    layers: int = 12
    """Number of transformer layers."""
    heads: int = 12
    """Number of attention heads."""
    mlp_ratio: float = 4.0
    """Width of the MLP's hidden layer, as a multiple of width."""
    patch_dropout: float = 0.0
    """Fraction of the patches dropped in training, in [0, 1) (FLIP, arXiv 2212.00794). Training's
    `patch_dropout_until` ends it."""
    kind: Literal["vit", "clip", "resnet", "siglip"] = "vit"
    """vit: timm's plain ViT. clip: OpenAI's ViT, with a norm before the layers and patches without bias. resnet:
    OpenAI's ResNet. siglip: a ViT without CLS token and without projection. Attention pools its patches."""
    blocks: tuple[int, int, int, int] | None = None
    """Number of bottleneck blocks in each stage, for kind resnet. Their sum is `layers`."""
    activation: Literal["gelu", "gelu_tanh"] = "gelu"
    """Activation of the layers: the exact GELU or, for kind siglip only, its approximation by tanh. transformers
    computes every SigLIP with gelu_tanh, and open_clip those of the first release with gelu."""

    def __post_init__(self) -> None:
        if self.kind not in ("vit", "clip", "resnet", "siglip"):
            raise UserError(f"vision.kind={self.kind!r} must be vit, clip, resnet or siglip")
        check_activation("vision", self.activation, self.kind)
        if self.kind == "resnet":
            self._check_resnet()
        elif self.blocks is not None:
            raise UserError(f"vision.blocks={self.blocks} applies only to kind resnet; vision.kind is {self.kind}")
        else:
            check_sizes("vision", self.width, self.layers, self.heads, self.mlp_ratio)
        check_range("vision.patch_size", self.patch_size, 1, 1024)
        check_range("vision.image_size", self.image_size, self.patch_size, 16384)
        if self.image_size % self.patch_size and self.kind != "siglip":
            raise UserError(
                f"vision.image_size={self.image_size} must be a multiple of vision.patch_size={self.patch_size}"
            )
        check_range("number of patches", self.num_patches, 1, MAX_TOKENS)
        check_range("vision.patch_dropout", self.patch_dropout, 0.0, 0.99)

    def _check_resnet(self) -> None:
        if self.blocks is None or len(self.blocks) != 4:
            raise UserError(f"vision.blocks={self.blocks} must hold 4 numbers for vision.kind resnet")
        for count in self.blocks:
            check_range("vision.blocks", count, 1, MAX_LAYERS)
        check_range("vision.width", self.width, 2, MAX_WIDTH // 32)
        check_range("vision.heads", self.heads, 1, 32 * self.width)
        if self.width % 2 or 32 * self.width % self.heads:
            raise UserError(
                f"vision.width={self.width} must be even, and 32 * width must be divisible by vision.heads={self.heads}"
            )
        required = {"layers": sum(self.blocks), "patch_size": 32, "mlp_ratio": 4.0, "patch_dropout": 0.0}
        for name, value in required.items():
            if getattr(self, name) != value:
                raise UserError(
                    f"vision.{name}={getattr(self, name)} must be {value:g} for vision.kind resnet with "
                    f"blocks {self.blocks}"
                )

    @property
    def num_patches(self) -> int:
        """Number of patches of an image, without the CLS token."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_tokens(self) -> int:
        """Number of tokens of an image: its patches and, except for kind siglip, the CLS token."""
        return self.num_patches + (self.kind != "siglip")

    @property
    def pixel_statistics(self) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
        """The mean and the standard deviation by which pixels are normalised in training: CLIP's or SigLIP's."""
        return (SIGLIP_MEAN, SIGLIP_STD) if self.kind == "siglip" else (CLIP_MEAN, CLIP_STD)


class Normalization(nn.Module):
    """The mean and the standard deviation of raw pixels, float32 (3, 1, 1), as constants on the model's device.

    The forward pass must not create them, because the copy from the host would wait for a GPU. State dictionaries don't
    hold them. A conversion of the model to half precision doesn't round them, and a model on the meta device has their
    values too.
    """

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        device = torch.empty(0).device
        device = torch.device("cpu") if device.type == "meta" else device
        for name in ("mean", "std"):
            self.register_buffer(name, torch.empty(3, 1, 1, dtype=torch.float32, device=device), persistent=False)
        self.set(CLIP_MEAN, CLIP_STD)

    def set(self, mean: tuple[float, float, float], std: tuple[float, float, float]) -> None:
        """Set the mean and the standard deviation of each channel."""
        for buffer, values in ((self.mean, mean), (self.std, std)):
            buffer.copy_(torch.tensor(values, device="cpu").view(3, 1, 1))

    def _apply(self, fn: Any, recurse: bool = True) -> Normalization:
        constants = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, constant in constants.items():
            assert constant is not None
            device = getattr(self, name).device
            self._buffers[name] = constant if device.type == "meta" else constant.to(device)
        return self


class PatchEmbed(nn.Module):
    """The convolution of side and stride p, as one matmul over patches. Its parameters are those of timm's Conv2d.

    Pixels in uint8 aren't normalised first. Since (u / 255 - mean) / std is affine, the weights absorb its factor,
    W' = W / (255 std), and the bias absorbs the rest. The tower subtracts 128 from such pixels. They are then whole
    numbers that bfloat16 holds exactly, and their mean nearly cancels, so that sums over bright patches stay accurate.
    """

    def __init__(self, width: int, patch_size: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, 3, patch_size, patch_size))
        self.bias = nn.Parameter(torch.empty(width)) if bias else None
        self.normalization = Normalization()
        # PyTorch's initialisation of a convolution.
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        bound = (3 * patch_size**2) ** -0.5
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, image: Tensor) -> Tensor:
        """Embed normalised (B, 3, S, S), or uint8 (B, 3, S, S) or (B, S, S, 3) -> (B, patches, width), row by row.

        Pixels beyond the last complete patch aren't read. The result has the wider dtype of the matmul and the bias.
        """
        weight: Tensor = self.weight
        bias = weight.new_zeros(len(weight)) if self.bias is None else self.bias
        side = weight.shape[-1]
        used = image.shape[2] // side * side
        image = image[:, :, :used, :used] if image.shape[1] == 3 else image[:, :used, :used]
        if image.dtype == torch.uint8:
            scaled = weight.float() / self.normalization.std
            bias = bias + (scaled * (128 / 255 - self.normalization.mean)).sum((1, 2, 3)).to(bias.dtype)
            weight = (scaled / 255).to(weight.dtype)
        if image.dtype == torch.uint8 and image.shape[1] != 3:
            # This order keeps the bytes of a patch's row next to each other.
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
    """Patches, CLS token, learned positions, pre-norm layers, final norm, and the CLS token's projection without bias.

    A tower of kind siglip has no CLS token. Attention pools the tokens instead, and nothing projects the result.

    quick_gelu: use OpenAI's approximate GELU in the layers of kind clip.
    """

    cls_token: nn.Parameter | None
    pool: nn.Module | None
    head: nn.Module

    def __init__(self, config: VisionConfig, embed_dim: int, quick_gelu: bool = False) -> None:
        super().__init__()
        self.config = config
        self.patch_dropout = config.patch_dropout
        self.cuda_graphs = False
        width = config.width
        clip, siglip = config.kind == "clip", config.kind == "siglip"
        eps = CLIP_NORM_EPS if clip else NORM_EPS
        activation = "quick_gelu" if quick_gelu and clip else config.activation
        self.patch_embed = PatchEmbed(width, config.patch_size, bias=not clip)
        self.cls_token = None if siglip else nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, config.num_tokens, width))
        sizes = width, config.heads, config.mlp_ratio, eps, activation
        self.layers = nn.ModuleList(PreNormLayer(*sizes) for _ in range(config.layers))
        self.pre_norm = Norm(width, eps) if clip else None
        self.norm = Norm(width, eps)
        self.pool = MapPool(*sizes) if siglip else None
        self.head = nn.Identity() if siglip else Linear(width, embed_dim, bias=False)
        self._init_weights()

    def set_normalization(self, mean: tuple[float, float, float], std: tuple[float, float, float]) -> None:
        """Set the mean and standard deviation by which the tower normalises raw pixels."""
        self.patch_embed.normalization.set(mean, std)

    def _init_weights(self) -> None:
        """timm's: truncated normal weights and zero biases. Positions use 0.02; linear layers, too, at width 768.

        Those of kind siglip are big_vision's, with LeCun's normal weights for the patches.
        """
        if self.cls_token is None:
            fan_in = self.patch_embed.weight[0].numel()
            nn.init.trunc_normal_(self.patch_embed.weight, std=fan_in**-0.5)
            nn.init.zeros_(self.patch_embed.bias)  # type: ignore[arg-type]
            nn.init.normal_(self.pos_embed, std=self.config.width**-0.5)
            for layer in (*self.layers, self.pool):
                init_as_big_vision(layer)
            return
        nn.init.normal_(self.cls_token, std=1e-6)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.layers.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=linear_std(self.config.width))
                nn.init.zeros_(module.bias)

    def forward(self, image: Tensor | PreProjection, *, tokens: bool = False) -> Any:
        """Embed images -> (B, embed_dim), not normalised to unit length.

        Args:
            image: normalised (B, 3, S, S), or raw uint8 (B, S, S, 3) or (B, 3, S, S).
            tokens: return the states of all tokens after the final norm instead: (B, tokens, width), CLS first.

        Raises:
            UserError: the image doesn't have the configured size.
        """
        if isinstance(image, PreProjection):
            return self.head(image.states)
        stream, branch, sequences = self.run_layers(image, all_rows=tokens or self.pool is not None)
        states = self.norm(stream, branch)[0]
        if tokens:
            return states.unflatten(0, (-1, sequences.max_seqlen))
        if self.pool is not None:
            states = self.pool(states, sequences)
        return self.head(self.store_pre_projection(states))

    def run_layers(self, image: Tensor, *, all_rows: bool) -> tuple[Tensor, Any, Sequences]:
        """Stream and branch of the CLS tokens or, with all_rows, of all rows, (T, width), and the images' sequences."""
        check_images(image, self.config.image_size)
        if self.cuda_graphs:
            # Nothing reads the graphs' previous outputs any more, except copies that the head made.
            torch.compiler.cudagraph_mark_step_begin()
        x = self.patch_embed(image)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1).to(x.dtype), x], dim=1)
        x = x + self.pos_embed
        if self.training and self.patch_dropout:
            x = drop_patches(x, self.patch_dropout, has_cls=self.cls_token is not None)
        sequences = Sequences(x.shape[1])
        stream, branch = x.flatten(0, 1), None
        if self.pre_norm is not None:
            stream = self.pre_norm(stream, post=True)[1]
        cls_rows = torch.arange(0, stream.shape[0], x.shape[1], device=x.device)
        for layer in self.layers:
            rows = cls_rows if layer is self.layers[-1] and not all_rows else None
            stream, branch = self.run_layer(layer, stream, branch, sequences, rows)
        return stream, branch, sequences


def check_images(image: Tensor, size: int) -> None:
    """Raise UserError unless the images have the shape that a tower takes."""
    bytes_last = image.dtype == torch.uint8 and image.shape[1:] == (size, size, 3)
    if image.dim() != 4 or not (image.shape[1:] == (3, size, size) or bytes_last):
        raise UserError(
            f"images have shape {tuple(image.shape)}; this model takes (batch, 3, {size}, {size}), or uint8 "
            f"(batch, {size}, {size}, 3)"
        )


def drop_patches(x: Tensor, fraction: float, has_cls: bool = True) -> Tensor:
    """Keep the CLS token and a random `num_kept_patches` of the patches of each image.

    (B, 1 + num_patches, D) -> (B, 1 + kept, D). Without CLS token, (B, num_patches, D) -> (B, kept, D).
    """
    batch, tokens, width = x.shape
    num_patches = tokens - has_cls
    kept = num_kept_patches(num_patches, fraction)
    chosen = torch.rand(batch, num_patches, device=x.device).topk(kept, dim=1).indices + has_cls
    patches = x.gather(1, chosen.unsqueeze(-1).expand(-1, -1, width))
    return torch.cat([x[:, :1], patches], dim=1) if has_cls else patches


def num_kept_patches(num_patches: int, fraction: float) -> int:
    """Number of patches of an image that remain when a fraction of them is dropped: at least one."""
    return max(1, int(num_patches * (1.0 - fraction)))


def resize_positions(pos_embed: Tensor, num_patches: int, has_cls: bool = True) -> Tensor:
    """Resize position embeddings to another number of patches: bicubic with antialiasing, CLS row unchanged.

    (1, 1 + old patches, D) -> (1, 1 + num_patches, D), equal to timm's `resample_abs_pos_embed`. Without CLS token,
    (1, old patches, D) -> (1, num_patches, D).
    """
    old_side = round((pos_embed.shape[1] - has_cls) ** 0.5)
    new_side = round(num_patches**0.5)
    if old_side == new_side:
        return pos_embed
    cls, grid = pos_embed[:, : int(has_cls)], pos_embed[:, int(has_cls) :]
    grid = grid.float().unflatten(1, (old_side, old_side)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new_side, new_side), mode="bicubic", antialias=True)
    return torch.cat([cls, grid.permute(0, 2, 3, 1).flatten(1, 2).to(pos_embed.dtype)], dim=1)
