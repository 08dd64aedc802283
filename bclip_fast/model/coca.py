"""CoCa's caption decoder in open_clip's form (Yu et al. 2022, arXiv 2205.01917), over packed captions.

The decoder reads the token states of a causal text tower. It therefore predicts each token from the image and from the
tokens before it. Every layer is a causal layer, as in the text tower, and a layer whose queries attend to the image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bclip_fast.errors import UserError
from bclip_fast.ops import linear

from .activation import ACTIVATIONS
from .cross_attention import CrossProjection, dense_attention
from .packed import Packed
from .transformer import (
    Linear,
    Norm,
    PreNormLayer,
    Sequences,
    Tower,
    check_range,
    check_sizes,
    mlp_width,
)

NORM_EPS = 1e-5
# open_clip's decoder always has this ratio. It ignores mlp_ratio in multimodal_cfg.
MLP_RATIO = 4.0
# The logits of so many numbers exist at a time: 128 MiB in float32.
_MAX_LOGITS = 1 << 25


@dataclass(frozen=True)
class DecoderConfig:
    """CoCa's caption decoder, with the attention pool and the class token of the towers that it needs."""

    layers: int = 0
    """Number of causal layers, each followed by a layer that attends to the image. 0: the model is a plain CLIP."""
    heads: int = 8
    """Number of attention heads. The decoder is as wide as the text tower and the embedding."""
    pool_queries: int = 256
    """Number of learned queries that pool the image's tokens. The first gives the embedding, and the decoder reads the
    others."""
    pool_heads: int = 8
    """Number of attention heads of the pool."""

    def check(self, embed_dim: int, text_width: int) -> None:
        """Raise UserError unless a decoder of these sizes fits the towers."""
        if embed_dim != text_width:
            raise UserError(
                f"embed_dim={embed_dim} must equal text.width={text_width} in a model with a caption decoder, or set "
                "decoder.layers=0"
            )
        check_sizes("decoder", text_width, self.layers, self.heads, MLP_RATIO)
        check_range("decoder.pool_queries", self.pool_queries, 2, 4096)
        check_range("decoder.pool_heads", self.pool_heads, 1, embed_dim)
        if embed_dim % self.pool_heads:
            raise UserError(f"embed_dim={embed_dim} must be a multiple of decoder.pool_heads={self.pool_heads}")


class CrossLayer(nn.Module):
    """x + proj(attention(norm1(x) over context_norm(image))), then x + fc2(activation(fc1(norm2(x))))."""

    def __init__(self, width: int, heads: int, activation: str) -> None:
        super().__init__()
        self.heads = heads
        self.activation = ACTIVATIONS[activation]
        self.norm1 = Norm(width, NORM_EPS)
        self.context_norm = Norm(width, NORM_EPS)
        self.projection = CrossProjection(width, width)
        self.proj = Linear(width, width)
        self.norm2 = Norm(width, NORM_EPS)
        self.fc1 = Linear(width, mlp_width(width, MLP_RATIO))
        self.fc2 = Linear(mlp_width(width, MLP_RATIO), width)

    def forward(
        self, stream: Tensor, branch: Tensor, image_tokens: Tensor, slots: Tensor, max_seqlen: int
    ) -> tuple[Tensor, Tensor]:
        """Apply the layer to stream + branch, (T, D) each -> a stream and a branch whose sum is the output.

        Args:
            image_tokens: (n, M, D), those of each caption's image.
            slots: (T,) int64, caption * max_seqlen + position of each token. Only the attention pads the captions.
        """
        normed, stream = self.norm1(stream, branch)
        query, key_value = self.projection(normed, self.context_norm(image_tokens.flatten(0, 1))[0])
        padded = query.new_zeros(len(image_tokens) * max_seqlen, query.shape[1]).index_copy(0, slots, query)
        padded = padded.unflatten(-1, (self.heads, -1)).unflatten(0, (-1, max_seqlen)).transpose(1, 2)
        key_value = key_value.unflatten(-1, (2, self.heads, -1)).unflatten(0, image_tokens.shape[:2])
        attended = dense_attention(padded, *key_value.permute(2, 0, 3, 1, 4))
        attended = attended.transpose(1, 2).flatten(2).flatten(0, 1)[slots]
        normed, stream = self.norm2(stream, self.proj(attended))
        return stream, self.fc2(self.activation(self.fc1(normed)))


class DecoderLayer(nn.Module):
    """A causal layer and a `CrossLayer`."""

    def __init__(self, width: int, heads: int, activation: str) -> None:
        super().__init__()
        self.causal = PreNormLayer(width, heads, MLP_RATIO, NORM_EPS, activation)
        self.cross = CrossLayer(width, heads, activation)

    def forward(
        self, stream: Tensor, branch: Tensor | None, sequences: Sequences, image_tokens: Tensor, slots: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `CrossLayer.forward`, after the causal layer."""
        stream, branch = self.causal(stream, branch, sequences)
        return self.cross(stream, branch, image_tokens, slots, sequences.max_seqlen)


class CaptionHead(nn.Module):
    """Final norm and projection to the vocabulary."""

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__()
        self.norm = Norm(width, NORM_EPS)
        self.projection = nn.Parameter(torch.empty(width, vocab_size))
        nn.init.normal_(self.projection, std=width**-0.5)

    def forward(self, stream: Tensor, branch: Tensor, labels: Tensor | None = None, ignored: int = -100) -> Tensor:
        """Logits (T, V) of stream + branch. With labels (T,) int64: the sum of their cross-entropies, a scalar.

        Labels equal to `ignored` count nothing. The sum is in float32 or wider.
        """
        logits = linear(self.norm(stream, branch)[0], self.projection.T)
        if labels is None:
            return logits
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(wide, labels, ignore_index=ignored, reduction="sum")


class CaptionDecoder(Tower):
    """Decoder layers and the head."""

    def __init__(self, config: DecoderConfig, width: int, vocab_size: int, quick_gelu: bool = False) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        activation = "quick_gelu" if quick_gelu else "gelu"
        self.layers = nn.ModuleList(DecoderLayer(width, config.heads, activation) for _ in range(config.layers))
        self.head = CaptionHead(width, vocab_size)
        self._init_weights(width, config.layers)

    def _init_weights(self, width: int, depth: int) -> None:
        """CLIP's standard deviations, as in the text tower."""
        for name, module in self.layers.named_modules():
            if isinstance(module, nn.Linear):
                inner = name.endswith((".proj", ".fc2"))
                std = (2 * width * depth) ** -0.5 if inner else (2 * width) ** -0.5 if "fc1" in name else width**-0.5
                nn.init.normal_(module.weight, std=std)
                nn.init.zeros_(module.bias)

    def forward(self, image_tokens: Tensor, states: Tensor, text: Packed, *, ignored: int | None = None) -> Tensor:
        """Logits (T, V) of the token after each of the T tokens of n captions.

        Args:
            image_tokens: (n, M, D), the pooled tokens of each caption's image.
            states: (T, D), the token states of the text tower.
            text: the captions.
            ignored: return the sum of the cross-entropies of all tokens after a caption's first one instead, a scalar
                in float32 or wider. Tokens with this id count nothing.
        """
        sequences = Sequences(text.max_seqlen, text.cu_seqlens, causal=True)
        slots = text.owners * text.max_seqlen + text.positions
        stream, branch = states, None
        for layer in self.layers:
            stream, branch = self.run_layer(layer, stream, branch, sequences, image_tokens, slots)
        assert branch is not None
        if ignored is None:
            return self.head(stream, branch)
        # The backward pass computes each chunk's logits again, so that they never exist all at once.
        sums = [
            checkpoint(self.head, stream[rows], branch[rows], text.ids[rows + 1], ignored, use_reentrant=False)
            for rows in rows_before_another(text).split(max(1, _MAX_LOGITS // self.vocab_size))
        ]
        return torch.stack(sums).sum()


def rows_before_another(text: Packed) -> Tensor:
    """(T - n,) int64: the rows of the tokens that another token of their caption follows."""
    captions = torch.arange(len(text.lengths), device=text.ids.device)
    count = len(text.ids) - len(captions)
    return torch.arange(count, device=text.ids.device) + captions.repeat_interleave(text.lengths - 1, output_size=count)


def num_labels(text: Packed, ignored: int) -> Tensor:
    """Number of tokens after a caption's first one whose id isn't `ignored`: an int64 scalar."""
    return (text.ids[rows_before_another(text) + 1] != ignored).sum()
