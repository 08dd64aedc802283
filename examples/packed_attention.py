"""Attention over captions of different lengths: packed tokens against a padded batch.

python examples/packed_attention.py
"""

import time

import torch
from torch.nn.functional import scaled_dot_product_attention

from bclip_fast import ops

torch.manual_seed(0)
lengths = torch.tensor([30, 78, 12, 256, 64, 101, 9, 45])
num_heads, head_dim, longest = 12, 64, int(lengths.max())
cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()

# Queries, keys and values of all tokens, without padding: (T, 3, heads, head_dim).
qkv = torch.randn(int(lengths.sum()), 3, num_heads, head_dim)
start = time.perf_counter()
packed = ops.varlen_attention(qkv, cu_seqlens, longest)
packed_ms = (time.perf_counter() - start) * 1e3

# The same captions as a padded batch with a mask: (captions, heads, longest, head_dim).
padded = torch.zeros(len(lengths), longest, 3, num_heads, head_dim)
mask = torch.arange(longest) < lengths[:, None]
padded[mask] = qkv
start = time.perf_counter()
expected = scaled_dot_product_attention(*padded.permute(2, 0, 3, 1, 4), attn_mask=mask[:, None, None])
padded_ms = (time.perf_counter() - start) * 1e3

difference = (packed - expected.transpose(1, 2)[mask]).abs().max().item()
print(f"{len(qkv)} tokens instead of {mask.numel()}: {packed_ms:.1f} ms instead of {padded_ms:.1f} ms")
print(f"largest difference: {difference:.0e}")
