"""Attention of queries to the tokens of another sequence: CoCa's pool and decoder, and METER's head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bclip_fast.ops import linear
from bclip_fast.ops.processor import lacks_bfloat16

from .transformer import Linear, Norm


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """torch's attention of (B, H, N, d) over (B, H, M, d), in float32 on a CPU without bfloat16 instructions."""
    dtype = query.dtype
    if dtype != torch.bfloat16 or not lacks_bfloat16(query.device):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
    with torch.autocast("cpu", enabled=False):
        query, key, value = query.float(), key.float(), value.float()
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout).to(dtype)


class CrossProjection(nn.Module):
    """The projections of one sequence to queries and of another to keys and values.

    Its parameters are those of torch's MultiheadAttention: `weight` (3 D, D) if both sequences have the width D, and
    otherwise `query_weight` (D, D) and `key_value_weight` (2 D, context width). `bias` is (3 D,).
    """

    def __init__(self, width: int, context_width: int) -> None:
        super().__init__()
        self.is_square = context_width == width
        if self.is_square:
            self.weight = nn.Parameter(torch.empty(3 * width, width))
        else:
            self.query_weight = nn.Parameter(torch.empty(width, width))
            self.key_value_weight = nn.Parameter(torch.empty(2 * width, context_width))
        for weight in self.parameters():
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        self.bias = nn.Parameter(torch.zeros(3 * width))

    def forward(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """(T, D) and (M, context width) -> queries (T, D), and keys and values (M, 2 D)."""
        sizes = [x.shape[-1], 2 * x.shape[-1]]
        if self.is_square:
            query_weight, key_value_weight = self.weight.split(sizes)
        else:
            query_weight, key_value_weight = self.query_weight, self.key_value_weight
        query_bias, key_value_bias = self.bias.split(sizes)
        return linear(x, query_weight, query_bias), linear(context, key_value_weight, key_value_bias)


class AttentionPool(nn.Module):
    """CoCa's pool in open_clip's form: learned queries attend to an image's tokens (arXiv 2205.01917, section 3.2).

    One pool serves both tasks. Its first query gives the embedding, and the decoder reads the others.

    Args:
        width: width of the queries and of the output.
        context_width: width of the image's tokens.
    """

    def __init__(self, num_queries: int, width: int, context_width: int, heads: int, norm_eps: float) -> None:
        super().__init__()
        self.num_queries, self.heads = num_queries, heads
        self.query = nn.Parameter(torch.randn(num_queries, width))
        self.query_norm = Norm(width, norm_eps)
        self.token_norm = Norm(context_width, norm_eps)
        self.projection = CrossProjection(width, context_width)
        self.proj = Linear(width, width)

    def forward(self, stream: Tensor, branch: Tensor | None, num_tokens: int, num_queries: int) -> Tensor:
        """Pool the tokens stream + branch of n images, (n num_tokens, context width) -> (n, num_queries, width).

        Only the first `num_queries` queries are computed.
        """
        query, key_value = self.projection(
            self.query_norm(self.query[:num_queries])[0], self.token_norm(stream, branch)[0]
        )
        query = query.unflatten(-1, (self.heads, -1)).transpose(0, 1)
        key, value = key_value.unflatten(0, (-1, num_tokens)).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = dense_attention(query.expand(key.shape[0], -1, -1, -1), key, value)
        return self.proj(attended.transpose(1, 2).flatten(2))
