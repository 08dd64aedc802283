"""The random numbers of every dropout (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3")."""

from __future__ import annotations

import torch
from torch import Tensor

from bclip_fast.errors import BackendError


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor | int, Tensor | int]) -> tuple[Tensor, ...]:
    """Philox4x32-10 of four int64 tensors, which broadcast and hold numbers modulo 2^32. `key_of` gives `key`."""
    mask = 0xFFFFFFFF
    a, b, c, d = torch.broadcast_tensors(*(word & mask for word in counter))
    for i in range(10):
        # int64 wraps, but a product's upper half is still right: the mask removes the shift's sign extension.
        first, second = 0xD2511F53 * a, 0xCD9E8D57 * c
        left, right = key[0] + i * 0x9E3779B9 & mask, key[1] + i * 0xBB67AE85 & mask
        a, b, c, d = (second >> 32 & mask) ^ b ^ left, second & mask, (first >> 32 & mask) ^ d ^ right, first & mask
    return a, b, c, d


def key_of(seed: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """The two 32-bit words of Philox's key for a 0-dimensional int64 seed, () int64 each, for tensors on `device`.

    Nothing waits for a GPU. A seed on the CPU stays there, because torch takes it as a number.
    """
    if seed.device.type != "cpu":
        seed = seed.to(device)
    return seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF


def unsigned_seed(seed: Tensor | None) -> int:
    """The seed modulo 2^64, as the C++ kernels take it. None gives 0."""
    return 0 if seed is None else int(seed) & (2**64 - 1)


def threshold_of(dropout_p: float) -> int:
    """The threshold for 32-bit random words. A word below it drops its element."""
    return int(dropout_p * 2**32)


def check_seed(seed: Tensor | int | None) -> None:
    """Raise ValueError if a seed is a tensor that is not 0-dimensional and int64."""
    if isinstance(seed, Tensor) and (seed.dim() != 0 or seed.dtype != torch.int64):
        raise ValueError(f"seed must be a 0-dimensional int64 tensor, got {seed.dtype} of shape {tuple(seed.shape)}")


def seed_tensor(seed: Tensor | int | None) -> Tensor:
    """The seed as a 0-dimensional int64 tensor. None draws one from torch's CPU generator. Raises as `check_seed`."""
    check_seed(seed)
    if isinstance(seed, Tensor):
        return seed
    if seed is None:
        return torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu")
    return torch.tensor(seed, dtype=torch.int64, device="cpu")


def gpu_arguments(device: torch.device, dropout_p: float, seed: Tensor | None) -> tuple[Tensor | None, int, float]:
    """Seed, threshold and the factor of kept elements, as GPU kernels take them.

    A kernel reads the seed on its device, because a CUDA graph may replay the call with another seed.

    Raises:
        BackendError: a CUDA graph is being captured, and the seed is not on the GPU.
    """
    if seed is None:
        return None, 0, 1.0
    if seed.device.type == "cpu" and device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # CUDA refuses this copy with an error that names neither the seed nor a remedy.
        raise BackendError(
            "a CUDA graph cannot capture dropout whose seed is on the CPU: pass seed=, a 0-dimensional int64 tensor "
            f"on {device}, and write a new number into it before each replay"
        )
    return seed.to(device, non_blocking=True), threshold_of(dropout_p), 1 / (1 - dropout_p)
