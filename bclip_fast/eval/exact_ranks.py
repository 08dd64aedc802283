"""How many similarities exceed a bound of their row, and of their column: exact counts from products in low precision.

The similarity of two embeddings is the dot product of their float32 numbers in float64. Nearly all of them are far
from the bounds, and a product in low precision with a bound on its error decides them; those that it leaves open are
computed in float64, one by one. With a = a' + x and b = b' + y, where a', b' are what the low precision holds,

    |a.b - fl(a'.b')| <= |x| |b| + |a'| |y| + n 2^-23 sum_k |a'_k b'_k|,

by Cauchy and Schwarz, and for n terms summed in float32 in any order (Higham, Accuracy and Stability of Numerical
Algorithms, section 3.1, with twice the unit round-off, so that truncating hardware is covered). |x| and |y| are
measured, the sum is at most |a'| |b'|. In rising order of cost:

    bfloat16     a' = h, rounded; n = D, error about 0.0033
    bfloat16x3   a' = h + l, twice rounded; h.h' + l.h' + h.l', n = 3 D; l.l' adds |l| |l'| to the error of about 2e-4
    float32      where there is no matrix unit: a' = a, n = D, error about 6e-5
    float64      the definition: nothing is open

A tile of which a step leaves more than a 64th open is given to the next step.
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
# Beyond it a query's or candidate's norm isn't 1: `check_embeddings`, and what rounding adds.
_NORM = 1.01
# What rounding the bounds to float32, and measuring |x| in it, may add to an error.
_SLACK = 2.0**-20
_BLOCK_ROWS, _BLOCK_COLUMNS = 1024, 8192
_PAIRS_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class Low:
    """A chunk's numbers in low precision; rest and small: the largest |x| and |l| of a row."""

    numbers: Tensor
    rest: float = 0.0
    small: float = 0.0
    num_parts: int = 1


class Chunk:
    """Rows (n, D) of float32 and what the steps make of them."""

    def __init__(self, rows: Tensor, is_left: bool) -> None:
        self.rows, self.is_left = rows.float().contiguous(), is_left
        self._low: dict[str, Low] = {}

    def low(self, step: str) -> Low:
        if step not in self._low:
            self._low[step] = self._make(step)
        return self._low[step]

    def _make(self, step: str) -> Low:
        if step == "float32":
            return Low(self.rows)
        high = self.rows.bfloat16()
        rest = self.rows - high
        if step == "bfloat16":
            return Low(high, _largest_norm(rest))
        low = rest.bfloat16()
        parts = (high, low, high) if self.is_left else (high, high, low)
        return Low(torch.cat(parts, dim=1), _largest_norm(rest - low), _largest_norm(low.float()), 3)


def _largest_norm(rows: Tensor) -> float:
    return float(torch.linalg.vector_norm(rows, dim=1).max())


def error_bound(left: Low, right: Low) -> float:
    """On |a.b - fl(a'.b')| for every row of the one and of the other."""
    num_terms = left.numbers.shape[1]
    return _NORM * (left.rest + right.rest) + left.small * right.small + num_terms * 2.0**-23 * 1.05 * _NORM**2 + _SLACK


def steps(device: torch.device) -> tuple[str, ...]:
    """Those of `STEPS` that are worth trying there."""
    if device.type == "cpu" and ranking.has_matrix_unit():
        return "bfloat16", "bfloat16x3", "float64"
    return "float32", "float64"


@torch.inference_mode()
def count(
    queries: Tensor,
    candidates: Tensor,
    rows: Tensor,
    columns: Tensor,
    tolerance: float,
    *,
    query_chunk: int = 8192,
    candidate_chunk: int = 131072,
    allowed: Sequence[str] | None = None,
) -> tuple[Tensor, Tensor]:
    """Of each row and of each column of the similarities, how many exceed its bound, and how many reach it.

    Args:
        queries, candidates: (n, D) and (m, D), of norm 1 within 1e-3.
        rows, columns: the bounds, float64 (n,) and (m,).
        tolerance: similarities s beyond `bound + tolerance` exceed it, those from `bound - tolerance` on reach it.
        allowed: steps to take, `float64` last; those of the device unless given.

    Returns:
        int64 (2, n) and (2, m) on the CPU: exceeding, reaching. Memory is a few times
            that of a chunk of candidates, and what is returned.
    """
    allowed = steps(queries.device) if allowed is None else tuple(allowed)
    results = [torch.zeros(2, size, dtype=torch.int64) for size in (len(queries), len(candidates))]
    for right in _slices(len(candidates), candidate_chunk):
        chunk, first = Chunk(candidates[right], False), 0
        for left in _slices(len(queries), query_chunk):
            # Tiles are alike: where a step left too much open, it isn't tried on the next.
            found, first = _tile(
                Chunk(queries[left], True), chunk, (rows[left], columns[right]), tolerance, allowed, first
            )
            results[0][:, left] += found[0].cpu()
            results[1][:, right] += found[1].cpu()
    return results[0], results[1]


def _slices(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


Bounds = tuple[Tensor, Tensor]


def _tile(
    left: Chunk, right: Chunk, bounds: Bounds, tolerance: float, allowed: Sequence[str], first: int
) -> tuple[list[Tensor], int]:
    """(2, n) and (2, m) of a tile, and the index of the step that did it."""
    n, m = len(left.rows), len(right.rows)
    for number in range(first, len(allowed) - 1):
        one, two = left.low(allowed[number]), right.low(allowed[number])
        error = error_bound(one, two)
        outer = [((bound - tolerance - error).float(), (bound + tolerance + error).float()) for bound in bounds]
        sure = [torch.zeros(size, dtype=torch.int64) for size in (n, m)]
        screen: Any = _screen if allowed[number] == "float32" else ranking.screen
        pairs = screen(one.numbers, two.numbers, outer[0], outer[1], sure[0], sure[1], 64 + n * m // 64)
        if pairs is not None:
            found = [part.expand(2, -1).clone() for part in sure]
            _settle(left.rows, right.rows, pairs, bounds, tolerance, found)
            return found, number
    found = [torch.zeros(2, size, dtype=torch.int64) for size in (n, m)]
    for top in _slices(n, _BLOCK_ROWS):
        own = left.rows[top].double()
        for part in _slices(m, _BLOCK_COLUMNS):
            scores = own @ right.rows[part].double().T
            for result, bound, at, dim in ((found[0], bounds[0], top, 1), (found[1], bounds[1], part, 0)):
                limit = bound[at].unsqueeze(dim)
                result[0, at] += count_true(scores > limit + tolerance, dim)
                result[1, at] += count_true(scores >= limit - tolerance, dim)
    return found, len(allowed) - 1


def _screen(
    left: Tensor, right: Tensor, rows: Bounds, columns: Bounds, row_counts: Tensor, column_counts: Tensor, most: int
) -> Tensor | None:
    """As `ops.ranking.screen`, by the library's matmul, wherever the tensors are."""
    m, num, pairs = len(right), 0, []
    for top in _slices(len(left), _BLOCK_ROWS):
        for part in _slices(m, _BLOCK_COLUMNS):
            scores = left[top] @ right[part].T
            flags: Tensor | None = None
            for (low, high), at, dim, counts, bit in (
                (rows, top, 1, row_counts, 1),
                (columns, part, 0, column_counts, 2),
            ):
                above = scores > high[at].unsqueeze(dim)
                counts[at] += count_true(above, dim)
                undecided = (scores >= low[at].unsqueeze(dim)).logical_xor_(above).view(torch.uint8)
                flags = undecided if flags is None else flags.add_(undecided, alpha=bit)
            assert flags is not None
            i, j = flags.nonzero(as_tuple=True)
            num += len(i)
            if num > most:
                return None
            pairs.append(4 * ((i + top.start) * m + j + part.start) + flags[i, j])
    return torch.cat(pairs)


def _settle(
    left: Tensor, right: Tensor, pairs: Tensor, bounds: Bounds, tolerance: float, found: Sequence[Tensor]
) -> None:
    """Adds what is undecided, as `ops.ranking.screen` returns it, to the counts of rows and of columns."""
    places = pairs >> 2
    scores = dot_products(left, right, places)
    indices = places // len(right), places % len(right)
    for bit, index, bound, result in zip((1, 2), indices, bounds, found, strict=True):
        meant = (pairs & bit) != 0
        at = index[meant]
        beyond = scores[meant] - bound[at]
        result[0] += at[beyond > tolerance].bincount(minlength=len(bound)).cpu()
        result[1] += at[beyond >= -tolerance].bincount(minlength=len(bound)).cpu()


def dot_products(left: Tensor, right: Tensor, pairs: Tensor) -> Tensor:
    """(P,) float64 for pairs i m + j of float32 rows (n, D) and (m, D)."""
    if left.device.type == "cpu":
        return ranking.dot_products(left, right, pairs)
    parts = (pairs[part] for part in _slices(len(pairs), _PAIRS_AT_ONCE))
    sums = [(left[part // len(right)].double() * right[part % len(right)].double()).sum(1) for part in parts]
    return torch.cat(sums) if sums else left.new_empty(0, dtype=torch.float64)


def count_true(mask: Tensor, dim: int) -> Tensor:
    """True values of (n, m) bool along `dim`, int64 on the CPU. At most 32640 in each."""
    if mask.device.type != "cpu":
        return mask.sum(dim).cpu()
    # Bytes are summed as bytes, up to 128 at a time, where numpy vectorises: 50 times as fast as torch's sum of bool.
    values = mask.numpy().view(np.uint8)
    num = values.shape[dim]
    whole = num - num % 128
    if dim == 0:
        parts = np.add.reduce(values[:whole].reshape(-1, 128, values.shape[1]), axis=1, dtype=np.uint8)
    else:
        parts = np.add.reduce(values[:, :whole].reshape(len(values), 128, -1), axis=1, dtype=np.uint8)
        if whole > 255 * 128:
            raise ValueError(f"{num} columns are too many for counts in bytes")
    rest = values[whole:] if dim == 0 else values[:, whole:]
    return torch.from_numpy(parts.sum(dim, dtype=np.int64) + rest.sum(dim, dtype=np.int64))
