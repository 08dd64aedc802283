"""The Triton kernels for sm_90 that write G through a tensor descriptor (TMA). triton_tma_kernels.py has the others.

They reduce a tile in eight slices of columns, so only an eighth of its gradient is in registers at a time. TMA stores a
slice from shared memory, in whole sectors, and writes nothing past the end of G.

The softmax's gradient takes two exponentials per element, exp(S - R) and exp(S - Q). One exponential with a common
offset would need a second path for tiles whose R and Q differ, and a register for each column's factor.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_kernels import _log1p, _tile_of_program
from .triton_tma_kernels import _LOG2_E, _products


@triton.jit
def _halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The left and the right half of a tile. Each thread keeps its numbers, so this moves nothing."""
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def _quarters(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    left, right = _halves(tile, ROWS, COLUMNS)
    return _halves(left, ROWS, COLUMNS // 2) + _halves(right, ROWS, COLUMNS // 2)


@triton.jit
def _slices(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The tile in eight slices of columns."""
    left, right = _halves(tile, ROWS, COLUMNS)
    return _quarters(left, ROWS, COLUMNS // 2) + _quarters(right, ROWS, COLUMNS // 2)


@triton.jit
def _same_group(row_id, column_ids, columns, num_columns):  # type: ignore[no-untyped-def]
    return row_id[:, None] == tl.load(column_ids + tl.minimum(columns, num_columns - 1))[None, :]


@triton.jit
def _softmax_slice(  # type: ignore[no-untyped-def]
    products,
    scale,
    row_lse,
    columns_lse,
    positive,
    row_id,
    column_ids,
    row_share,
    column_shares,
    grad,
    row,
    rows,
    column,
    num_rows,
    num_columns,
    first,
    HAS_POSITIVES: tl.constexpr,
    GRADIENT_SCALE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Store a slice of the gradient. Returns its sums over columns, each times its product."""
    columns = column + tl.arange(0, COLUMNS)
    read = tl.minimum(columns, num_columns - 1)
    column_lse = tl.load(columns_lse + read) * _LOG2_E
    gradient = tl.exp2(products * scale - row_lse[:, None]) + tl.exp2(products * scale - column_lse[None, :])
    if HAS_POSITIVES:
        gradient = tl.where(columns[None, :] == (rows + first)[:, None], positive[:, None], gradient)
    if column_ids is not None:
        same = _same_group(row_id, column_ids, columns, num_columns)
        share = row_share[:, None] + tl.load(column_shares + read)[None, :]
        gradient -= tl.where(same, share, 0.0)
    gradient = tl.where((rows < num_rows)[:, None] & (columns < num_columns)[None, :], gradient, 0.0)
    grad.store([row, column], (gradient * GRADIENT_SCALE).to(tl.float16))
    return tl.sum(gradient * products, 1)


@triton.jit(do_not_specialize=["num_rows", "first"])
def _backward_kernel(  # type: ignore[no-untyped-def]
    image,
    text,
    scale,
    rows_lse,
    columns_lse,
    positive_grad,
    row_ids,
    column_ids,
    row_shares,
    column_shares,
    grad,
    partials,
    num_rows,
    num_columns,
    first,
    HAS_POSITIVES: tl.constexpr,
    GRADIENT_SCALE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """grad and partials as in triton_kernels. grad is a descriptor of slices of BLOCK_COLUMNS / 8 columns."""
    row_block, column_block = _tile_of_program(tl.program_id(0), num_rows, num_columns, BLOCK_ROWS, BLOCK_COLUMNS)
    row, column = row_block * BLOCK_ROWS, column_block * BLOCK_COLUMNS
    products = _products(image, text, row, column, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WIDTH, WIDTH)
    rows = row + tl.arange(0, BLOCK_ROWS)
    read = tl.minimum(rows, num_rows - 1)
    factor = tl.load(scale) * _LOG2_E
    row_lse = tl.load(rows_lse + read) * _LOG2_E
    positive, row_id, share = row_lse, rows, row_lse  # ignored without positives or groups
    if HAS_POSITIVES:
        positive = tl.load(positive_grad + read)
    if row_ids is not None:
        row_id, share = tl.load(row_ids + read), tl.load(row_shares + read)
    COLUMNS: tl.constexpr = BLOCK_COLUMNS // 8
    slices = _slices(products, BLOCK_ROWS, BLOCK_COLUMNS)
    sums = tl.zeros((BLOCK_ROWS,), tl.float32)
    for i in tl.static_range(8):
        sums += _softmax_slice(
            slices[i],
            factor,
            row_lse,
            columns_lse,
            positive,
            row_id,
            column_ids,
            share,
            column_shares,
            grad,
            row,
            rows,
            column + i * COLUMNS,
            num_rows,
            num_columns,
            first,
            HAS_POSITIVES,
            GRADIENT_SCALE,
            COLUMNS,
        )
    tl.store(partials + tl.program_id(0).to(tl.int64), tl.sum(sums, 0))


@triton.jit
def _sigmoid_slice(  # type: ignore[no-untyped-def]
    products,
    scale,
    bias,
    row_id,
    column_ids,
    grad,
    row,
    rows,
    column,
    num_rows,
    num_columns,
    first,
    HAS_POSITIVES: tl.constexpr,
    WITH_GRADIENTS: tl.constexpr,
    GRADIENT_SCALE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Store a slice of the gradient. Returns the sums over columns of its products, of itself, and of the loss."""
    columns = column + tl.arange(0, COLUMNS)
    logits = products * scale + bias
    if HAS_POSITIVES:
        is_positive = columns[None, :] == (rows + first)[:, None]
        logits = tl.where(is_positive, -logits, logits)
    if column_ids is not None:
        same = _same_group(row_id, column_ids, columns, num_columns)
        logits = tl.where(same, -logits, logits)
    # At -inf, loss and gradient are 0.
    counted = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    logits = tl.where(counted, logits, float("-inf"))
    small = tl.exp(-tl.abs(logits))
    loss = tl.sum(tl.maximum(logits, 0.0) + _log1p(small), 1)
    product_sums, sums = loss, loss  # ignored without gradients
    if WITH_GRADIENTS:
        inverse = 1.0 / (1.0 + small)
        gradient = tl.where(logits >= 0.0, inverse, small * inverse)
        if HAS_POSITIVES:
            gradient = tl.where(is_positive, -gradient, gradient)
        if column_ids is not None:
            gradient = tl.where(same, -gradient, gradient)
        # Summed before the store: the other order takes 40 registers more in Triton 3.6.
        product_sums, sums = tl.sum(gradient * products, 1), tl.sum(gradient, 1)
        grad.store([row, column], (gradient * GRADIENT_SCALE).to(tl.float16))
    return product_sums, sums, loss


@triton.jit(do_not_specialize=["num_rows", "first"])
def _siglip_kernel(  # type: ignore[no-untyped-def]
    image,
    text,
    scale,
    bias,
    row_ids,
    column_ids,
    grad,
    partials,
    num_rows,
    num_columns,
    first,
    HAS_POSITIVES: tl.constexpr,
    WITH_GRADIENTS: tl.constexpr,
    GRADIENT_SCALE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """grad and partials as in triton_kernels. grad is a descriptor of slices of BLOCK_COLUMNS / 8 columns."""
    row_block, column_block = _tile_of_program(tl.program_id(0), num_rows, num_columns, BLOCK_ROWS, BLOCK_COLUMNS)
    row, column = row_block * BLOCK_ROWS, column_block * BLOCK_COLUMNS
    products = _products(image, text, row, column, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WIDTH, WIDTH)
    rows = row + tl.arange(0, BLOCK_ROWS)
    factor, shift = tl.load(scale), tl.load(bias)
    row_id = rows  # ignored without groups
    if row_ids is not None:
        # Loaded once: a load in each slice takes 30 registers more in Triton 3.6.
        row_id = tl.load(row_ids + tl.minimum(rows, num_rows - 1))
    COLUMNS: tl.constexpr = BLOCK_COLUMNS // 8
    slices = _slices(products, BLOCK_ROWS, BLOCK_COLUMNS)
    zeros = tl.zeros((BLOCK_ROWS,), tl.float32)
    product_sums, sums, loss = zeros, zeros, zeros
    for i in tl.static_range(8):
        parts = _sigmoid_slice(
            slices[i],
            factor,
            shift,
            row_id,
            column_ids,
            grad,
            row,
            rows,
            column + i * COLUMNS,
            num_rows,
            num_columns,
            first,
            HAS_POSITIVES,
            WITH_GRADIENTS,
            GRADIENT_SCALE,
            COLUMNS,
        )
        product_sums += parts[0]
        sums += parts[1]
        loss += parts[2]
    places = partials + tl.program_id(0).to(tl.int64) * 3
    tl.store(places + 2, tl.sum(loss, 0))
    if WITH_GRADIENTS:
        tl.store(places, tl.sum(product_sums, 0))
        tl.store(places + 1, tl.sum(sums, 0))
