"""The random numbers of every dropout (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3")."""

from __future__ import annotations

import torch
from torch import Tensor


def philox(counter: tuple[Tensor, ...], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10 of four int64 tensors that broadcast, each holding numbers modulo 2^32."""
    mask = 0xFFFFFFFF
    a, b, c, d = torch.broadcast_tensors(*(word & mask for word in counter))
    for i in range(10):
        # A product's upper half is right although int64 wraps: the shift's sign extension is masked away.
        first, second = 0xD2511F53 * a, 0xCD9E8D57 * c
        left, right = key[0] + i * 0x9E3779B9 & mask, key[1] + i * 0xBB67AE85 & mask
        a, b, c, d = (second >> 32 & mask) ^ b ^ left, second & mask, (first >> 32 & mask) ^ d ^ right, first & mask
    return a, b, c, d
