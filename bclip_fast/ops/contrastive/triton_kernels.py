"""The Triton kernels that triton.py launches: one pass over S forward, and one backward.

Every kernel computes one tile of S per program, with float32 accumulators, and reduces it while it is in registers.

Forward: each program computes the log-sum-exps of its tile's rows and columns from the same numbers, and writes them
to a matrix of partial results. One exponential per element serves both directions, with the tile's highest logit as
offset. If a row or column lies so far below it that its sum loses digits, the program computes the tile again with the
maximum of each row and column. So the kernels are correct for every distribution of logits.

Backward: each program writes its tile of G once, and library matmuls compute dI and dT from chunks of rows of G. For
bfloat16 and float16 inputs, G / w lies in [-2, 2]. It is written in float16, times 2**14, which keeps 11 bits down to
probabilities of 4e-9. bfloat16 would keep 8 bits. For these matmuls, bfloat16 features become float16, divided by a
power of two so that the largest lies in [0.5, 1). The sum exp(S - R) + exp(S - Q) equals
exp(S - m) * (exp(m - R) + exp(m - Q)), which also takes one exponential per element. If R and Q of the tile differ too
much for a common m, the program computes two.

The kernels multiply float32 inputs in float32, never TF32, and G is then float32. The library matmuls obey
`torch.set_float32_matmul_precision`, whose default is float32 too.

The kernels use no atomics: each partial result has a separate place, and torch's reductions are deterministic. The
kernels read scale and bias on the device, so nothing waits for the GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tile_of_program(  # type: ignore[no-untyped-def]
    program, num_rows, num_columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):
    """(row block, column block), in bands of 8 row blocks, so that concurrent programs share operands in L2."""
    row_blocks = tl.cdiv(num_rows, BLOCK_ROWS)
    band = 8 * tl.cdiv(num_columns, BLOCK_COLUMNS)
    first = program // band * 8
    height = tl.minimum(row_blocks - first, 8)
    return first + program % band % height, program % band // height


@triton.jit
def _products(  # type: ignore[no-untyped-def]
    image,
    text,
    rows,
    columns,
    num_rows,
    num_columns,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """image[rows] @ text[columns].T in float32. WIDTH is a multiple of BLOCK_WIDTH."""
    depth = tl.arange(0, BLOCK_WIDTH)
    # Rows past the end read the last row, so the loop needs no mask. Their results are never stored.
    image_rows = tl.minimum(rows, num_rows - 1).to(tl.int64)
    text_rows = tl.minimum(columns, num_columns - 1).to(tl.int64)
    image_pointers = image + image_rows[:, None] * WIDTH + depth[None, :]
    text_pointers = text + text_rows[None, :] * WIDTH + depth[:, None]
    products = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for _ in range(0, WIDTH, BLOCK_WIDTH):
        left = tl.load(image_pointers)
        right = tl.load(text_pointers)
        products = tl.dot(left, right, products, input_precision="ieee")
        image_pointers += BLOCK_WIDTH
        text_pointers += BLOCK_WIDTH
    return products


@triton.jit(do_not_specialize=["num_rows", "first"])
def _forward_kernel(  # type: ignore[no-untyped-def]
    image,
    text,
    scale,
    row_partials,
    column_partials,
    num_rows,
    num_columns,
    first,
    HAS_POSITIVES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """row_partials (column blocks, num_rows), column_partials (row blocks, num_columns), both float64."""
    row_block, column_block = _tile_of_program(tl.program_id(0), num_rows, num_columns, BLOCK_ROWS, BLOCK_COLUMNS)
    rows = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = column_block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    products = _products(
        image, text, rows, columns, num_rows, num_columns, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WIDTH, WIDTH
    )
    logits = products * tl.load(scale)

    counted = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    if HAS_POSITIVES:
        counted = counted & (columns[None, :] != (rows + first)[:, None])
    logits = tl.where(counted, logits, float("-inf"))

    # The bound avoids -inf - -inf in rows and columns without counted logits.
    offset = tl.maximum(tl.max(tl.max(logits, 1), 0), -1e30)
    exponentials = tl.exp(logits - offset)
    row_sums = tl.sum(exponentials, 1)
    column_sums = tl.sum(exponentials, 0)
    row_offsets = tl.zeros((BLOCK_ROWS,), tl.float32) + offset
    column_offsets = tl.zeros((BLOCK_COLUMNS,), tl.float32) + offset
    # float32 flushes terms below 1e-37 of the tile's highest to zero, far below the last digit of such a sum.
    least = tl.minimum(
        tl.min(tl.where(rows < num_rows, row_sums, 1.0), 0),
        tl.min(tl.where(columns < num_columns, column_sums, 1.0), 0),
    )
    if least < 1e-20:
        row_offsets = tl.maximum(tl.max(logits, 1), -1e30)
        row_sums = tl.sum(tl.exp(logits - row_offsets[:, None]), 1)
        column_offsets = tl.maximum(tl.max(logits, 0), -1e30)
        column_sums = tl.sum(tl.exp(logits - column_offsets[None, :]), 0)
    row_places = row_partials + column_block.to(tl.int64) * num_rows + rows
    column_places = column_partials + row_block.to(tl.int64) * num_columns + columns
    tl.store(row_places, row_offsets.to(tl.float64) + tl.log(row_sums), mask=rows < num_rows)
    tl.store(column_places, column_offsets.to(tl.float64) + tl.log(column_sums), mask=columns < num_columns)


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
    grad_stride,
    first,
    HAS_POSITIVES: tl.constexpr,
    GRADIENT_SCALE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """grad (num_rows, num_columns): GRADIENT_SCALE * G / w. partials (programs, 1): the sum of G / w * (I @ T.T)."""
    row_block, column_block = _tile_of_program(tl.program_id(0), num_rows, num_columns, BLOCK_ROWS, BLOCK_COLUMNS)
    rows = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = column_block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    products = _products(
        image, text, rows, columns, num_rows, num_columns, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WIDTH, WIDTH
    )
    logits = products * tl.load(scale)

    row_lse = tl.load(rows_lse + tl.minimum(rows, num_rows - 1))
    column_lse = tl.load(columns_lse + tl.minimum(columns, num_columns - 1))
    if rows_lse.dtype.element_ty == tl.float64:
        # Rounding a log-sum-exp of 100 to float32 errs by 4e-6, in every gradient of its row. A factor corrects this.
        # It is 1 for a row without a loss, whose log-sum-exp is infinite.
        row_near, column_near = row_lse.to(tl.float32), column_lse.to(tl.float32)
        row_rest = tl.where(row_near < float("inf"), tl.exp((row_near - row_lse).to(tl.float32)), 1.0)
        column_rest = tl.where(column_near < float("inf"), tl.exp((column_near - column_lse).to(tl.float32)), 1.0)
        gradient = tl.exp(logits - row_near[:, None]) * row_rest[:, None]
        gradient += tl.exp(logits - column_near[None, :]) * column_rest[None, :]
    else:
        lowest = tl.minimum(tl.min(row_lse, 0), tl.min(column_lse, 0))
        highest = tl.maximum(tl.max(row_lse, 0), tl.max(column_lse, 0))
        if highest - lowest < 60.0:
            # The middle is within exp(30) of both ends: nothing overflows, and probabilities survive down to exp(-57).
            middle = (lowest + highest) * 0.5
            factors = tl.exp(middle - row_lse)[:, None] + tl.exp(middle - column_lse)[None, :]
            gradient = tl.exp(logits - middle) * factors
        else:
            gradient = tl.exp(logits - row_lse[:, None]) + tl.exp(logits - column_lse[None, :])
    if HAS_POSITIVES:
        positive = tl.load(positive_grad + tl.minimum(rows, num_rows - 1))
        gradient = tl.where(columns[None, :] == (rows + first)[:, None], positive[:, None], gradient)
    if row_ids is not None:
        row_share = tl.load(row_shares + tl.minimum(rows, num_rows - 1))
        column_share = tl.load(column_shares + tl.minimum(columns, num_columns - 1))
        same = _same_group(row_ids, column_ids, rows, columns, num_rows, num_columns)
        gradient -= tl.where(same, row_share[:, None] + column_share[None, :], 0.0)
    gradient = tl.where((rows < num_rows)[:, None] & (columns < num_columns)[None, :], gradient, 0.0)
    # Stored before the sum: on sm_90, float32 with groups spills registers in the other order.
    _store_gradient(gradient, rows, columns, grad, num_rows, grad_stride, GRADIENT_SCALE)
    tl.store(partials + tl.program_id(0).to(tl.int64), tl.sum(tl.sum(gradient * products, 1), 0))


@triton.jit
def _same_group(row_ids, column_ids, rows, columns, num_rows, num_columns):  # type: ignore[no-untyped-def]
    row_id = tl.load(row_ids + tl.minimum(rows, num_rows - 1))
    column_id = tl.load(column_ids + tl.minimum(columns, num_columns - 1))
    return row_id[:, None] == column_id[None, :]


@triton.jit
def _store_gradient(  # type: ignore[no-untyped-def]
    gradient, rows, columns, grad, num_rows, grad_stride, GRADIENT_SCALE: tl.constexpr
):
    # Rows of grad are padded to multiples of 16 numbers. Writing zeros there makes every access 16 bytes wide.
    stored = (rows < num_rows)[:, None] & (columns < grad_stride)[None, :]
    places = grad + rows.to(tl.int64)[:, None] * grad_stride + columns[None, :]
    tl.store(places, (gradient * GRADIENT_SCALE).to(grad.dtype.element_ty), mask=stored)


@triton.jit
def _log1p(x):  # type: ignore[no-untyped-def]
    """log(1 + x) for x in [0, 1], to a relative 3e-7: x times the Chebyshev interpolant of log(1 + x) / x."""
    series = x * 0.00512610212 - 0.0290740646
    series = series * x + 0.0775160866
    series = series * x - 0.136022476
    series = series * x + 0.190768807
    series = series * x - 0.24835399
    series = series * x + 0.333181217
    series = series * x - 0.49999445
    series = series * x + 0.999999966
    return x * series


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
    grad_stride,
    first,
    HAS_POSITIVES: tl.constexpr,
    WITH_GRADIENTS: tl.constexpr,
    GRADIENT_SCALE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """grad: as in `_backward_kernel`. partials (programs, 3): sums of G / w * (I @ T.T), of G / w and of loss / w."""
    row_block, column_block = _tile_of_program(tl.program_id(0), num_rows, num_columns, BLOCK_ROWS, BLOCK_COLUMNS)
    rows = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = column_block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    products = _products(
        image, text, rows, columns, num_rows, num_columns, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WIDTH, WIDTH
    )
    logits = products * tl.load(scale) + tl.load(bias)
    if HAS_POSITIVES:
        is_positive = columns[None, :] == (rows + first)[:, None]
        logits = tl.where(is_positive, -logits, logits)
    if row_ids is not None:
        same = _same_group(row_ids, column_ids, rows, columns, num_rows, num_columns)
        logits = tl.where(same, -logits, logits)
    # At -inf, loss and gradient are 0.
    counted = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    logits = tl.where(counted, logits, float("-inf"))
    small = tl.exp(-tl.abs(logits))
    loss = tl.maximum(logits, 0.0) + _log1p(small)
    sums = partials + tl.program_id(0).to(tl.int64) * 3
    tl.store(sums + 2, tl.sum(tl.sum(loss, 1), 0))
    if WITH_GRADIENTS:
        # One division for both signs. A quotient in each branch would take 40 registers more.
        inverse = 1.0 / (1.0 + small)
        gradient = tl.where(logits >= 0.0, inverse, small * inverse)
        if HAS_POSITIVES:
            gradient = tl.where(is_positive, -gradient, gradient)
        if row_ids is not None:
            gradient = tl.where(same, -gradient, gradient)
        # Stored before the sums: the other order takes 50 registers more on sm_90, and they spill.
        _store_gradient(gradient, rows, columns, grad, num_rows, grad_stride, GRADIENT_SCALE)
        tl.store(sums, tl.sum(tl.sum(gradient * products, 1), 0))
        tl.store(sums + 1, tl.sum(tl.sum(gradient, 1), 0))
