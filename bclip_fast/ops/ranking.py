"""Calls of csrc/ranking.h: which dot products exceed a bound. No operator: what it returns has no shape beforehand."""

from __future__ import annotations

import torch
from torch import Tensor

from .cuda_device import address


def has_matrix_unit() -> bool:
    """Whether `screen` runs here: bfloat16 on the matrix unit of x86 (AMX)."""
    from bclip_fast import _cpu

    return _cpu.has_amx()


def screen(
    left: Tensor,
    right: Tensor,
    row_bounds: tuple[Tensor, Tensor],
    column_bounds: tuple[Tensor, Tensor],
    row_counts: Tensor,
    column_counts: Tensor,
    most: int,
) -> Tensor | None:
    """Adds to the counts of each row and column the dot products above its higher bound.

    Args:
        left, right: (n, D) and (m, D) bfloat16, contiguous.
        row_bounds, column_bounds: low and high, float32 (n,) and (m,).
        row_counts, column_counts: int64 (n,) and (m,).

    Returns:
        int64 (P,), for each pair between the bounds 4 (i m + j), + 1 where row i's are meant, + 2 where column j's.
        None if there are more than `most`: the counts mean nothing then.
    """
    from bclip_fast import _cpu

    (n, width), m = left.shape, len(right)
    found = _cpu.amx_screen(
        address(left, torch.bfloat16, n, width),
        address(right, torch.bfloat16, m, width),
        n,
        m,
        width,
        *(address(bound, torch.float32, n) for bound in row_bounds),
        *(address(bound, torch.float32, m) for bound in column_bounds),
        address(row_counts, torch.int64, n),
        address(column_counts, torch.int64, m),
        most,
        torch.get_num_threads(),
    )
    if len(found) > 8 * most:
        return None
    return torch.frombuffer(bytearray(found), dtype=torch.int64) if found else torch.empty(0, dtype=torch.int64)


def dot_products(left: Tensor, right: Tensor, pairs: Tensor) -> Tensor:
    """(P,) float64: the dot products of rows i of (n, D) and j of (m, D), float32, for pairs i m + j, int64 (P,)."""
    from bclip_fast import _cpu

    (n, width), m = left.shape, len(right)
    if len(pairs) and not 0 <= int(pairs.min()) <= int(pairs.max()) < n * m:
        raise ValueError(f"pairs must lie in [0, {n * m})")
    out = torch.empty(len(pairs), dtype=torch.float64)
    _cpu.dot_products(
        address(left, torch.float32, n, width),
        address(right, torch.float32, m, width),
        m,
        width,
        address(pairs, torch.int64, len(pairs)),
        len(pairs),
        address(out, torch.float64, len(pairs)),
        torch.get_num_threads(),
    )
    return out
