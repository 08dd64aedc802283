"""Calls of csrc/ranking.h, which finds dot products above a bound.

They are not operators, because the shape of the result depends on the values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .build_info import why_missing
from .pointers import address


def is_compiled() -> bool:
    """Whether this installation has the compiled module, which `dot_products` needs."""
    return why_missing("bclip_fast._cpu") is None


def has_matrix_unit() -> bool:
    """Whether `screen` can run: the processor has the matrix unit of x86 (AMX) for bfloat16."""
    if not is_compiled():
        return False
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
    """Count the dot products above the high bound of each row and column, and add them to the counts.

    Args:
        left, right: (n, D) and (m, D) bfloat16, contiguous.
        row_bounds, column_bounds: low and high bounds, float32 (n,) and (m,).
        row_counts, column_counts: int64 (n,) and (m,).
        most: limit of the number of pairs between bounds.

    Returns:
        int64 (P,): one code per pair (i, j) whose product lies between the bounds. The code is `4 * (i * m + j)`, plus
        1 within row i's bounds, plus 2 within column j's. None if there are more than `most` pairs. Then the counts are
        invalid.
    """
    from bclip_fast import _cpu

    (n, width), m = left.shape, len(right)
    codes = _cpu.amx_screen(
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
    if len(codes) > 8 * most:
        return None
    return torch.frombuffer(bytearray(codes), dtype=torch.int64) if codes else torch.empty(0, dtype=torch.int64)


def dot_products(left: Tensor, right: Tensor, pairs: Tensor) -> Tensor:
    """(P,) float64: dot products of row i of `left` (n, D) and row j of `right` (m, D), both float32.

    `pairs` is int64 (P,), with i * m + j for each pair.
    """
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
