"""The operators on the CPU: C++ code that reads and writes S (csrc/contrastive.h).

On a processor with a matrix unit (AMX), C++ also multiplies bfloat16 features. It computes S and its gradient in tiles
that never leave a core's caches. torch's matmuls would round the tiles and write them to memory. All other features are
multiplied by torch's library, in chunks of rows (`cpu_products`). The library uses single precision, which holds
products of half-precision features exactly and runs near the processor's peak.

One exponential serves rows and columns. Features of bounded norm have bounded logits, so one fixed offset suits all
rows and columns. If the sums show that it underflowed, a running maximum replaces it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bclip_fast import _cpu
from bclip_fast.ops.pointers import address

from .call import ContrastiveCall, SoftmaxGradient
from .cpu_products import Gradients, LibraryProducts, chunk_rows, column_blocks, full, number, takes_amx
from .groups import GroupTile
from .loss_terms import log_sum_exp

# An offset beyond the last column means that no row has a positive.
_NO_POSITIVES = 1 << 40


def forward(call: ContrastiveCall, *, products: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Same contract as `reference.forward`. The function fills `products`, float32 (b, B), with image @ text.T."""
    image, text, scale = call.image, call.text, float(call.scale)
    if products is not None:
        torch.mm(image.float(), text.float().T, out=products)
    first = _first_positive(call)
    rows, columns = full((len(image),), -math.inf, torch.float64), []
    chunk_size = chunk_rows(call.chunk_size, text)
    for block in column_blocks(image, text):
        block_products = None if products is None else products[:, block]
        tile = image, text[block], scale, first - block.start, chunk_size, block_products
        block_rows, block_columns = _with_fixed_offset(*tile) or _with_running_maximum(*tile)
        rows = torch.logaddexp(rows, block_rows)
        columns.append(block_columns)
    return rows, torch.cat(columns)


def backward(
    call: ContrastiveCall, upstream: SoftmaxGradient, dtype: torch.dtype, *, products: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Same contract as `reference.backward`. `products`, float32 (b, B), saves a second image @ text.T."""
    image, text, scale, groups, weight = call.image, call.text, float(call.scale), call.groups, upstream.weight
    rows_lse, columns_lse = upstream.rows_lse.contiguous(), upstream.columns_lse.contiguous()
    no_positives = call.positive_offset is None
    positive_grad = upstream.positive_grad if no_positives else (weight * upstream.positive_grad).float().contiguous()
    first = _first_positive(call)
    shares = [] if groups is None else [(weight * part).float() for part in (groups.row_shares, groups.column_shares)]
    if takes_amx(image):
        problem = _AmxProblem(image, text, first, dtype)
        scale_grad = _cpu.amx_softmax_gradient(
            problem.pointers,
            scale + upstream.hardness,
            float(weight),
            address(rows_lse, torch.float64, len(image)),
            address(columns_lse, torch.float64, len(text)),
            0 if no_positives else address(positive_grad, torch.float32, len(image)),
            _addresses(groups, slice(None), slice(None), shares),
            problem.gradients(scale),
            torch.get_num_threads(),
        )
        return *problem.results(), number(scale_grad)
    gradients = Gradients(image, text, scale, dtype)
    chunk_size = chunk_rows(call.chunk_size, text)
    for block in column_blocks(image, text):
        block_products = None if products is None else products[:, block]
        tile = LibraryProducts(image, text[block], chunk_size, with_gradients=True, products=block_products)
        for chunk in tile.chunks(first - block.start):
            chunk.softmax_gradient(
                scale + upstream.hardness,
                float(weight),
                address(rows_lse[chunk.span], torch.float64, len(chunk.rows)),
                address(columns_lse[block], torch.float64, len(tile.text)),
                0 if no_positives else address(positive_grad[chunk.span], torch.float32, len(chunk.rows)),
                _addresses(groups, chunk.span, block, shares),
            )
            gradients.add_chunk(chunk)
        gradients.add_block(block, tile)
    return gradients.results()


def siglip(
    call: ContrastiveCall, weight: float, dtype: torch.dtype, with_gradients: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Same contract as `reference.siglip`."""
    image, text, scale, groups = call.image, call.text, float(call.scale), call.groups
    first = _first_positive(call)
    bias = 0.0 if call.bias is None else float(call.bias)
    if takes_amx(image):
        problem = _AmxProblem(image, text, first, dtype if with_gradients else None)
        part, bias_sum, scale_sum = _cpu.amx_sigmoid_gradient(
            problem.pointers,
            scale,
            bias,
            weight,
            _addresses(groups, slice(None), slice(None)),
            problem.gradients(scale) if with_gradients else None,
            torch.get_num_threads(),
        )
        loss, scale_grad, bias_grad = (number(value) for value in (weight * part, scale_sum, bias_sum))
        return loss, *problem.results(), scale_grad, bias_grad
    gradients = Gradients(image, text, scale, dtype) if with_gradients else None
    loss_sum = bias_sum = 0.0
    chunk_size = chunk_rows(call.chunk_size, text)
    for block in column_blocks(image, text):
        tile = LibraryProducts(image, text[block], chunk_size, with_gradients)
        for chunk in tile.chunks(first - block.start):
            part, total = chunk.sigmoid_gradient(scale, bias, weight, _addresses(groups, chunk.span, block))
            loss_sum += weight * part
            bias_sum += total
            if gradients:
                gradients.add_chunk(chunk)
        if gradients:
            gradients.add_block(block, tile)
    loss = number(loss_sum)
    if gradients:
        return loss, *gradients.results(), number(bias_sum)
    return loss, image.new_empty(0), text.new_empty(0), number(0.0), number(0.0)


def _first_positive(call: ContrastiveCall) -> int:
    return _NO_POSITIVES if call.positive_offset is None else call.positive_offset


def _addresses(
    groups: GroupTile | None, rows: slice, columns: slice, shares: Sequence[Tensor] = ()
) -> tuple[int, int, int, int]:
    """The addresses of the ids and shares of some rows and columns, 0 without groups or shares."""
    if groups is None:
        return 0, 0, 0, 0
    row_ids, column_ids = groups.rows[rows], groups.columns[columns]
    ids = address(row_ids, torch.int32, len(row_ids)), address(column_ids, torch.int32, len(column_ids))
    if not shares:
        return *ids, 0, 0
    return (
        *ids,
        address(shares[0][rows], torch.float32, len(row_ids)),
        address(shares[1][columns], torch.float32, len(column_ids)),
    )


def _with_fixed_offset(
    image: Tensor, text: Tensor, scale: float, first: int, chunk_size: int, products: Tensor | None = None
) -> tuple[Tensor, Tensor] | None:
    """(r, q), or None if the offset doesn't suit every row and column."""
    norms = [_largest_norm(image), _largest_norm(text)]
    factor = scale / math.log(2)
    # With this offset the largest possible sum of a row or column is 2^124, below overflow.
    offset = abs(factor) * math.prod(norms) - 124 + math.log2(max(len(image), len(text)))
    if not math.isfinite(offset):
        return None
    offset = float(math.ceil(offset))
    row_sums = full((len(image),), 0.0)
    column_sums = full((len(text),), 0.0, torch.float64)
    if takes_amx(image):
        problem = _AmxProblem(image, text, first, None)
        outputs = row_sums.data_ptr(), column_sums.data_ptr()
        _cpu.amx_exponential_sums(problem.pointers, factor, offset, *outputs, torch.get_num_threads())
    else:
        for chunk in LibraryProducts(image, text, chunk_size, products=products).chunks(first, read_only=True):
            chunk.exponential_sums(
                factor,
                offset,
                address(row_sums[chunk.span], torch.float32, len(chunk.rows)),
                address(column_sums, torch.float64, len(text)),
            )
    # Terms below 2^-126 were flushed to zero. Empty sums and NaN fail this test as well.
    least = 2.0**-100 * max(len(image), len(text))
    if not all(sums.isfinite().all() and sums.min().item() > least for sums in (row_sums, column_sums)):
        return None
    rows, columns = (sums.double().log2_().add_(offset).mul_(math.log(2)) for sums in (row_sums, column_sums))
    return rows, columns


def _largest_norm(features: Tensor) -> float:
    """An upper bound of the rows' norms, in the features' precision. torch would copy them for another precision."""
    return torch.linalg.vector_norm(features, dim=1).max().item() * (1 + torch.finfo(features.dtype).eps)


def _with_running_maximum(
    image: Tensor, text: Tensor, scale: float, first: int, chunk_size: int, products: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(r, q) for any logits. An empty sum is -inf."""
    rows_lse = full((len(image),), -math.inf, torch.float64)
    columns_lse = full((len(text),), -math.inf, torch.float64)
    for chunk in LibraryProducts(image, text, chunk_size, products=products).chunks(first, read_only=True):
        # The logits are not rounded again, because the backward also scales the products in more than single precision.
        logits = chunk.dots.double().mul_(scale)
        logits.diagonal(chunk.first).fill_(-math.inf)
        rows_lse[chunk.span] = log_sum_exp(logits, 1)
        columns_lse = torch.logaddexp(columns_lse, log_sum_exp(logits, 0))
    return rows_lse, columns_lse


class _AmxProblem:
    """Contiguous features, which C++ reads in place, and gradients of `dtype` (empty for None).

    C++ writes float32 or bfloat16. Gradients of another dtype are float32 until `results` converts them.
    """

    def __init__(self, image: Tensor, text: Tensor, first: int, dtype: torch.dtype | None) -> None:
        self.dtype = dtype
        self.image, self.text = image.contiguous(), text.contiguous()
        self.pointers = _cpu.AmxProblem(
            address(self.image, torch.bfloat16, *image.shape),
            address(self.text, torch.bfloat16, *text.shape),
            len(image),
            len(text),
            image.shape[1],
            first,
        )
        written = dtype if dtype == torch.bfloat16 else torch.float32
        self.image_grad, self.text_grad = (
            features.new_empty(features.shape if dtype else (0,), dtype=written) for features in (image, text)
        )

    def gradients(self, scale: float) -> _cpu.AmxGradients:
        """The gradients as the C++ functions take them."""
        in_single = self.image_grad.dtype == torch.float32
        return _cpu.AmxGradients(self.image_grad.data_ptr(), self.text_grad.data_ptr(), in_single, scale)

    def results(self) -> tuple[Tensor, Tensor]:
        """The gradients of image and text."""
        dtype = self.dtype or torch.float32
        return self.image_grad.to(dtype), self.text_grad.to(dtype)
