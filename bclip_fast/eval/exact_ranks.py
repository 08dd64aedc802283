"""Exact counts of the similarities above a bound, for every row and column, by products in low precision.

The similarity of two embeddings is the dot product of their float32 numbers in float64. Most similarities are far from
the bounds, so a low-precision product with a known error bound decides them. The undecided ones are computed in
float64, one by one. Let a = a' + x and b = b' + y, where a' and b' are the low-precision numbers. Then

    |a.b - fl(a'.b')| <= |x| |b| + |a'| |y| + n 2^-23 sum_k |a'_k b'_k|,

by Cauchy and Schwarz, for n terms summed in float32 in any order (Higham, Accuracy and Stability of Numerical
Algorithms, section 3.1). The unit round-off is doubled, so that the bound also covers hardware that truncates. The code
measures |x| and |y|, and bounds the sum by |a'| |b'|. The steps, cheapest first:

    bfloat16     a' = h, rounded; n = D; error about 0.0033
    bfloat16x3   a' = h + l, rounded twice; h.h' + l.h' + h.l', n = 3 D; l.l' adds |l| |l'| to the error of about 2e-4
    float32      for devices without a matrix unit: a' = a, n = D; error about 6e-5
    float64      the definition: decides everything

If a step leaves more than 1/64 of a tile undecided, the next step computes the tile again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bclip_fast.ops import ranking

STEPS = ("bfloat16", "bfloat16x3", "float32", "float64")
# Upper bound of a norm: `check_embeddings` allows 1e-3, and rounding adds a little.
_NORM = 1.01
# Error of rounding the bounds to float32 and of measuring |x| in float32.
_SLACK = 2.0**-20
_BLOCK_ROWS, _BLOCK_COLUMNS = 1024, 8192
_PAIRS_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class LowPrecision:
    """A chunk of rows in low precision."""

    numbers: Tensor
    """The parts of the rows, concatenated: (n, D) or (n, 3 D)."""
    largest_residual: float = 0.0
    """Largest |x| of a row."""
    largest_low_part: float = 0.0
    """Largest |l| of a row."""


class Chunk:
    """Float32 rows (n, D) and their low-precision forms, computed on demand."""

    def __init__(self, rows: Tensor, is_left: bool) -> None:
        """is_left: whether the chunk is the left operand. The operands order their bfloat16x3 parts differently."""
        self.rows, self.is_left = rows.float().contiguous(), is_left
        self._cache: dict[str, LowPrecision] = {}

    def low_precision(self, step: str) -> LowPrecision:
        """Return the rows as `step` multiplies them."""
        if step not in self._cache:
            self._cache[step] = self._convert(step)
        return self._cache[step]

    def _convert(self, step: str) -> LowPrecision:
        if step == "float32":
            return LowPrecision(self.rows)
        high = self.rows.bfloat16()
        residual = self.rows - high
        if step == "bfloat16":
            return LowPrecision(high, _largest_norm(residual))
        low = residual.bfloat16()
        parts = (high, low, high) if self.is_left else (high, high, low)
        return LowPrecision(torch.cat(parts, dim=1), _largest_norm(residual - low), _largest_norm(low.float()))


def _largest_norm(rows: Tensor) -> float:
    return float(torch.linalg.vector_norm(rows, dim=1).max())


def error_bound(left: LowPrecision, right: LowPrecision) -> float:
    """Return a bound of |a.b - fl(a'.b')| for all rows a of `left` and b of `right`."""
    num_terms = left.numbers.shape[1]
    residuals = _NORM * (left.largest_residual + right.largest_residual)
    return residuals + left.largest_low_part * right.largest_low_part + num_terms * 2.0**-23 * 1.05 * _NORM**2 + _SLACK


def steps(device: torch.device) -> tuple[str, ...]:
    """Return those of `STEPS` that are worth trying on the device."""
    if device.type == "cpu" and ranking.has_matrix_unit():
        return "bfloat16", "bfloat16x3", "float64"
    return "float32", "float64"


@torch.inference_mode()
def count(
    queries: Tensor,
    candidates: Tensor,
    row_bounds: Tensor,
    column_bounds: Tensor,
    tolerance: float,
    *,
    query_chunk: int = 8192,
    candidate_chunk: int = 131072,
    allowed: Sequence[str] | None = None,
) -> tuple[Tensor, Tensor]:
    """Count the similarities that exceed and that reach the bound of each row, and of each column.

    Args:
        queries, candidates: (n, D) and (m, D), with norms within 1e-3 of 1.
        row_bounds, column_bounds: float64 (n,) and (m,).
        tolerance: a similarity exceeds a bound if it is above bound + tolerance. It reaches the bound if it is at
            least bound - tolerance.
        query_chunk, candidate_chunk: size of a tile.
        allowed: steps to take, `float64` last. Default: `steps(device)`.

    Returns:
        int64 (2, n) and (2, m) on the CPU: numbers of exceeding and of reaching similarities. The memory beyond the
        results is a few times that of a chunk of candidates.
    """
    allowed = steps(queries.device) if allowed is None else tuple(allowed)
    row_counts, column_counts = (torch.zeros(2, size, dtype=torch.int64) for size in (len(queries), len(candidates)))
    for columns in _slices(len(candidates), candidate_chunk):
        # Tiles are alike: if a step leaves too much undecided in one, skip it for the next ones.
        right, first_step = Chunk(candidates[columns], False), 0
        for rows in _slices(len(queries), query_chunk):
            left, bounds = Chunk(queries[rows], True), (row_bounds[rows], column_bounds[columns])
            counts, first_step = _count_tile(left, right, bounds, tolerance, allowed, first_step)
            row_counts[:, rows] += counts[0].cpu()
            column_counts[:, columns] += counts[1].cpu()
    return row_counts, column_counts


def _slices(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


Bounds = tuple[Tensor, Tensor]


def _count_tile(
    left: Chunk, right: Chunk, bounds: Bounds, tolerance: float, allowed: Sequence[str], first_step: int
) -> tuple[list[Tensor], int]:
    """Return the counts (2, n) and (2, m) of a tile, and the index of the step that decided it."""
    n, m = len(left.rows), len(right.rows)
    for number in range(first_step, len(allowed) - 1):
        left_low, right_low = left.low_precision(allowed[number]), right.low_precision(allowed[number])
        error = error_bound(left_low, right_low)
        intervals = [((bound - tolerance - error).float(), (bound + tolerance + error).float()) for bound in bounds]
        certain = [torch.zeros(size, dtype=torch.int64) for size in (n, m)]
        screen: Any = _screen if allowed[number] == "float32" else ranking.screen
        max_pairs = 64 + n * m // 64
        pairs = screen(
            left_low.numbers, right_low.numbers, intervals[0], intervals[1], certain[0], certain[1], max_pairs
        )
        if pairs is not None:
            counts = [part.expand(2, -1).clone() for part in certain]
            _add_undecided(left.rows, right.rows, pairs, bounds, tolerance, counts)
            return counts, number
    counts = [torch.zeros(2, size, dtype=torch.int64) for size in (n, m)]
    for rows in _slices(n, _BLOCK_ROWS):
        left_block = left.rows[rows].double()
        for columns in _slices(m, _BLOCK_COLUMNS):
            scores = left_block @ right.rows[columns].double().T
            for result, bound, part, dim in ((counts[0], bounds[0], rows, 1), (counts[1], bounds[1], columns, 0)):
                limit = bound[part].unsqueeze(dim)
                result[0, part] += count_true(scores > limit + tolerance, dim)
                result[1, part] += count_true(scores >= limit - tolerance, dim)
    return counts, len(allowed) - 1


def _screen(
    left: Tensor,
    right: Tensor,
    row_intervals: Bounds,
    column_intervals: Bounds,
    row_counts: Tensor,
    column_counts: Tensor,
    max_pairs: int,
) -> Tensor | None:
    """Do the same as `ops.ranking.screen` with torch's matmul, on any device."""
    m, num, pairs = len(right), 0, []
    for rows in _slices(len(left), _BLOCK_ROWS):
        for columns in _slices(m, _BLOCK_COLUMNS):
            scores = left[rows] @ right[columns].T
            flags: Tensor | None = None
            for (low, high), part, dim, counts, bit in (
                (row_intervals, rows, 1, row_counts, 1),
                (column_intervals, columns, 0, column_counts, 2),
            ):
                above = scores > high[part].unsqueeze(dim)
                counts[part] += count_true(above, dim)
                undecided = (scores >= low[part].unsqueeze(dim)).logical_xor_(above).view(torch.uint8)
                flags = undecided if flags is None else flags.add_(undecided, alpha=bit)
            assert flags is not None
            i, j = flags.nonzero(as_tuple=True)
            num += len(i)
            if num > max_pairs:
                return None
            pairs.append(4 * ((i + rows.start) * m + j + columns.start) + flags[i, j])
    return torch.cat(pairs)


def _add_undecided(
    left: Tensor, right: Tensor, pairs: Tensor, bounds: Bounds, tolerance: float, counts: Sequence[Tensor]
) -> None:
    """Decide the pairs that `ops.ranking.screen` left undecided, and add them to the counts of rows and columns."""
    positions = pairs >> 2
    scores = dot_products(left, right, positions)
    indices = positions // len(right), positions % len(right)
    for bit, index, bound, result in zip((1, 2), indices, bounds, counts, strict=True):
        is_undecided = (pairs & bit) != 0
        selected = index[is_undecided]
        excess = scores[is_undecided] - bound[selected]
        result[0] += selected[excess > tolerance].bincount(minlength=len(bound)).cpu()
        result[1] += selected[excess >= -tolerance].bincount(minlength=len(bound)).cpu()


def dot_products(left: Tensor, right: Tensor, pairs: Tensor) -> Tensor:
    """Return the dot products of float32 rows (n, D) and (m, D) for pairs i m + j, float64 (P,)."""
    if left.device.type == "cpu" and ranking.is_compiled():
        return ranking.dot_products(left, right, pairs)
    chunks = (pairs[chunk] for chunk in _slices(len(pairs), _PAIRS_AT_ONCE))
    sums = [(left[chunk // len(right)].double() * right[chunk % len(right)].double()).sum(1) for chunk in chunks]
    return torch.cat(sums) if sums else left.new_empty(0, dtype=torch.float64)


def count_true(mask: Tensor, dim: int) -> Tensor:
    """Count the true values of a bool mask (n, m) along `dim`, at most 32640 of them. Returns int64 on the CPU."""
    if mask.device.type != "cpu":
        return mask.sum(dim).cpu()
    # numpy vectorises sums of up to 128 bytes in uint8, which is 50 times as fast as torch's sum of bool.
    values = mask.numpy().view(np.uint8)
    num = values.shape[dim]
    num_in_blocks = num - num % 128
    if dim == 0:
        blocks = values[:num_in_blocks].reshape(-1, 128, values.shape[1])
        sums = np.add.reduce(blocks, axis=1, dtype=np.uint8)
    else:
        blocks = values[:, :num_in_blocks].reshape(len(values), 128, -1)
        sums = np.add.reduce(blocks, axis=1, dtype=np.uint8)
        if num_in_blocks > 255 * 128:
            raise ValueError(f"{num} columns are too many for sums in uint8, at most 32640 are possible")
    rest = values[num_in_blocks:] if dim == 0 else values[:, num_in_blocks:]
    return torch.from_numpy(sums.sum(dim, dtype=np.int64) + rest.sum(dim, dtype=np.int64))
