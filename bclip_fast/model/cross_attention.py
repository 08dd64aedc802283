"""Attention of queries to the tokens of another sequence: CoCa's pool and decoder, and METER's head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bclip_fast.ops import linear
from bclip_fast.ops.processor import lacks_bfloat16


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

    Its parameters are those of torch's MultiheadAttention. If both sequences have the width D, they are `weight`
    (3 D, D) and `bias` (3 D,). Otherwise, `query_weight` (D, D) and `key_value_weight` (2 D, context width) replace
    `weight`.
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
