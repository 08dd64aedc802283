"""Checks that both attention operators make."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from bclip_fast.ops.philox import check_seed, seed_tensor


def cpu_limits(operand: Tensor, *_: object) -> str | None:
    """The reason why the C++ kernels cannot take an operand (..., d), or None."""
    if operand.device.type != "cpu":
        return f"the input is on {operand.device}"
    if operand.dtype not in (torch.float32, torch.bfloat16):
        return f"{operand.dtype} is neither float32 nor bfloat16"
    if operand.shape[-1] % 16:
        return f"the head dimension {operand.shape[-1]} is not a multiple of 16"
    return None


def checked_dropout(
    name: str, operand: Tensor, dropout_p: float, seed: Tensor | int | None, scale: float | None
) -> tuple[Tensor | None, float]:
    """Seed (None without dropout) and scale as the backends take them, for the operand `name` of shape (..., d)."""
    if not operand.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {operand.dtype}")
    if operand.shape[-1] == 0:
        raise ValueError(f"{name} must have a head dimension of at least 1, got {tuple(operand.shape)}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must lie in [0, 1), got {dropout_p}")
    check_seed(seed)
    scale = operand.shape[-1] ** -0.5 if scale is None else scale
    return seed_tensor(seed) if dropout_p else None, scale


def has_values(*indices: Tensor) -> bool:
    """Whether the values of indices on the CPU can be read. Fake tensors, of which a plan or a graph is made, may have
    none."""
    try:
        for index in indices:
            if type(index) is not Tensor:
                index.tolist()
    except RuntimeError:
        return False
    return True


def check_sequences(cu_seqlens: Tensor, num_rows: int, max_seqlen: int) -> None:
    """Raise ValueError unless the sequences own all rows and none is longer than `max_seqlen`."""
    if not has_values(cu_seqlens):
        return
    bounds = cu_seqlens.tolist()
    lengths = [stop - start for start, stop in itertools.pairwise(bounds)]
    if bounds[0] != 0 or bounds[-1] != num_rows or min(lengths, default=0) < 0:
        raise ValueError(f"cu_seqlens must rise from 0 to T = {num_rows}, got {bounds[:4]} ... {bounds[-1]}")
    longest = max(lengths, default=0)
    if longest > max_seqlen:
        raise ValueError(f"max_seqlen is {max_seqlen}, but the longest sequence has {longest} tokens")


def check_rows(rows: Tensor, cu_seqlens: Tensor, num_tokens: int) -> None:
    """Raise ValueError unless the sequences own all tokens and each row lies in its sequence."""
    starts, stops = cu_seqlens[:-1], cu_seqlens[1:]
    if not has_values(rows, starts):
        return
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != num_tokens:
        raise ValueError(
            f"cu_seqlens must rise from 0 to T = {num_tokens}, got {int(cu_seqlens[0])} to {cu_seqlens[-1]}"
        )
    outside = ((rows < starts) | (rows >= stops)).nonzero()
    if len(outside):
        i = int(outside[0])
        raise ValueError(f"rows[{i}] is {rows[i]}, but sequence {i} owns rows {starts[i]} to {stops[i]}")
