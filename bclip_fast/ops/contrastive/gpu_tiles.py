"""Code around kernels that compute S by tiles on a GPU: partial results, chunks of rows of G, library matmuls."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .call import ContrastiveCall
from .loss_terms import log_sum_exp

# |G / w| is at most 2, and the largest float16 is 65504.
GRADIENT_SCALE = 2.0**14

# Whether torch multiplies two float16 matrices into float32. It does on CUDA from 2.8 on.
_HAS_WIDE_MATMUL = "dtype" in torch.ops.aten.mm.overloads()

Shape = tuple[int, int]


def padded(features: Tensor, multiple: int) -> Tensor:
    """Contiguous features, padded with zeros to a width that is a multiple, so kernels load full, aligned vectors."""
    missing = -features.shape[1] % multiple
    return F.pad(features, (0, missing)) if missing else features.contiguous()


def num_tiles(rows: Tensor, columns: Tensor, tile: Shape) -> tuple[int, int]:
    """The numbers of tiles along rows and columns of S."""
    return -(-len(rows) // tile[0]), -(-len(columns) // tile[1])


def log_sum_exps(
    call: ContrastiveCall, tile: Shape, dtype: torch.dtype, launch: Callable[[int, Tensor, Tensor, Tensor], None]
) -> tuple[Tensor, Tensor]:
    """(r (b,), q (B,)) in float64 as in `reference.forward`, from the partial results of a kernel.

    Args:
        tile: rows and columns of a tile.
        launch: function (start, rows, row_partials, column_partials) that runs the kernel on the rows from `start` on.
            It writes log-sum-exps per tile: (column tiles, rows) and (row tiles, B) in `dtype`.
    """
    image, text = call.image, call.text
    rows_lse = torch.empty(len(image), dtype=torch.float64, device=image.device)
    columns_lse = torch.full((len(text),), float("-inf"), dtype=torch.float64, device=image.device)
    # The partial results of this many rows take the memory of chunk_size rows of S.
    num_rows_at_once = call.chunk_size * tile[0] // 2
    for start in range(0, len(image), num_rows_at_once):
        rows = image[start : start + num_rows_at_once]
        row_tiles, column_tiles = num_tiles(rows, text, tile)
        row_partials = torch.empty(column_tiles, len(rows), dtype=dtype, device=image.device)
        column_partials = torch.empty(row_tiles, len(text), dtype=dtype, device=image.device)
        with torch.cuda.device_of(image):
            launch(start, rows, row_partials, column_partials)
        rows_lse[start : start + len(rows)] = log_sum_exp(row_partials, 0)
        columns_lse = torch.logaddexp(columns_lse, log_sum_exp(column_partials, 0))
    return rows_lse, columns_lse


def gradients(
    call: ContrastiveCall,
    width: int,
    factor: Tensor,
    dtype: torch.dtype,
    tile: Shape,
    num_partials: int,
    launch: Callable[[int, Tensor, Tensor, Tensor, float], None],
) -> tuple[Tensor, Tensor, Tensor]:
    """(dI, dT in `dtype`, sums of the partial results (num_partials,)), from chunk_size rows of G at a time.

    dI = factor * G / w @ T and dT = factor * (G / w).T @ I. The first `width` columns of both are returned.

    Args:
        launch: function (start, rows, grad, partials, unit) that runs the kernel on the rows from `start` on. It writes
            rows of unit * G / w, and a row of partial results for each tile.
    """
    image, text, chunk_size = call.image, call.text, call.chunk_size
    in_float32 = image.dtype == torch.float32
    unit = 1.0 if in_float32 else GRADIENT_SCALE
    (image_operand, image_unit), (text_operand, text_unit) = operand(image), operand(text)
    image_factor = factor * text_unit / unit
    text_factor = factor * image_unit / unit

    # Library matmuls are faster if rows start at multiples of 16 bytes.
    grads = torch.empty(
        min(chunk_size, len(image)),
        -(-len(text) // 16) * 16,
        dtype=torch.float32 if in_float32 else torch.float16,
        device=image.device,
    )
    image_grad = torch.empty(len(image), width, dtype=dtype, device=image.device)
    text_grad = torch.zeros(text.shape, dtype=torch.float32, device=text.device)
    sums = []
    for start in range(0, len(image), chunk_size):
        rows = image[start : start + chunk_size]
        grad = grads[: len(rows), : len(text)]
        row_tiles, column_tiles = num_tiles(rows, text, tile)
        partials = torch.empty(row_tiles * column_tiles, num_partials, dtype=torch.float32, device=image.device)
        with torch.cuda.device_of(image):
            launch(start, rows, grad, partials, unit)
        sums.append(partials.sum(0, dtype=torch.float64))
        image_grad[start : start + chunk_size] = product(grad, text_operand)[:, :width].mul_(image_factor)
        text_grad += product(grad.T, image_operand[start : start + chunk_size])
    text_grad = text_grad[:, :width].mul_(text_factor).to(dtype).contiguous()
    return image_grad, text_grad, torch.stack(sums).sum(0).float()


def siglip_results(
    call: ContrastiveCall,
    width: int,
    weight: float,
    dtype: torch.dtype,
    tile: Shape,
    with_gradients: bool,
    launch: Callable[[int, Tensor, Tensor | None, Tensor, float], None],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The results of `reference.siglip`.

    `launch` is that of `gradients`. Its partial results are those of the gradients of scale and bias and of the loss,
    each divided by the weight. Without gradients it runs once, and its `grad` is None.
    """
    if with_gradients:
        factor = call.scale * weight
        image_grad, text_grad, sums = gradients(call, width, factor, dtype, tile, 3, launch)
        scale_grad, bias_grad, loss = (weight * total for total in sums)
        return loss, image_grad, text_grad, scale_grad, bias_grad
    image, text = call.image, call.text
    partials = torch.empty(math.prod(num_tiles(image, text, tile)), 3, dtype=torch.float32, device=image.device)
    with torch.cuda.device_of(image):
        launch(0, image, None, partials, 1.0)
    loss = weight * partials[:, 2].sum(dtype=torch.float64).float()
    return loss, image.new_empty(0), text.new_empty(0), torch.zeros_like(loss), torch.zeros_like(loss)


def operand(features: Tensor) -> tuple[Tensor, Tensor | float]:
    """(operand of the library matmuls, unit), with features = operand * unit."""
    if features.dtype != torch.bfloat16:
        return features, 1.0
    largest = torch.linalg.vector_norm(features, float("inf"), dtype=torch.float32)
    exponent = torch.frexp(largest).exponent
    return torch.ldexp(features, -exponent).half(), torch.ldexp(torch.ones_like(largest), exponent)


def product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, accumulated and returned in float32."""
    if left.is_cuda and left.dtype == torch.float16 and _HAS_WIDE_MATMUL:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()
