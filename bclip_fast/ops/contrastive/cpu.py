"""Library matmuls in chunks of rows, with all that happens to a chunk fused into one pass of C++ (csrc/contrastive.h).

Matmuls are in single precision, which holds products of half-precision features exactly. One exponential
serves rows and columns: features of bounded norm have bounded logits, so a fixed offset does for all of them, unless
the sums show that it overflowed or underflowed somewhere; then a running maximum replaces it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bclip_fast import _cpu

from ..arguments import address

# A chunk this small stays in the last-level cache between matmul and kernel; a larger one gains nothing.
_CHUNK_BYTES = 8 << 20
_MIN_ROWS = 128


def forward(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, first: int, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.forward`."""
    image, text = image.float(), text.float()
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
    texts = text.float()
    columns_lse = columns_lse.contiguous()
    accumulated = _Gradients(image, texts, float(scale))
    for start, rows, dots in _chunks(image, texts, chunk_size):
        own = slice(start, start + len(rows))
        total = _cpu.softmax_gradient(
            address(dots, torch.float32, len(rows), len(texts)),
            len(rows),
            len(texts),
            first + start,
            float(scale),
            0.0 if bias is None else float(bias),
            float(weight),
            address(rows_lse[own].contiguous(), torch.float32, len(rows)),
            address(columns_lse, torch.float32, len(texts)),
            address(positive_grad[own].contiguous(), torch.float32, len(rows)),
            torch.get_num_threads(),
        )
        accumulated.add(start, rows, dots, total)
    return accumulated.results(text.dtype)


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
    texts = text.float()
    loss = 0.0
    accumulated = _Gradients(image, texts, float(scale)) if with_gradients else None
    for start, rows, dots in _chunks(image, texts, chunk_size):
        part, total = _cpu.sigmoid_gradient(
            address(dots, torch.float32, len(rows), len(texts)),
            len(rows),
            len(texts),
            len(texts) if first is None else first + start,
            float(scale),
            0.0 if bias is None else float(bias),
            weight,
            with_gradients,
            torch.get_num_threads(),
        )
        loss += part
        if accumulated:
            accumulated.add(start, rows, dots, total)
    if accumulated:
        return torch.tensor(weight * loss), *accumulated.results(text.dtype)
    return torch.tensor(weight * loss), image.new_empty(0), text.new_empty(0), torch.zeros(()), torch.zeros(())


class _Gradients:
    """What the chunks of G add up to."""

    def __init__(self, image: Tensor, texts: Tensor, scale: float) -> None:
        self.texts, self.scale = texts, scale
        self.image_grad = torch.empty(image.shape, dtype=image.dtype)
        self.text_grad = torch.zeros(texts.shape)
        self.scale_grad = self.bias_grad = 0.0

    def add(self, start: int, rows: Tensor, grad: Tensor, total: float) -> None:
        """`rows` of the images from `start` on, their chunk of G and its sum."""
        unscaled = grad @ self.texts
        # sum(G * (I @ T.T)) = sum((G @ T) * I): no second look at S.
        self.scale_grad += torch.linalg.vecdot(unscaled, rows).sum(dtype=torch.float64).item()
        self.bias_grad += total
        torch.mul(unscaled, self.scale, out=unscaled)
        self.image_grad[start : start + len(rows)] = unscaled
        self.text_grad.addmm_(grad.T, rows, alpha=self.scale)

    def results(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.image_grad, self.text_grad.to(dtype), torch.tensor(self.scale_grad), torch.tensor(self.bias_grad)


def _chunks(image: Tensor, texts: Tensor, chunk_size: int):  # type: ignore[no-untyped-def]
    """(first row, rows of the images, their dot products with all texts), the last in memory that is used again."""
    chunk_size = min(chunk_size, len(image), max(_MIN_ROWS, _CHUNK_BYTES // (4 * len(texts))))
    buffer = torch.empty(chunk_size, len(texts))
    for start in range(0, len(image), chunk_size):
        rows = image[start : start + chunk_size].float()
        yield start, rows, torch.mm(rows, texts.T, out=buffer[: len(rows)])


def _with_fixed_offset(
    image: Tensor, text: Tensor, scale: float, first: int, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor] | None:
    """(r, q, positives) without the bias, or None where the offset doesn't suit every row and column."""
    largest_norms = [torch.linalg.vector_norm(tensor, dim=1).max().item() for tensor in (image, text)]
    factor = scale / math.log(2)
    # The largest possible sum over a row or column is then 2^124, below overflow.
    offset = abs(factor) * math.prod(largest_norms) - 124 + math.log2(max(len(image), len(text)))
    if not math.isfinite(offset):
        return None
    offset = float(math.ceil(offset))
    sums = torch.empty(len(image))
    positive = torch.empty(len(image))
    column_sums = torch.zeros(len(text), dtype=torch.float64)
    for start, rows, dots in _chunks(image, text, chunk_size):
        own = slice(start, start + len(rows))
        _cpu.exponential_sums(
            address(dots, torch.float32, len(rows), len(text)),
            len(rows),
            len(text),
            first + start,
            factor,
            offset,
            address(sums[own], torch.float32, len(rows)),
            address(column_sums, torch.float64, len(text)),
            address(positive[own], torch.float32, len(rows)),
            torch.get_num_threads(),
        )
    # What was flushed to zero is below 2^-126 a term. A NaN compares false.
    least = 2.0**-100 * max(len(image), len(text))
    if not (min(sums.min().item(), column_sums.min().item()) > least and sums.isfinite().all()):
        return None
    rows_lse, columns_lse = (
        (total.double().log2_() + offset).mul_(math.log(2)).float() for total in (sums, column_sums)
    )
    return rows_lse, columns_lse, positive.mul_(scale)


def _with_running_maximum(
    image: Tensor, text: Tensor, scale: float, first: int, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(r, q, positives) without the bias, whatever the logits; sums over nothing are -inf."""
    rows_lse = torch.empty(len(image))
    positive = torch.empty(len(image))
    columns_lse = torch.full((len(text),), -math.inf)
    for start, rows, logits in _chunks(image, text, chunk_size):
        own = slice(start, start + len(rows))
        diagonal = logits.mul_(scale).diagonal(first + start)
        positive[own] = diagonal
        diagonal.fill_(-math.inf)
        rows_lse[own] = logits.logsumexp(1)
        columns_lse = torch.logaddexp(columns_lse, logits.logsumexp(0))
    return rows_lse, columns_lse, positive
