"""The operators on the CPU: C++ for everything that happens to S (csrc/contrastive.h), in chunks of rows.

bfloat16 features on a processor with a matrix unit (AMX) stay in C++ throughout: S and its gradient are made in tiles
that never leave the caches, where torch's matmuls would write them out, rounded. All else is multiplied by the library
in single precision, which holds products of half-precision features exactly and runs near the processor's peak.

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

from ..arguments import address
from .terms import Groups, log_sum_exp

# A chunk this small stays in the last-level cache between matmul and kernel; a larger one gains nothing.
_LIBRARY_CHUNK_BYTES = 8 << 20
_LIBRARY_MIN_ROWS = 128
# With gradients, a chunk's G is stored, twice; without, its rows are but those between two joins of the threads.
_AMX_ROWS_WITH_GRADIENTS = 512
_AMX_ROWS = 2048
_AMX_PANEL = 32
# A positive that stands beyond every column is none.
_NO_POSITIVES = 1 << 40


def forward(image: Tensor, text: Tensor, scale: Tensor, first: int | None, chunk_size: int) -> tuple[Tensor, Tensor]:
    """As `reference.forward`."""
    first = _NO_POSITIVES if first is None else first
    return _with_fixed_offset(image, text, float(scale), first, chunk_size) or _with_running_maximum(
        image, text, float(scale), first, chunk_size
    )


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
    """As `reference.backward`."""
    rows_lse, columns_lse, positive_grad = (part.contiguous() for part in (rows_lse, columns_lse, positive_grad))
    shares = [] if groups is None else [(weight * part).float() for part in (groups.row_shares, groups.column_shares)]
    products = _products(image, text, chunk_size, with_gradients=True)
    gradients = _Gradients(image, float(scale), dtype)
    for chunk in products.chunks(_NO_POSITIVES if first is None else first):
        chunk.softmax_gradient(
            float(scale) + hardness,
            float(weight),
            address(rows_lse[chunk.own], torch.float64, len(chunk.rows)),
            address(columns_lse, torch.float64, len(text)),
            0 if first is None else address(positive_grad[chunk.own], torch.float32, len(chunk.rows)),
            _addresses(groups, chunk.own, shares),
        )
        gradients.add(chunk, chunk.image_gradient())
    return gradients.results(products.text_gradient())


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
    products = _products(image, text, chunk_size, with_gradients)
    gradients = _Gradients(image, float(scale), dtype) if with_gradients else None
    loss = bias_grad = 0.0
    for chunk in products.chunks(_NO_POSITIVES if first is None else first):
        offset = 0.0 if bias is None else float(bias)
        part, total = chunk.sigmoid_gradient(float(scale), offset, weight, _addresses(groups, chunk.own))
        loss += weight * part
        bias_grad += total
        if gradients:
            gradients.add(chunk, chunk.image_gradient())
    if gradients:
        return torch.tensor(loss), *gradients.results(products.text_gradient()), torch.tensor(bias_grad)
    return torch.tensor(loss), image.new_empty(0), text.new_empty(0), torch.zeros(()), torch.zeros(())


def _addresses(groups: Groups | None, own: slice, shares: Sequence[Tensor] = ()) -> tuple[int, int, int, int]:
    """Of the ids and shares of a chunk's rows and all columns, 0 where there are none."""
    if groups is None:
        return 0, 0, 0, 0
    rows, columns = groups.rows[own], groups.columns
    ids = address(rows, torch.int32, len(rows)), address(columns, torch.int32, len(columns))
    if not shares:
        return *ids, 0, 0
    return (
        *ids,
        address(shares[0][own], torch.float32, len(rows)),
        address(shares[1], torch.float32, len(columns)),
    )


def _with_fixed_offset(
    image: Tensor, text: Tensor, scale: float, first: int, chunk_size: int
) -> tuple[Tensor, Tensor] | None:
    """(r, q), or None where the offset doesn't suit every row and column."""
    norms = [torch.linalg.vector_norm(tensor, dim=1, dtype=torch.float32).max().item() for tensor in (image, text)]
    factor = scale / math.log(2)
    # The largest sum that a row or a column can have is then 2^124, below overflow.
    offset = abs(factor) * math.prod(norms) - 124 + math.log2(max(len(image), len(text)))
    if not math.isfinite(offset):
        return None
    offset = float(math.ceil(offset))
    row_sums = torch.empty(len(image))
    column_sums = torch.zeros(len(text), dtype=torch.float64)
    products = _products(image, text, chunk_size, with_gradients=False)
    for chunk in products.chunks(first):
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


def _with_running_maximum(
    image: Tensor, text: Tensor, scale: float, first: int, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """(r, q) whatever the logits; sums over nothing are -inf."""
    rows_lse = torch.empty(len(image), dtype=torch.float64)
    columns_lse = torch.full((len(text),), -math.inf, dtype=torch.float64)
    for chunk in _LibraryProducts(image, text, chunk_size, with_gradients=False).chunks(first):
        logits = chunk.dots.mul_(scale)
        logits.diagonal(chunk.first).fill_(-math.inf)
        rows_lse[chunk.own] = log_sum_exp(logits, 1)
        columns_lse = torch.logaddexp(columns_lse, log_sum_exp(logits, 0))
    return rows_lse, columns_lse


class _Gradients:
    """What the chunks of G add up to."""

    def __init__(self, image: Tensor, scale: float, dtype: torch.dtype) -> None:
        self.scale = scale
        self.image_grad = torch.empty(image.shape, dtype=dtype)
        self.scale_grad = 0.0

    def add(self, chunk: _Chunk, unscaled: Tensor) -> None:
        """G @ T of the chunk, in single precision."""
        # sum(G * (I @ T.T)) = sum((G @ T) * I): no second look at S.
        self.scale_grad += torch.linalg.vecdot(unscaled, chunk.rows.float()).sum(dtype=torch.float64).item()
        self.image_grad[chunk.own] = unscaled.mul_(self.scale)

    def results(self, unscaled: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        text_grad = unscaled.mul_(self.scale).to(self.image_grad.dtype, memory_format=torch.contiguous_format)
        return self.image_grad, text_grad, torch.tensor(self.scale_grad)


@dataclass(frozen=True)
class _Chunk:
    start: int
    rows: Tensor
    """Rows of the images from `start` on."""
    first: int
    """The column of the first row's positive."""

    @property
    def own(self) -> slice:
        return slice(self.start, self.start + len(self.rows))


@dataclass(frozen=True)
class _LibraryChunk(_Chunk):
    products: _LibraryProducts
    dots: Tensor
    """The rows' dot products with all texts, overwritten by G; all chunks share the memory."""

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
    def __init__(self, image: Tensor, text: Tensor, chunk_size: int, with_gradients: bool) -> None:
        self.image, self.text, self.with_gradients = image, text.float(), with_gradients
        largest = max(_LIBRARY_MIN_ROWS, _LIBRARY_CHUNK_BYTES // (4 * len(text)))
        self.chunk_size = min(chunk_size, len(image), largest)
        self.text_grad = torch.zeros(text.shape if with_gradients else 0)

    def chunks(self, first: int) -> Iterator[_LibraryChunk]:
        buffer = torch.empty(self.chunk_size, len(self.text))
        for start in range(0, len(self.image), self.chunk_size):
            rows = self.image[start : start + self.chunk_size].float()
            dots = torch.mm(rows, self.text.T, out=buffer[: len(rows)])
            yield _LibraryChunk(start, rows, first + start, self, dots)

    def text_gradient(self) -> Tensor:
        return self.text_grad


@dataclass(frozen=True)
class _AmxChunk(_Chunk):
    products: _AmxProducts
    block: _cpu.AmxBlock

    def exponential_sums(self, factor: float, offset: float, *outputs: int) -> None:
        _cpu.amx_exponential_sums(self.block, factor, offset, *outputs, torch.get_num_threads())

    def softmax_gradient(self, *arguments: Any) -> None:
        _cpu.amx_softmax_gradient(self.block, *arguments, self.products.outputs(), torch.get_num_threads())

    def sigmoid_gradient(
        self, scale: float, bias: float, weight: float, groups: tuple[int, int, int, int]
    ) -> tuple[float, float]:
        outputs = self.products.outputs() if self.products.with_gradients else None
        return _cpu.amx_sigmoid_gradient(self.block, scale, bias, weight, groups, outputs, torch.get_num_threads())

    def image_gradient(self) -> Tensor:
        """G @ T, made along with G."""
        # (D / 32, b / 32, 32 rows, 32 columns); a last chunk with fewer rows fills but the beginning.
        shape = _panels(self.products.width), _panels(len(self.rows)), _AMX_PANEL, _AMX_PANEL
        filled = self.products.image_grad.flatten()[: math.prod(shape)].view(shape)
        return filled.permute(1, 2, 0, 3).flatten(2).flatten(0, 1)[: len(self.rows), : self.products.width]


class _AmxProducts:
    """The packed layouts are those of csrc/contrastive.h."""

    def __init__(self, image: Tensor, text: Tensor, chunk_size: int, with_gradients: bool) -> None:
        self.image, text, self.with_gradients = image.contiguous(), text.contiguous(), with_gradients
        self.num_columns, self.width = text.shape
        self.chunk_size = min(chunk_size, len(image), _AMX_ROWS_WITH_GRADIENTS if with_gradients else _AMX_ROWS)
        self.text_across = _packed(text, transpose=True)
        if with_gradients:
            self.text = _packed(text, transpose=False)
            rows, columns, width = (_panels(size) for size in (self.chunk_size, self.num_columns, self.width))
            self.image_grad = torch.empty(width, rows, _AMX_PANEL, _AMX_PANEL)
            self.text_grad = torch.zeros(columns, width, _AMX_PANEL, _AMX_PANEL)
            self.workspace = torch.empty(2, rows, columns, _AMX_PANEL, _AMX_PANEL, dtype=torch.bfloat16)

    def chunks(self, first: int) -> Iterator[_AmxChunk]:
        for start in range(0, len(self.image), self.chunk_size):
            rows = self.image[start : start + self.chunk_size]
            rows_at = address(rows, torch.bfloat16, len(rows), self.width)
            text_at = self.text_across.data_ptr()
            block = _cpu.AmxBlock(rows_at, text_at, len(rows), self.num_columns, self.width, first + start)
            yield _AmxChunk(start, rows, first + start, self, block)

    def outputs(self) -> _cpu.AmxGradients:
        tensors = self.text, self.image_grad, self.text_grad, self.workspace
        return _cpu.AmxGradients(*(tensor.data_ptr() for tensor in tensors))

    def text_gradient(self) -> Tensor:
        # The result is I.T @ G: (B / 32, D / 32, 32 of D, 32 of B).
        return self.text_grad.permute(0, 3, 1, 2).flatten(2).flatten(0, 1)[: self.num_columns, : self.width]


def _packed(text: Tensor, transpose: bool) -> Tensor:
    shape = _panels(text.shape[0]), _panels(text.shape[1]), _AMX_PANEL, _AMX_PANEL
    packed = torch.empty(shape, dtype=torch.bfloat16)
    source = address(text, torch.bfloat16, *text.shape)
    _cpu.amx_pack(source, *text.shape, transpose, packed.data_ptr(), torch.get_num_threads())
    return packed


def _panels(size: int) -> int:
    return -(-size // _AMX_PANEL)


def _products(image: Tensor, text: Tensor, chunk_size: int, with_gradients: bool) -> _LibraryProducts | _AmxProducts:
    takes_amx = image.dtype == torch.bfloat16 and _cpu.has_amx()
    return (_AmxProducts if takes_amx else _LibraryProducts)(image, text, chunk_size, with_gradients)
