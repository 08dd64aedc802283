"""The random numbers of every dropout (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3")."""

from __future__ import annotations

import torch
from torch import Tensor


def philox(counter: tuple[Tensor, ...], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10 of four int64 tensors, which broadcast and hold numbers modulo 2^32."""
    mask = 0xFFFFFFFF
    a, b, c, d = torch.broadcast_tensors(*(word & mask for word in counter))
    for i in range(10):
        # int64 wraps, but a product's upper half is still right: the mask removes the shift's sign extension.
        first, second = 0xD2511F53 * a, 0xCD9E8D57 * c
        left, right = key[0] + i * 0x9E3779B9 & mask, key[1] + i * 0xBB67AE85 & mask
        a, b, c, d = (second >> 32 & mask) ^ b ^ left, second & mask, (first >> 32 & mask) ^ d ^ right, first & mask
    return a, b, c, d


def key_of(seed: Tensor) -> tuple[int, int]:
    """The two 32-bit words of Philox's key for a 0-dimensional int64 seed."""
    seed_bits = int(seed)
    return seed_bits & 0xFFFFFFFF, seed_bits >> 32 & 0xFFFFFFFF


def threshold_of(dropout_p: float) -> int:
    """The number below which a 32-bit random word drops its element."""
    return int(dropout_p * 2**32)


def seed_tensor(seed: Tensor | int | None) -> Tensor:
    """The seed as a 0-dimensional int64 tensor. None draws one from torch's CPU generator."""
    if isinstance(seed, Tensor):
        return seed
    if seed is None:
        return torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu")
    return torch.tensor(seed, dtype=torch.int64, device="cpu")


def gpu_arguments(device: torch.device, dropout_p: float, seed: Tensor | None) -> tuple[Tensor | None, int, float]:
    """Seed, threshold and the factor of kept elements, as GPU kernels take them.

    A kernel reads the seed on its device, because a CUDA graph may replay the call with another seed.
    """
    if seed is None:
        return None, 0, 1.0
    return seed.to(device, non_blocking=True), threshold_of(dropout_p), 1 / (1 - dropout_p)
