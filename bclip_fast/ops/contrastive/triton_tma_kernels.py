"""The Triton kernels for sm_90, which read features through tensor descriptors (TMA): the forward pass.

The losses, the partial results and the order of sums are those of triton_kernels.py. Three things differ.

The tensor memory accelerator copies tiles of features to shared memory, and one thread starts each copy. It reads
zeros past the end of a tensor, so no thread computes addresses or masks. A program of 8 warps takes at most 128
registers per thread, so two programs share a multiprocessor. One reduces its tile while the other one multiplies.

`_forward_kernel` has no second path for a tile whose sums lose digits. It writes a vote for each tile. `_redo_kernel`
computes the tiles that voted again, with the maximum of each row and column as offset. Both paths in one kernel would
take 40 to 90 registers more. Few tiles vote: in such a tile, the highest logits of two rows differ by 46 or more.

The kernels take bfloat16 and float16. They multiply scale and log-sum-exps by log2(e), because the hardware computes
powers of two. They use no atomics. triton_tma_gradients.py has the backward pass.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_kernels import _tile_of_program

# Constants of a kernel must be constexpr.
_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _products(  # type: ignore[no-untyped-def]
    image,
    text,
    row,
    column,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """image[row : row + BLOCK_ROWS] @ text[column : column + BLOCK_COLUMNS].T in float32. Past the end, it is zero."""
    products = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for start in range(0, WIDTH, BLOCK_WIDTH):
        products = tl.dot(image.load([row, start]), text.load([column, start]).T, products)
    return products


@triton.jit
def _exponents(  # type: ignore[no-untyped-def]
    products, scale, rows, columns, num_rows, num_columns, first, HAS_POSITIVES: tl.constexpr
):
    """Logits times log2(e), and -inf for those that don't count."""
    counted = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    if HAS_POSITIVES:
        counted = counted & (columns[None, :] != (rows + first)[:, None])
    return tl.where(counted, products * (tl.load(scale) * _LOG2_E), float("-inf"))


@triton.jit
def _store_sums(  # type: ignore[no-untyped-def]
    partials, block, places, size, offsets, sums
):
    """Write the log-sum-exps of a tile's rows or columns, from offsets in powers of two."""
    values = offsets.to(tl.float64) * _LN_2 + tl.log(sums)
    tl.store(partials + block.to(tl.int64) * size + places, values, mask=places < size)


@triton.jit(do_not_specialize=["num_rows", "first"])
def _forward_kernel(  # type: ignore[no-untyped-def]
    image,
    text,
    scale,
    row_partials,
    column_partials,
    votes,
    num_rows,
    num_columns,
    first,
    HAS_POSITIVES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """row_partials and column_partials as in triton_kernels. votes (programs,): whether the tile's sums lose digits."""
    row_block, column_block = _tile_of_program(tl.program_id(0), num_rows, num_columns, BLOCK_ROWS, BLOCK_COLUMNS)
    row, column = row_block * BLOCK_ROWS, column_block * BLOCK_COLUMNS
    products = _products(image, text, row, column, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WIDTH, WIDTH)
    rows, columns = row + tl.arange(0, BLOCK_ROWS), column + tl.arange(0, BLOCK_COLUMNS)
    exponents = _exponents(products, scale, rows, columns, num_rows, num_columns, first, HAS_POSITIVES)
    # The bound avoids -inf - -inf in a tile without counted logits.
    offset = tl.maximum(tl.max(tl.max(exponents, 1), 0), -1e30)
    exponentials = tl.exp2(exponents - offset)
    row_sums = tl.sum(exponentials, 1)
    column_sums = tl.sum(exponentials, 0)
    # float32 flushes terms below 1e-37 of the tile's highest to zero, far below the last digit of such a sum.
    least = tl.minimum(
        tl.min(tl.where(rows < num_rows, row_sums, 1.0), 0),
        tl.min(tl.where(columns < num_columns, column_sums, 1.0), 0),
    )
    tl.store(votes + tl.program_id(0), (least < 1e-20).to(tl.int8))
    _store_sums(row_partials, column_block, rows, num_rows, offset, row_sums)
    _store_sums(column_partials, row_block, columns, num_columns, offset, column_sums)


@triton.jit(do_not_specialize=["num_rows", "num_tiles", "first"])
def _redo_kernel(  # type: ignore[no-untyped-def]
    image,
    text,
    scale,
    row_partials,
    column_partials,
    votes,
    num_rows,
    num_columns,
    num_tiles,
    first,
    HAS_POSITIVES: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Overwrite the partial results of the tiles that voted. Each program takes TILES tiles."""
    places = tl.arange(0, TILES)
    tiles = tl.program_id(0) * TILES + places
    voted = tl.load(votes + tiles, mask=tiles < num_tiles, other=0) != 0
    place = tl.min(tl.where(voted, places, TILES), 0)
    while place < TILES:
        row_block, column_block = _tile_of_program(
            tl.program_id(0) * TILES + place, num_rows, num_columns, BLOCK_ROWS, BLOCK_COLUMNS
        )
        row, column = row_block * BLOCK_ROWS, column_block * BLOCK_COLUMNS
        products = _products(image, text, row, column, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WIDTH, WIDTH)
        rows, columns = row + tl.arange(0, BLOCK_ROWS), column + tl.arange(0, BLOCK_COLUMNS)
        exponents = _exponents(products, scale, rows, columns, num_rows, num_columns, first, HAS_POSITIVES)
        # The bound avoids -inf - -inf in rows and columns without counted logits.
        offsets = tl.maximum(tl.max(exponents, 1), -1e30)
        sums = tl.sum(tl.exp2(exponents - offsets[:, None]), 1)
        _store_sums(row_partials, column_block, rows, num_rows, offsets, sums)
        offsets = tl.maximum(tl.max(exponents, 0), -1e30)
        sums = tl.sum(tl.exp2(exponents - offsets[None, :]), 0)
        _store_sums(column_partials, row_block, columns, num_columns, offsets, sums)
        place = tl.min(tl.where(voted & (places > place), places, TILES), 0)
