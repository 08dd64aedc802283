"""One call of the cpu kernel of every operator, as a function of one tensor."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bclip_fast import ops

BOUNDS, ROWS = torch.tensor([0, 5], dtype=torch.int32), torch.tensor([2])
WEIGHT, KEY_VALUE, TEXT = torch.randn(3, 16), torch.randn(5, 2, 2, 16), F.normalize(torch.randn(6, 8), dim=1)

# Per operator: a function of one tensor, that tensor's shape, and the operator's name in torch.
OPERATORS = {
    "gelu": (lambda x: ops.gelu(x, backend="cpu"), (4, 16)),
    "add_norm": (
        lambda x: ops.add_norm(x, 2 * x, torch.ones(16), torch.zeros(16), 1e-6, backend="cpu")[0],
        (4, 16),
    ),
    "linear": (lambda x: ops.linear(x.bfloat16(), WEIGHT, backend="cpu").float(), (4, 16)),
    "attention": (lambda qkv: ops.fused_attention(qkv, backend="cpu"), (1, 5, 3, 2, 16)),
    "pooled_attention": (
        lambda query: ops.single_query_attention(query, KEY_VALUE, ROWS, BOUNDS, backend="cpu"),
        (1, 2, 16),
    ),
    "clip_loss": (lambda image: ops.clip_loss(image, TEXT, 10.0, backend="cpu"), (6, 8)),
    "siglip_loss": (lambda image: ops.siglip_loss(image, TEXT, 10.0, backend="cpu"), (6, 8)),
}
