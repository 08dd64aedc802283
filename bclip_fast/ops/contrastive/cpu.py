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
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bclip_fast import _cpu

from ..arguments import address

# A chunk this small stays in the last-level cache between matmul and kernel; a larger one gains nothing.
_LIBRARY_CHUNK_BYTES = 8 << 20
_LIBRARY_MIN_ROWS = 128


def forward(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, first: int, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.forward`."""
    results = _with_fixed_offset(image, text, float(scale), first, chunk_size)
    rows, columns, positive = results or _with_running_maximum(image, text, float(scale), first, chunk_size)
    return (rows, columns, positive) if bias is None else (rows + bias, columns + bias, positive + bias)


def backward(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    first: int,
    rows_lse: Tensor,
    columns_lse: Tensor,
    weight: Tensor,
    positive_grad: Tensor,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `reference.backward`."""
    rows_lse, columns_lse, positive_grad = (part.contiguous() for part in (rows_lse, columns_lse, positive_grad))
    if _takes_amx(image):
        problem = _AmxProblem(image, text, first, with_gradients=True)
        scale_grad = _cpu.amx_softmax_gradient(
            problem.pointers,
            float(scale),
            0.0 if bias is None else float(bias),
            float(weight),
            address(rows_lse, torch.float32, len(image)),
            address(columns_lse, torch.float32, len(text)),
            address(positive_grad, torch.float32, len(image)),
            *problem.outputs,
            torch.get_num_threads(),
        )
        image_grad, text_grad = problem.gradients
        return image_grad, text_grad, torch.tensor(scale_grad), torch.zeros(())
    products = _LibraryProducts(image, text, chunk_size, with_gradients=True)
    gradients = _Gradients(image, float(scale))
    for chunk in products.chunks(first):
        total = chunk.softmax_gradient(
            float(scale),
            0.0 if bias is None else float(bias),
            float(weight),
            address(rows_lse[chunk.own], torch.float32, len(chunk.rows)),
            address(columns_lse, torch.float32, len(text)),
            address(positive_grad[chunk.own], torch.float32, len(chunk.rows)),
        )
        gradients.add(chunk, chunk.image_gradient(), total)
    return gradients.results(products.text_gradient(), text.dtype)


def siglip(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    first: int | None,
    weight: float,
    chunk_size: int,
    with_gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `reference.siglip`."""
    # A positive that stands beyond every column is none.
    first = len(text) if first is None else first
    bias_value = 0.0 if bias is None else float(bias)
    if _takes_amx(image):
        problem = _AmxProblem(image, text, first, with_gradients)
        sums = _cpu.amx_sigmoid_gradient(
            problem.pointers,
            float(scale),
            bias_value,
            weight,
            with_gradients,
            *problem.outputs,
            torch.get_num_threads(),
        )
        loss, bias_grad, scale_grad = (torch.tensor(value) for value in sums)
        image_grad, text_grad = problem.gradients
        return weight * loss, image_grad, text_grad, scale_grad, bias_grad
    products = _LibraryProducts(image, text, chunk_size, with_gradients)
    gradients = _Gradients(image, float(scale)) if with_gradients else None
    loss = 0.0
    for chunk in products.chunks(first):
        part, total = chunk.sigmoid_gradient(float(scale), bias_value, weight)
        loss += weight * part
        if gradients:
            gradients.add(chunk, chunk.image_gradient(), total)
    if gradients:
        return torch.tensor(loss), *gradients.results(products.text_gradient(), text.dtype)
    return torch.tensor(loss), image.new_empty(0), text.new_empty(0), torch.zeros(()), torch.zeros(())


def _with_fixed_offset(
    image: Tensor, text: Tensor, scale: float, first: int, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor] | None:
    """(r, q, positives) without the bias, or None where the offset doesn't suit every row and column."""
    norms = [torch.linalg.vector_norm(tensor, dim=1, dtype=torch.float32).max().item() for tensor in (image, text)]
    factor = scale / math.log(2)
    # The largest sum that a row or a column can have is then 2^124, below overflow.
    offset = abs(factor) * math.prod(norms) - 124 + math.log2(max(len(image), len(text)))
    if not math.isfinite(offset):
        return None
    offset = float(math.ceil(offset))
    row_sums, positive = torch.empty(len(image)), torch.empty(len(image))
    column_sums = torch.zeros(len(text), dtype=torch.float64)
    if _takes_amx(image):
        problem = _AmxProblem(image, text, first, with_gradients=False)
        pointers = (output.data_ptr() for output in (row_sums, column_sums, positive))
        _cpu.amx_exponential_sums(problem.pointers, factor, offset, *pointers, torch.get_num_threads())
    else:
        for chunk in _LibraryProducts(image, text, chunk_size, with_gradients=False).chunks(first):
            chunk.exponential_sums(
                factor,
                offset,
                address(row_sums[chunk.own], torch.float32, len(chunk.rows)),
                address(column_sums, torch.float64, len(text)),
                address(positive[chunk.own], torch.float32, len(chunk.rows)),
            )
    # A term below 2^-126 was flushed to zero. Sums over nothing, and NaN, fail as well.
    least = 2.0**-100 * max(len(image), len(text))
    if not all(sums.isfinite().all() and sums.min().item() > least for sums in (row_sums, column_sums)):
        return None
    rows, columns = (sums.double().log2_().add_(offset).mul_(math.log(2)).float() for sums in (row_sums, column_sums))
    return rows, columns, positive.mul_(scale)


def _with_running_maximum(
    image: Tensor, text: Tensor, scale: float, first: int, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(r, q, positives) without the bias, whatever the logits; sums over nothing are -inf."""
    rows_lse, positive = torch.empty(len(image)), torch.empty(len(image))
    columns_lse = torch.full((len(text),), -math.inf)
    for chunk in _LibraryProducts(image, text, chunk_size, with_gradients=False).chunks(first):
        logits = chunk.dots.mul_(scale)
        diagonal = logits.diagonal(chunk.first)
        positive[chunk.own] = diagonal
        diagonal.fill_(-math.inf)
        rows_lse[chunk.own] = logits.logsumexp(1)
        columns_lse = torch.logaddexp(columns_lse, logits.logsumexp(0))
    return rows_lse, columns_lse, positive


class _Gradients:
    """What the chunks of G add up to."""

    def __init__(self, image: Tensor, scale: float) -> None:
        self.scale = scale
        self.image_grad = torch.empty(image.shape, dtype=image.dtype)
        self.scale_grad = self.bias_grad = 0.0

    def add(self, chunk: _Chunk, unscaled: Tensor, total: float) -> None:
        """G @ T of the chunk, in single precision, and the sum of its G."""
        # sum(G * (I @ T.T)) = sum((G @ T) * I): no second look at S.
        self.scale_grad += torch.linalg.vecdot(unscaled, chunk.rows.float()).sum(dtype=torch.float64).item()
        self.bias_grad += total
        self.image_grad[chunk.own] = unscaled.mul_(self.scale)

    def results(self, unscaled: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        text_grad = unscaled.mul_(self.scale).to(dtype, memory_format=torch.contiguous_format)
        return self.image_grad, text_grad, torch.tensor(self.scale_grad), torch.tensor(self.bias_grad)


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

    def softmax_gradient(self, *arguments: float) -> float:
        return _cpu.softmax_gradient(*self._block(), *arguments, torch.get_num_threads())

    def sigmoid_gradient(self, scale: float, bias: float, weight: float) -> tuple[float, float]:
        with_gradients = self.products.with_gradients
        return _cpu.sigmoid_gradient(*self._block(), scale, bias, weight, with_gradients, torch.get_num_threads())

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


def _takes_amx(image: Tensor) -> bool:
    return image.dtype == torch.bfloat16 and _cpu.has_amx()


class _AmxProblem:
    """Contiguous features, which C++ reads as they are, and gradients, which it writes."""

    def __init__(self, image: Tensor, text: Tensor, first: int, with_gradients: bool) -> None:
        self.image, self.text = image.contiguous(), text.contiguous()
        self.pointers = _cpu.AmxProblem(
            address(self.image, torch.bfloat16, *image.shape),
            address(self.text, torch.bfloat16, *text.shape),
            len(image), len(text), image.shape[1], first,
        )  # fmt: skip
        self.gradients = [torch.empty(part.shape if with_gradients else 0, dtype=part.dtype) for part in (image, text)]
        self.outputs = [gradient.data_ptr() for gradient in self.gradients]
