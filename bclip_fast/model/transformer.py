"""The two kinds of transformer layer: pre-norm (ViT, GPT) and post-norm (BERT); attention is `ops.fused_attention`."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from ..ops import fused_attention

# A checkpoint's configuration is untrusted: these bounds keep it from asking for absurd amounts of memory.
MAX_WIDTH = 16384
MAX_LAYERS = 256
MAX_TOKENS = 65536


def linear_std(width: int) -> float:
    """Spread of a linear layer's initial weights: BERT's and timm's 0.02 at width 768, more in narrow towers.

    With 0.02 at width 128 a text tower needs several times the steps to tell one plane from another.
    """
    return 0.02 * math.sqrt(768 / width)


def check_sizes(where: str, width: int, layers: int, heads: int, mlp_ratio: float) -> None:
    """Raises UserError unless the sizes describe a transformer of sane size."""
    check_range(f"{where}.width", width, 1, MAX_WIDTH)
    check_range(f"{where}.layers", layers, 1, MAX_LAYERS)
    check_range(f"{where}.heads", heads, 1, width)
    if width % heads:
        raise UserError(f"{where}.width {width} is not a multiple of {where}.heads {heads}")
    check_range(f"{where}.mlp_ratio", mlp_ratio, 1.0 / width, 64)


def check_range(name: str, value: float, lowest: float, highest: float) -> None:
    """Raises UserError unless lowest <= value <= highest, and value is a whole number where lowest is an int."""
    kinds = int if isinstance(lowest, int) else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not lowest <= value <= highest:
        whole = "a whole number" if kinds is int else "a number"
        raise UserError(f"{name} is {value!r}; it must be {whole} from {lowest:g} to {highest:g}")


def mlp_width(width: int, mlp_ratio: float) -> int:
    return round(width * mlp_ratio)


class PreNormLayer(nn.Module):
    """x + proj(attention(norm1(x))), then x + fc2(gelu(fc1(norm2(x)))): the layer of ViT and GPT."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, norm_eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.fc1 = nn.Linear(width, mlp_width(width, mlp_ratio))
        self.fc2 = nn.Linear(mlp_width(width, mlp_ratio), width)

    def forward(self, x: Tensor, *, causal: bool = False, only_first: bool = False) -> Tensor:
        """(B, N, D) -> (B, N, D), or (B, 1, D) where only the first token's output is wanted.

        Every token is a key of the first token's query, but the projection and the MLP of the others are
        never read after the last layer: skipping them is exact.
        """
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        attended = fused_attention(qkv, causal=causal).flatten(2)
        if only_first:
            x, attended = x[:, :1], attended[:, :1]
        x = x + self.proj(attended)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class PostNormLayer(nn.Module):
    """h = norm1(x + proj(attention(x))), then norm2(h + fc2(gelu(fc1(h)))): the layer of BERT."""

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float,
        norm_eps: float,
        dropout: float,
        attention_dropout: float,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.attention_dropout = attention_dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.fc1 = nn.Linear(width, mlp_width(width, mlp_ratio))
        self.fc2 = nn.Linear(mlp_width(width, mlp_ratio), width)
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, key_mask: Tensor, *, only_first: bool = False) -> Tensor:
        """(B, N, D), (B, N) bool -> (B, N, D), or (B, 1, D) as in `PreNormLayer`."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        dropout_p = self.attention_dropout if self.training else 0.0
        attended = fused_attention(qkv, key_mask, dropout_p=dropout_p).flatten(2)
        if only_first:
            x, attended = x[:, :1], attended[:, :1]
        x = self.norm1(x + self.dropout(self.proj(attended)))
        return self.norm2(x + self.dropout(self.fc2(F.gelu(self.fc1(x)))))
