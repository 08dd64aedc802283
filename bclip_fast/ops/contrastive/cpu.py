"""The operators on the CPU: C++ for everything that happens to S (csrc/contrastive.h).

bfloat16 features on a processor with a matrix unit (AMX) stay in C++ throughout: S and its gradient are made in tiles
that never leave a core's caches, where torch's matmuls would write them out, rounded. All else is multiplied by the
library, in chunks of rows, in single precision, which holds products of half-precision features exactly and runs near
the processor's peak.

One exponential serves rows and columns: features of bounded norm have bounded logits, so a fixed offset does for all of
them, unless the sums show that it underflowed somewhere; then a running maximum replaces it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bclip_fast import _cpu

from ..cuda_device import address
from .loss_terms import Groups, log_sum_exp

# The dot products of a chunk of rows and a block of columns stay in the last-level cache between matmul and kernel.
# 1024 x 2048 is the fastest shape of that size: matmuls of few rows and many columns spend their time on packing.
_LIBRARY_CHUNK_BYTES = 8 << 20
_LIBRARY_MIN_ROWS = 128
_LIBRARY_COLUMNS = 2048
# A positive that stands beyond every column is none.
_NO_POSITIVES = 1 << 40


def forward(
    image: Tensor, text: Tensor, scale: Tensor, first: int | None, chunk_size: int, *, products: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `reference.forward`; `products`, float32 (b, B), is filled with image @ text.T."""
    if products is not None:
        torch.mm(image.float(), text.float().T, out=products)
    first = _NO_POSITIVES if first is None else first
    rows, columns = _full((len(image),), -math.inf, torch.float64), []
    chunk_size = _chunk_rows(chunk_size, text)
    for block in _column_blocks(image, text):
        own = None if products is None else products[:, block]
        problem = image, text[block], float(scale), first - block.start, chunk_size, own
        of_block = _with_fixed_offset(*problem) or _with_running_maximum(*problem)
        rows = torch.logaddexp(rows, of_block[0])
        columns.append(of_block[1])
    return rows, torch.cat(columns)


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
    products: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.backward`; with `products`, float32 (b, B), image @ text.T isn't multiplied again."""
    rows_lse, columns_lse, positive_grad = (part.contiguous() for part in (rows_lse, columns_lse, positive_grad))
    first = _NO_POSITIVES if first is None else first
    shares = [] if groups is None else [(weight * part).float() for part in (groups.row_shares, groups.column_shares)]
    if _takes_amx(image):
        problem = _AmxProblem(image, text, first, dtype)
        scale_grad = _cpu.amx_softmax_gradient(
            problem.pointers,
            float(scale) + hardness,
            float(weight),
            address(rows_lse, torch.float64, len(image)),
            address(columns_lse, torch.float64, len(text)),
            0 if first == _NO_POSITIVES else address(positive_grad, torch.float32, len(image)),
            _addresses(groups, slice(None), slice(None), shares),
            problem.gradients(float(scale)),
            torch.get_num_threads(),
        )
        return problem.image_grad, problem.text_grad, _number(scale_grad)
    gradients = _Gradients(image, text, float(scale), dtype)
    chunk_size = _chunk_rows(chunk_size, text)
    for block in _column_blocks(image, text):
        own = None if products is None else products[:, block]
        of_block = _LibraryProducts(image, text[block], chunk_size, with_gradients=True, products=own)
        for chunk in of_block.chunks(first - block.start):
            chunk.softmax_gradient(
                float(scale) + hardness,
                float(weight),
                address(rows_lse[chunk.own], torch.float64, len(chunk.rows)),
                address(columns_lse[block], torch.float64, len(of_block.text)),
                0 if first == _NO_POSITIVES else address(positive_grad[chunk.own], torch.float32, len(chunk.rows)),
                _addresses(groups, chunk.own, block, shares),
            )
            gradients.add_chunk(chunk)
        gradients.add_block(block, of_block)
    return gradients.results()


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
    """As `reference.siglip`."""
    first = _NO_POSITIVES if first is None else first
    offset = 0.0 if bias is None else float(bias)
    if _takes_amx(image):
        problem = _AmxProblem(image, text, first, dtype if with_gradients else None)
        part, bias_sum, scale_sum = _cpu.amx_sigmoid_gradient(
            problem.pointers,
            float(scale),
            offset,
            weight,
            _addresses(groups, slice(None), slice(None)),
            problem.gradients(float(scale)) if with_gradients else None,
            torch.get_num_threads(),
        )
        loss, scale_grad, bias_grad = (_number(value) for value in (weight * part, scale_sum, bias_sum))
        return loss, problem.image_grad, problem.text_grad, scale_grad, bias_grad
    gradients = _Gradients(image, text, float(scale), dtype) if with_gradients else None
    loss_sum = bias_sum = 0.0
    chunk_size = _chunk_rows(chunk_size, text)
    for block in _column_blocks(image, text):
        products = _LibraryProducts(image, text[block], chunk_size, with_gradients)
        for chunk in products.chunks(first - block.start):
            part, total = chunk.sigmoid_gradient(float(scale), offset, weight, _addresses(groups, chunk.own, block))
            loss_sum += weight * part
            bias_sum += total
            if gradients:
                gradients.add_chunk(chunk)
        if gradients:
            gradients.add_block(block, products)
    loss = _number(loss_sum)
    if gradients:
        return loss, *gradients.results(), _number(bias_sum)
    return loss, image.new_empty(0), text.new_empty(0), _number(0.0), _number(0.0)


def _chunk_rows(chunk_size: int, text: Tensor) -> int:
    """Rows of a block of columns that hold as many products as `chunk_size` rows of all columns."""
    return chunk_size * max(1, len(text) // _LIBRARY_COLUMNS)


def _column_blocks(image: Tensor, text: Tensor) -> list[slice]:
    size = len(text) if _takes_amx(image) else _LIBRARY_COLUMNS
    return [slice(start, min(start + size, len(text))) for start in range(0, len(text), size)]


def _addresses(
    groups: Groups | None, own: slice, block: slice, shares: Sequence[Tensor] = ()
) -> tuple[int, int, int, int]:
    """Of the ids and shares of a chunk's rows and a block's columns, 0 where there are none."""
    if groups is None:
        return 0, 0, 0, 0
    rows, columns = groups.rows[own], groups.columns[block]
    ids = address(rows, torch.int32, len(rows)), address(columns, torch.int32, len(columns))
    if not shares:
        return *ids, 0, 0
    return (
        *ids,
        address(shares[0][own], torch.float32, len(rows)),
        address(shares[1][block], torch.float32, len(columns)),
    )


def _with_fixed_offset(
    image: Tensor, text: Tensor, scale: float, first: int, chunk_size: int, products: Tensor | None = None
) -> tuple[Tensor, Tensor] | None:
    """(r, q), or None where the offset doesn't suit every row and column."""
    norms = [_largest_norm(image), _largest_norm(text)]
    factor = scale / math.log(2)
    # The largest sum that a row or a column can have is then 2^124, below overflow.
    offset = abs(factor) * math.prod(norms) - 124 + math.log2(max(len(image), len(text)))
    if not math.isfinite(offset):
        return None
    offset = float(math.ceil(offset))
    row_sums = _full((len(image),), 0.0)
    column_sums = _full((len(text),), 0.0, torch.float64)
    if _takes_amx(image):
        problem = _AmxProblem(image, text, first, None)
        outputs = row_sums.data_ptr(), column_sums.data_ptr()
        _cpu.amx_exponential_sums(problem.pointers, factor, offset, *outputs, torch.get_num_threads())
    else:
        for chunk in _LibraryProducts(image, text, chunk_size, products=products).chunks(first, read_only=True):
            chunk.exponential_sums(
                factor,
                offset,
                address(row_sums[chunk.own], torch.float32, len(chunk.rows)),
                address(column_sums, torch.float64, len(text)),
            )
    # A term below 2^-126 was flushed to zero. Sums over nothing, and NaN, fail as well.
    least = 2.0**-100 * max(len(image), len(text))
    if not all(sums.isfinite().all() and sums.min().item() > least for sums in (row_sums, column_sums)):
        return None
    rows, columns = (sums.double().log2_().add_(offset).mul_(math.log(2)) for sums in (row_sums, column_sums))
    return rows, columns


def _largest_norm(features: Tensor) -> float:
    """Not below the largest; in the features' own precision, as torch would copy them for another."""
    return torch.linalg.vector_norm(features, dim=1).max().item() * (1 + torch.finfo(features.dtype).eps)


def _with_running_maximum(
    image: Tensor, text: Tensor, scale: float, first: int, chunk_size: int, products: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(r, q) whatever the logits; sums over nothing are -inf."""
    rows_lse = _full((len(image),), -math.inf, torch.float64)
    columns_lse = _full((len(text),), -math.inf, torch.float64)
    for chunk in _LibraryProducts(image, text, chunk_size, products=products).chunks(first, read_only=True):
        # Not rounded again: the backward's powers are of scale * dots in more than single precision, too.
        logits = chunk.dots.double().mul_(scale)
        logits.diagonal(chunk.first).fill_(-math.inf)
        rows_lse[chunk.own] = log_sum_exp(logits, 1)
        columns_lse = torch.logaddexp(columns_lse, log_sum_exp(logits, 0))
    return rows_lse, columns_lse


class _Gradients:
    """What the chunks of G add up to."""

    def __init__(self, image: Tensor, text: Tensor, scale: float, dtype: torch.dtype) -> None:
        self.scale, self.dtype = scale, dtype
        # More than one block of columns adds to a row.
        self.in_blocks = len(_column_blocks(image, text)) > 1
        self.image_grad = image.new_zeros(image.shape, dtype=torch.float32 if self.in_blocks else dtype)
        self.text_grad = text.new_empty(text.shape if self.in_blocks else (0,), dtype=dtype)
        self.scale_grad = 0.0

    def add_chunk(self, chunk: _LibraryChunk) -> None:
        unscaled = chunk.image_gradient()
        # sum(G * (I @ T.T)) = sum((G @ T) * I): no second look at S.
        self.scale_grad += (unscaled.double() * chunk.rows).sum().item()
        self.image_grad[chunk.own] += unscaled.mul_(self.scale)

    def add_block(self, block: slice, products: _LibraryProducts) -> None:
        scaled = products.text_grad.mul_(self.scale)
        if self.in_blocks:
            self.text_grad[block] = scaled
        else:
            self.text_grad = scaled.to(self.dtype)

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.image_grad.to(self.dtype), self.text_grad, _number(self.scale_grad)


@dataclass(frozen=True)
class _LibraryChunk:
    products: _LibraryProducts
    start: int
    rows: Tensor
    """Rows of the images from `start` on."""
    first: int
    """The column of the first row's positive."""
    dots: Tensor
    """The rows' dot products with all texts, overwritten by G; all chunks share the memory."""

    @property
    def own(self) -> slice:
        return slice(self.start, self.start + len(self.rows))

    def _block(self) -> tuple[int, ...]:
        return address(self.dots, torch.float32, *self.dots.shape), *self.dots.shape, self.first

    def exponential_sums(self, factor: float, offset: float, *outputs: int) -> None:
        _cpu.exponential_sums(*self._block(), factor, offset, *outputs, torch.get_num_threads())

    def softmax_gradient(self, *arguments: Any) -> None:
        _cpu.softmax_gradient(*self._block(), *arguments, torch.get_num_threads())

    def sigmoid_gradient(
        self, scale: float, bias: float, weight: float, groups: tuple[int, int, int, int]
    ) -> tuple[float, float]:
        constants = scale, bias, weight, self.products.with_gradients
        return _cpu.sigmoid_gradient(*self._block(), *constants, groups, torch.get_num_threads())

    def image_gradient(self) -> Tensor:
        """Once G is there: G @ T; adds G.T @ I to the text's."""
        self.products.text_grad.addmm_(self.dots.T, self.rows)
        return self.dots @ self.products.text


class _LibraryProducts:
    """Dot products of images and texts, chunk by chunk: multiplied by the library, or read from `products` (b, B)."""

    def __init__(
        self,
        image: Tensor,
        text: Tensor,
        chunk_size: int,
        with_gradients: bool = False,
        products: Tensor | None = None,
    ) -> None:
        self.image, self.text, self.with_gradients = image, text.float(), with_gradients
        self.products = products
        largest = max(_LIBRARY_MIN_ROWS, _LIBRARY_CHUNK_BYTES // (4 * len(text)))
        self.chunk_size = min(chunk_size, len(image), largest)
        self.text_grad = self.text.new_zeros(text.shape if with_gradients else (0,))

    def chunks(self, first: int, read_only: bool = False) -> Iterator[_LibraryChunk]:
        """`read_only`: the chunks' products aren't overwritten, so that given ones need no copy."""
        in_place = read_only and self.products is not None and self.products.is_contiguous()
        buffer = self.text.new_empty(0 if in_place else self.chunk_size, len(self.text))
        for start in range(0, len(self.image), self.chunk_size):
            own = slice(start, start + self.chunk_size)
            rows = self.image[own].float()
            if self.products is None:
                dots = torch.mm(rows, self.text.T, out=buffer[: len(rows)])
            else:
                dots = self.products[own] if in_place else buffer[: len(rows)].copy_(self.products[own])
            yield _LibraryChunk(self, start, rows, first + start, dots)


def _full(shape: tuple[int, ...], value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    # Of this device and dtype, whatever the defaults of torch say.
    return torch.full(shape, value, dtype=dtype, device="cpu")


def _number(value: float) -> Tensor:
    return _full((), value)


def _takes_amx(image: Tensor) -> bool:
    return image.dtype == torch.bfloat16 and _cpu.has_amx()


class _AmxProblem:
    """Contiguous features, which C++ reads as they are, and the gradients, of `dtype` if any, which it writes."""

    def __init__(self, image: Tensor, text: Tensor, first: int, dtype: torch.dtype | None) -> None:
        self.image, self.text = image.contiguous(), text.contiguous()
        self.pointers = _cpu.AmxProblem(
            address(self.image, torch.bfloat16, *image.shape),
            address(self.text, torch.bfloat16, *text.shape),
            len(image),
            len(text),
            image.shape[1],
            first,
        )
        self.image_grad, self.text_grad = (
            features.new_empty(features.shape if dtype else (0,), dtype=dtype) for features in (image, text)
        )

    def gradients(self, scale: float) -> _cpu.AmxGradients:
        in_single = self.image_grad.dtype == torch.float32
        if not in_single and self.image_grad.dtype != torch.bfloat16:
            raise ValueError(f"gradients must be float32 or bfloat16, not {self.image_grad.dtype}")
        return _cpu.AmxGradients(self.image_grad.data_ptr(), self.text_grad.data_ptr(), in_single, scale)
