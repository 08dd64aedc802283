"""Triton kernels of `reference.py`, for NVIDIA GPUs from sm_80 on: one pass over S forward, one more backward.

Every kernel computes one tile of S per program, with float32 accumulators, and folds it while it is in registers.

Forward: the log-sum-exps of the tile's rows and of its columns from the same numbers, each written once to a matrix of
partial results. One exponential per element serves both directions, with the tile's highest logit as offset; a tile
where some row or column lies so far below it that its sum loses digits is done again with the maximum of each row and
of each column. So no distribution of logits needs care by the caller.

Backward: the tile of G is written once, and dI and dT are library matmuls on chunks of rows of G. For bfloat16 and
float16 inputs G / w lies in [-2, 2] and is written in float16 times 2**14: 11 bits down to probabilities of 4e-9, where
a bfloat16 tile would have 8. Features in bfloat16 become float16 for these matmuls, divided by a power of two so that
the largest lies in [0.5, 1). exp(S - R) + exp(S - Q) is exp(S - m) * (exp(m - R) + exp(m - Q)), one exponential
again, unless the R and Q of the tile lie so far apart that no m serves both.

float32 inputs are multiplied in float32 (never TF32) in the kernels, and G is float32; the library matmuls obey
`torch.set_float32_matmul_precision`, whose default is float32 too.

No atomics: each partial result has its place, and torch's reductions are deterministic. The kernels read scale and bias
on the device, so nothing waits for the GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gpu_tiles import gradients, log_sum_exps, padded, siglip_results
from .loss_terms import Groups


@triton.jit
def _tile_of_program(num_rows, num_columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """(row block, column block), in bands of 8 row blocks: programs that run together share their operands in L2."""
    row_blocks = tl.cdiv(num_rows, BLOCK_ROWS)
    band = 8 * tl.cdiv(num_columns, BLOCK_COLUMNS)
    program = tl.program_id(0)
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
    """image[rows] @ text[columns].T in float32; WIDTH is a multiple of BLOCK_WIDTH."""
    depth = tl.arange(0, BLOCK_WIDTH)
    # Rows past the end read the last one: the loop needs no mask for them, and what they give is dropped.
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
    row_block, column_block = _tile_of_program(num_rows, num_columns, BLOCK_ROWS, BLOCK_COLUMNS)
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

    # The bound keeps -inf - -inf away where nothing is counted.
    offset = tl.maximum(tl.max(tl.max(logits, 1), 0), -1e30)
    exponentials = tl.exp(logits - offset)
    row_sums = tl.sum(exponentials, 1)
    column_sums = tl.sum(exponentials, 0)
    row_offsets = tl.zeros((BLOCK_ROWS,), tl.float32) + offset
    column_offsets = tl.zeros((BLOCK_COLUMNS,), tl.float32) + offset
    # What float32 flushes to zero is below 1e-37 of the tile's highest, far below the last digit of such a sum.
    least = tl.minimum(
        tl.min(tl.where(rows < num_rows, row_sums, 1.0), 0),
        tl.min(tl.where(columns < num_columns, column_sums, 1.0), 0),
    )
    if least < 1e-20:
        row_offsets = tl.maximum(tl.max(logits, 1), -1e30)
        row_sums = tl.sum(tl.exp(logits - row_offsets[:, None]), 1)
        column_offsets = tl.maximum(tl.max(logits, 0), -1e30)
        column_sums = tl.sum(tl.exp(logits - column_offsets[None, :]), 0)
    row_place = row_partials + column_block.to(tl.int64) * num_rows + rows
    column_place = column_partials + row_block.to(tl.int64) * num_columns + columns
    tl.store(row_place, row_offsets.to(tl.float64) + tl.log(row_sums), mask=rows < num_rows)
    tl.store(column_place, column_offsets.to(tl.float64) + tl.log(column_sums), mask=columns < num_columns)


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
    """grad (num_rows, num_columns) = GRADIENT_SCALE * G / w; partials (programs, 1): the sum of G / w * (I @ T.T)"""
    row_block, column_block = _tile_of_program(num_rows, num_columns, BLOCK_ROWS, BLOCK_COLUMNS)
    rows = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = column_block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    products = _products(
        image, text, rows, columns, num_rows, num_columns, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WIDTH, WIDTH
    )
    logits = products * tl.load(scale)

    row_lse = tl.load(rows_lse + tl.minimum(rows, num_rows - 1))
    column_lse = tl.load(columns_lse + tl.minimum(columns, num_columns - 1))
    if rows_lse.dtype.element_ty == tl.float64:
        # The rounding of a log-sum-exp, 4e-6 at 100, would be that of every gradient in its row. It is taken back by a
        # factor, which is 1 where there is no loss and the log-sum-exp is infinite.
        row_near, column_near = row_lse.to(tl.float32), column_lse.to(tl.float32)
        row_rest = tl.where(row_near < float("inf"), tl.exp((row_near - row_lse).to(tl.float32)), 1.0)
        column_rest = tl.where(column_near < float("inf"), tl.exp((column_near - column_lse).to(tl.float32)), 1.0)
        gradient = tl.exp(logits - row_near[:, None]) * row_rest[:, None]
        gradient += tl.exp(logits - column_near[None, :]) * column_rest[None, :]
    else:
        lowest = tl.minimum(tl.min(row_lse, 0), tl.min(column_lse, 0))
        highest = tl.maximum(tl.max(row_lse, 0), tl.max(column_lse, 0))
        if highest - lowest < 60.0:
            # Within exp(30) of both ends: nothing overflows, and probabilities are kept down to exp(-57).
            middle = (lowest + highest) * 0.5
            factors = tl.exp(middle - row_lse)[:, None] + tl.exp(middle - column_lse)[None, :]
            gradient = tl.exp(logits - middle) * factors
        else:
            gradient = tl.exp(logits - row_lse[:, None]) + tl.exp(logits - column_lse[None, :])
    if HAS_POSITIVES:
        own = tl.load(positive_grad + tl.minimum(rows, num_rows - 1))
        gradient = tl.where(columns[None, :] == (rows + first)[:, None], own[:, None], gradient)
    if row_ids is not None:
        row_share = tl.load(row_shares + tl.minimum(rows, num_rows - 1))
        column_share = tl.load(column_shares + tl.minimum(columns, num_columns - 1))
        same = _same_group(row_ids, column_ids, rows, columns, num_rows, num_columns)
        gradient -= tl.where(same, row_share[:, None] + column_share[None, :], 0.0)
    gradient = tl.where((rows < num_rows)[:, None] & (columns < num_columns)[None, :], gradient, 0.0)
    tl.store(partials + tl.program_id(0).to(tl.int64), tl.sum(tl.sum(gradient * products, 1), 0))
    _store_gradient(gradient, rows, columns, grad, num_rows, num_columns, grad_stride, GRADIENT_SCALE)


@triton.jit
def _same_group(row_ids, column_ids, rows, columns, num_rows, num_columns):  # type: ignore[no-untyped-def]
    row_id = tl.load(row_ids + tl.minimum(rows, num_rows - 1))
    column_id = tl.load(column_ids + tl.minimum(columns, num_columns - 1))
    return row_id[:, None] == column_id[None, :]


@triton.jit
def _store_gradient(  # type: ignore[no-untyped-def]
    gradient, rows, columns, grad, num_rows, num_columns, grad_stride, GRADIENT_SCALE: tl.constexpr
):
    counted = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    places = grad + rows.to(tl.int64)[:, None] * grad_stride + columns[None, :]
    tl.store(places, (gradient * GRADIENT_SCALE).to(grad.dtype.element_ty), mask=counted)


@triton.jit
def _log1p(x):  # type: ignore[no-untyped-def]
    """log(1 + x) for x in [0, 1] to 3e-7 of it, however small: x times the Chebyshev interpolant of log(1 + x) / x."""
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
    """grad as in `_backward_kernel`; partials (programs, 3): sums of G / w * (I @ T.T), G / w, loss / w."""
    row_block, column_block = _tile_of_program(num_rows, num_columns, BLOCK_ROWS, BLOCK_COLUMNS)
    rows = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = column_block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    products = _products(
        image, text, rows, columns, num_rows, num_columns, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WIDTH, WIDTH
    )
    logits = products * tl.load(scale)
    if bias is not None:
        logits += tl.load(bias)
    if HAS_POSITIVES:
        is_positive = columns[None, :] == (rows + first)[:, None]
        logits = tl.where(is_positive, -logits, logits)
    if row_ids is not None:
        same = _same_group(row_ids, column_ids, rows, columns, num_rows, num_columns)
        logits = tl.where(same, -logits, logits)
    # At -inf both loss and gradient are 0.
    counted = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    logits = tl.where(counted, logits, float("-inf"))
    small = tl.exp(-tl.abs(logits))
    loss = tl.maximum(logits, 0.0) + _log1p(small)
    sums = partials + tl.program_id(0).to(tl.int64) * 3
    tl.store(sums + 2, tl.sum(tl.sum(loss, 1), 0))
    if WITH_GRADIENTS:
        gradient = tl.where(logits >= 0.0, 1.0, small) / (1.0 + small)
        if HAS_POSITIVES:
            gradient = tl.where(is_positive, -gradient, gradient)
        if row_ids is not None:
            gradient = tl.where(same, -gradient, gradient)
        tl.store(sums, tl.sum(tl.sum(gradient * products, 1), 0))
        tl.store(sums + 1, tl.sum(tl.sum(gradient, 1), 0))
        _store_gradient(gradient, rows, columns, grad, num_rows, num_columns, grad_stride, GRADIENT_SCALE)


def configuration(dtype: torch.dtype, width: int, grouped: bool = False) -> dict[str, Any]:
    """Tile sizes and launch options of every kernel.

    Fixed, so that results don't depend on what a tuning run found fastest; reasoned, not yet tuned on a GPU. A tile of
    128 x 128 reads a third less from L2 than one of 64 x 128. On tensor cores, 16 warps hold its accumulators in 32
    registers a thread, which leaves the rest of the 128 for the exponentials, where 8 warps spill registers to memory.
    The softmax's gradient of groups has ids and shares to hold besides, and gets half the tile.
    Plain float32 multiplications are so slow that L2 doesn't matter: a smaller tile, with registers to spare.
    """
    in_float32 = dtype == torch.float32
    largest = 16 if in_float32 else 64
    return {
        "BLOCK_ROWS": 64 if in_float32 or grouped else 128,
        "BLOCK_COLUMNS": 128,
        "BLOCK_WIDTH": next(size for size in (64, 32, 16) if size <= largest and width % size == 0),
        # A constant, like the block sizes: one model has one D.
        "WIDTH": width,
        "num_warps": 8 if in_float32 else 16,
        "num_stages": 3,
        # Triton's default, which 3.10 is to change: multiplications and additions fused.
        "enable_fp_fusion": True,
    }


def _tile(config: dict[str, Any]) -> tuple[int, int]:
    return config["BLOCK_ROWS"], config["BLOCK_COLUMNS"]


def forward(image: Tensor, text: Tensor, scale: Tensor, first: int | None, chunk_size: int) -> tuple[Tensor, Tensor]:
    image, text = padded(image, 16), padded(text, 16)
    config = configuration(image.dtype, image.shape[1])

    def launch(start: int, rows: Tensor, row_partials: Tensor, column_partials: Tensor) -> None:
        _forward_kernel[(len(row_partials) * len(column_partials),)](
            rows,
            text,
            scale,
            row_partials,
            column_partials,
            len(rows),
            len(text),
            0 if first is None else first + start,
            HAS_POSITIVES=first is not None,
            **config,
        )

    return log_sum_exps(image, text, chunk_size, _tile(config), torch.float64, launch)


def backward(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    first: int | None,
    rows_lse: Tensor,
    columns_lse: Tensor,
    weight: Tensor,
    positive_grad: Tensor,
    chunk_size: int,
    dtype: torch.dtype,
    *,
    hardness: float = 0.0,
    groups: Groups | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    # The kernel works on G / w, whose range is known. All is zero with the weight; 0 / 0 must not make NaN of it.
    positive_grad = torch.where(weight == 0, 0.0, positive_grad / weight)
    sharpness = scale + hardness if hardness else scale
    # In half precision features err more than a log-sum-exp that is rounded to float32.
    exact = torch.float64 if image.dtype == torch.float32 else torch.float32
    rows_lse, columns_lse = rows_lse.to(exact).contiguous(), columns_lse.to(exact).contiguous()

    width, (image, text) = image.shape[1], (padded(part, 16) for part in (image, text))
    config = configuration(image.dtype, image.shape[1], groups is not None)

    def launch(start: int, rows: Tensor, grad: Tensor, partials: Tensor, unit: float) -> None:
        _backward_kernel[(len(partials),)](
            rows,
            text,
            sharpness,
            rows_lse[start:],
            columns_lse,
            positive_grad[start:],
            None if groups is None else groups.rows[start:],
            None if groups is None else groups.columns,
            None if groups is None else groups.row_shares[start:].float(),
            None if groups is None else groups.column_shares.float(),
            grad,
            partials,
            len(rows),
            len(text),
            grad.stride(0),
            0 if first is None else first + start,
            HAS_POSITIVES=first is not None,
            GRADIENT_SCALE=unit,
            **config,
        )

    image_grad, text_grad, sums = gradients(
        image, text, width, scale * weight, chunk_size, dtype, _tile(config), 1, launch
    )
    return image_grad, text_grad, weight * sums[0]


def siglip(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    first: int | None,
    weight: float,
    chunk_size: int,
    dtype: torch.dtype,
    with_gradients: bool,
    *,
    groups: Groups | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    width, (image, text) = image.shape[1], (padded(part, 16) for part in (image, text))
    config = configuration(image.dtype, image.shape[1])

    def launch(start: int, rows: Tensor, grad: Tensor | None, partials: Tensor, unit: float) -> None:
        _siglip_kernel[(len(partials),)](
            rows,
            text,
            scale,
            bias,
            None if groups is None else groups.rows[start:],
            None if groups is None else groups.columns,
            grad,
            partials,
            len(rows),
            len(text),
            0 if grad is None else grad.stride(0),
            0 if first is None else first + start,
            HAS_POSITIVES=first is not None,
            WITH_GRADIENTS=with_gradients,
            GRADIENT_SCALE=unit,
            **config,
        )

    return siglip_results(image, text, width, scale, weight, chunk_size, dtype, _tile(config), with_gradients, launch)
