"""Code around GPU kernels that compute S in tiles: partial results, chunks of rows of G, library matmuls."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .call import ContrastiveCall
from .groups import GroupTile
from .loss_terms import log_sum_exp

# |G / w| is at most 2, and the largest float16 is 65504.
GRADIENT_SCALE = 2.0**14

# Whether torch multiplies two float16 matrices into float32. It does on GPUs from 2.8 on.
_HAS_WIDE_MATMUL = "dtype" in torch.ops.aten.mm.overloads()

Shape = tuple[int, int]


def padded(features: Tensor, multiple: int) -> Tensor:
    """Contiguous features, padded with zeros to a multiple in width, so that kernels load full, aligned vectors."""
    missing = -features.shape[1] % multiple
    return F.pad(features, (0, missing)) if missing else features.contiguous()


def num_tiles(rows: Tensor, columns: Tensor, tile: Shape) -> tuple[int, int]:
    """The numbers of tiles along rows and columns of S."""
    return -(-len(rows) // tile[0]), -(-len(columns) // tile[1])


def split_rows(tensor: Tensor, num_rows: int) -> Sequence[Tensor]:
    """The tensor in parts of `num_rows` rows. One operator makes them all."""
    return tensor.split(num_rows) if len(tensor) > num_rows else (tensor,)


class RowParts:
    """Tensors with one value for each image, in parts of `num_rows`. An absent tensor is None."""

    def __init__(self, num_rows: int, *tensors: Tensor | None) -> None:
        self.num_rows = num_rows
        self.parts = [None if tensor is None else split_rows(tensor, num_rows) for tensor in tensors]

    def at(self, start: int) -> list[Any]:
        """The part of each tensor, or None, that begins at row `start`, a multiple of `num_rows`."""
        return [None if parts is None else parts[start // self.num_rows] for parts in self.parts]


def group_tensors(groups: GroupTile | None, *, with_shares: bool) -> tuple[Tensor | None, ...]:
    """Ids of rows and columns in int32, and their shares in float32 or Nones, contiguous. Four Nones without groups."""
    if groups is None:
        return None, None, None, None
    ids = groups.rows.contiguous(), groups.columns.contiguous()
    if not with_shares:
        return *ids, None, None
    return *ids, *(part.float().contiguous() for part in (groups.row_shares, groups.column_shares))


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
    rows_lse: list[Tensor] = []
    columns_lse: Tensor | None = None
    start = 0
    # The partial results of this many rows take the memory of chunk_size rows of S.
    for rows in split_rows(image, call.chunk_size * tile[0] // 2):
        row_tiles, column_tiles = num_tiles(rows, text, tile)
        shapes = (column_tiles, len(rows)), (row_tiles, len(text))
        # A square is reduced by rows and columns at once.
        at_once = [(2, *shapes[0])] if shapes[0] == shapes[1] else shapes
        partials = [torch.empty(shape, dtype=dtype, device=image.device) for shape in at_once]
        row_partials, column_partials = partials[0] if len(partials) == 1 else partials
        with torch.cuda.device_of(image):
            launch(start, rows, row_partials, column_partials)
        sums = [log_sum_exp(each, -2) for each in partials]
        of_rows, columns = sums[0] if len(sums) == 1 else sums
        rows_lse.append(of_rows)
        columns_lse = columns if columns_lse is None else torch.logaddexp(columns_lse, columns)
        start += len(rows)
    assert columns_lse is not None
    return torch.cat(rows_lse) if len(rows_lse) > 1 else rows_lse[0], columns_lse


def gradient_rows(call: ContrastiveCall) -> int:
    """The number of rows of G at a time. They take the memory of chunk_size rows of S in float32."""
    halves = 2 if _multiplies_halves(call.image) else 1
    return min(halves * call.chunk_size, len(call.image))


def gradients(
    call: ContrastiveCall,
    width: int,
    factor: Tensor,
    dtype: torch.dtype,
    tile: Shape,
    num_partials: int,
    launch: Callable[[int, Tensor, Tensor, Tensor, float], None],
) -> tuple[Tensor, Tensor, Tensor]:
    """(dI, dT in `dtype`, sums of the partial results (num_partials,) in float64), from `gradient_rows` rows at a time.

    dI = factor * G / w @ T and dT = factor * (G / w).T @ I. The first `width` columns of both are returned. Each chunk
    of rows costs our kernel and two matmuls. The second one adds to dT in place: it reads and writes 4 bytes for each
    number of dT. At B = 65536 and D = 512, eight chunks of float16 move 2.0 GB there.

    Args:
        launch: function (start, rows, grad, partials, unit) that runs the kernel on the rows from `start` on. It writes
            rows of unit * G / w, and a row of partial results for each tile.
    """
    image, text, num_rows = call.image, call.text, gradient_rows(call)
    in_float32 = image.dtype == torch.float32
    unit = 1.0 if in_float32 else GRADIENT_SCALE
    (image_operand, text_operand), units = operands(image, text)
    if not _multiplies_halves(image):
        text_operand = text_operand.float()
    # Library matmuls are faster if rows start at multiples of 16 bytes.
    padded_columns = -(-len(text) // 16) * 16
    grad_dtype = torch.float32 if in_float32 else torch.float16
    grad = torch.empty(num_rows, padded_columns, dtype=grad_dtype, device=image.device)
    grad = grad[:, : len(text)] if padded_columns > len(text) else grad
    transposed = grad.T[None]
    image_sums = torch.empty(image.shape, dtype=torch.float32, device=image.device)
    text_sums = torch.empty((1, *text.shape), dtype=torch.float32, device=text.device)
    chunks = [split_rows(tensor, num_rows) for tensor in (image, image_operand, image_sums)]
    sizes = [math.prod(num_tiles(rows, text, tile)) for rows in chunks[0]]
    partials = torch.empty(sum(sizes), num_partials, dtype=torch.float32, device=image.device)
    parts = partials.split(sizes) if len(sizes) > 1 else [partials]
    start = 0
    for rows, left, sums, part in zip(*chunks, parts, strict=True):
        if len(rows) < len(grad):
            grad, transposed = grad[: len(rows)], transposed[:, :, : len(rows)]
        with torch.cuda.device_of(image):
            launch(start, rows, grad, part, unit)
        multiply(grad, text_operand, sums)
        add_product(text_sums, transposed, left[None], keep=start > 0)
        start += len(rows)
    factor = factor / unit if unit != 1 else factor
    image_factor = text_factor = factor
    if units is not None:
        text_factor, image_factor = (units * factor).unbind()
    image_grad = _scaled(image_sums, image_factor, width, dtype)
    text_grad = _scaled(text_sums[0], text_factor, width, dtype)
    return image_grad, text_grad, partials.sum(0, dtype=torch.float64)


def _scaled(sums: Tensor, factor: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """factor * the first `width` columns of the float32 sums, contiguous in `dtype`. It may overwrite the sums."""
    if width == sums.shape[1] and dtype == sums.dtype:
        return sums.mul_(factor)
    return torch.mul(sums[:, :width], factor, out=sums.new_empty((len(sums), width), dtype=dtype))


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
        # Each result needs memory of its own (`custom_op.define`).
        scale_grad, bias_grad, loss = (
            torch.mul(part, weight, out=torch.empty_like(part, dtype=torch.float32)) for part in sums.unbind()
        )
        return loss, image_grad, text_grad, scale_grad, bias_grad
    image, text = call.image, call.text
    partials = torch.empty(math.prod(num_tiles(image, text, tile)), 3, dtype=torch.float32, device=image.device)
    with torch.cuda.device_of(image):
        launch(0, image, None, partials, 1.0)
    loss = weight * partials[:, 2].sum(dtype=torch.float64).float()
    return loss, image.new_empty(0), text.new_empty(0), torch.zeros_like(loss), torch.zeros_like(loss)


def operands(*features: Tensor) -> tuple[Sequence[Tensor], Tensor | None]:
    """(operands of the library matmuls, units), with each of the features = operand * unit. Without units they are 1.

    bfloat16 features become float16, divided by a power of two so that the largest lies in [0.5, 1).
    """
    if features[0].dtype != torch.bfloat16:
        return features, None
    largest = torch.empty(len(features), device=features[0].device)
    for part, place in zip(features, largest.unbind(), strict=True):
        torch.linalg.vector_norm(part, float("inf"), dtype=torch.float32, out=place)
    units = torch.frexp(largest).exponent.exp2()
    halves = [part.new_empty(part.shape, dtype=torch.float16) for part in features]
    for part, inverse, half in zip(features, units.reciprocal().unbind(), halves, strict=True):
        torch.mul(part, inverse, out=half)
    return halves, units


def multiply(left: Tensor, right: Tensor, result: Tensor) -> None:
    """Write left @ right, two matrices of float32 or float16, to the float32 matrix `result`."""
    if _multiplies_halves(left):
        torch.mm(left, right, out_dtype=torch.float32, out=result)
        return
    with _tensor_cores(left):
        torch.mm(left.float(), right.float(), out=result)


def add_product(total: Tensor, left: Tensor, right: Tensor, *, keep: bool) -> None:
    """Add left @ right, float32 or float16, to the float32 `total` in place, or overwrite it without `keep`.

    All three are batches of one matrix. torch 2.8 and 2.9 add a product of halves to a float32 sum only in `baddbmm`,
    and only in place (pull request 167931 of PyTorch). A batch of one is an ordinary matmul there.
    """
    if _multiplies_halves(left):
        torch.baddbmm(total, left, right, out_dtype=torch.float32, beta=int(keep), out=total)
        return
    with _tensor_cores(left):
        torch.baddbmm(total, left.float(), right.float(), beta=int(keep), out=total)


def _multiplies_halves(tensor: Tensor) -> bool:
    """Whether torch multiplies operands of this tensor's device and dtype as halves, into float32."""
    return _HAS_WIDE_MATMUL and tensor.device.type != "cpu" and tensor.dtype != torch.float32


@contextmanager
def _tensor_cores(operand: Tensor) -> Iterator[None]:
    """Let float32 matmuls inside the block use TF32, if the operand is float16. Other code keeps its setting.

    TF32 has the mantissa of float16 and a larger exponent, so these products lose nothing. They are many times faster
    than those of float32.
    """
    matmul = torch.backends.cuda.matmul
    if operand.dtype == torch.float32 or operand.device.type == "cpu" or matmul.allow_tf32:
        yield
        return
    matmul.allow_tf32 = True
    try:
        yield
    finally:
        matmul.allow_tf32 = False
