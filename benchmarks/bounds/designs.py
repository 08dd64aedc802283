"""Designs of kernels that nobody has compiled, counted by hand, to decide whether they are worth building.

Attention with wgmma on sm_90 takes tiles of 64 rows. A left operand of 64 x 16 comes from shared memory or from
registers, and a right one of 16 x N from shared memory. The counts are the least that such a kernel needs: products,
exponentials, the arithmetic of a score, and transfers through shared memory. Loads by TMA cost no issue slots there.
All of it overlaps perfectly, so the bounds are more optimistic than those of compiled kernels.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

from .mix import Mix
from .model import Work
from .shapes import ATTENTION


def works() -> Iterator[Work]:
    """Yield the forward and backward pass of attention with wgmma at each shape."""
    for attention in ATTENTION:
        for kernel, count in (("forward", _forward), ("backward", _backward)):
            mix = count(attention.tokens, attention.dim)
            yield Work(
                kernel=f"attention_{kernel}",
                backend="wgmma design",
                architecture="90",
                phases=(Counter(), mix, Counter()),
                bodies={},
                threads=128,  # the counts are those of a block, as if it were one group of four warps
                registers=128,
                shared=0,
                **attention.work(kernel, attention.heads * attention.sequences),
            )


def _forward(tokens: int, dim: int) -> Mix:
    """Return the mix of an average warp: S = Q K^T, the softmax, and O = P V with P in registers."""
    mix = _scores(tokens, dim, products=1)
    _add(mix, _reduction(tokens, dim, from_registers=True))
    elements = _elements(tokens)
    # FP32: scale and offset, and the sum. INT: the maximum, and half of a conversion to float16.
    mix.update({"MUFU.EX2": elements, "FP32": 2 * elements, "INT": 1.5 * elements})
    return _with_copies(mix, tokens, dim, tensors=4)


def _backward(tokens: int, dim: int) -> Mix:
    """Return the mix of an average warp: S^T and dP^T, then dV and dK from registers, and dQ from shared memory."""
    mix = _scores(tokens, dim, products=2)
    for from_registers in (True, True, False):
        _add(mix, _reduction(tokens, dim, from_registers))
    elements = _elements(tokens)
    # FP32: scale and offset, the difference with delta, and a product. INT: half a conversion of P, and half of dS.
    mix.update({"MUFU.EX2": elements, "FP32": 3 * elements, "INT": elements})
    mix["STSM"] += elements * 32 * 2 / 512  # type: ignore[assignment]
    return _with_copies(mix, tokens, dim, tensors=7)


def _scores(tokens: int, dim: int, products: int) -> Mix:
    """Return products of all rows with all rows. N is a multiple of 8 up to 256."""
    parts = math.ceil(tokens / 256)
    columns = 8 * math.ceil(tokens / parts / 8)
    return Counter({f"HGMMA.64x{columns}x16": products * _rows(tokens) * parts * dim // 16})


def _reduction(tokens: int, dim: int, from_registers: bool) -> Mix:
    """Return a product of scores with rows."""
    suffix = ".R" if from_registers else ""
    return Counter({f"HGMMA.64x{dim}x16{suffix}": _rows(tokens) * math.ceil(tokens / 16)})


def _rows(tokens: int) -> int:
    """Return the number of tiles of 64 rows."""
    return math.ceil(tokens / 64)


def _elements(tokens: int) -> float:
    """Return the scores of a lane: those of a block over its 128 lanes."""
    return _rows(tokens) * 64 * 8 * math.ceil(tokens / 8) / 128


def _with_copies(mix: Mix, tokens: int, dim: int, tensors: int) -> Mix:
    """Add the copies of `tensors` tensors of rows between global and shared memory, 512 bytes an instruction."""
    mix["LDGSTS.128"] += tensors * tokens * dim * 2 / 512 / 4  # type: ignore[assignment]
    return mix


def _add(mix: Mix, other: Mix) -> None:
    mix.update(other)
