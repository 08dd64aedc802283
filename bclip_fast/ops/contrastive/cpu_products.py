"""Tiles of S on the CPU by the library's matmuls, in chunks of rows and blocks of columns that stay in the caches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bclip_fast import _cpu
from bclip_fast.ops.pointers import address

# The products of a chunk of rows and a block of columns stay in the last-level cache between matmul and kernel. 1024 x
# 2048 is the fastest shape of this size. Matmuls of few rows and many columns spend their time on packing.
_LIBRARY_CHUNK_BYTES = 8 << 20
_LIBRARY_MIN_ROWS = 128
_LIBRARY_COLUMNS = 2048


def takes_amx(image: Tensor) -> bool:
    """Whether C++ multiplies these features on the matrix unit."""
    return image.dtype == torch.bfloat16 and _cpu.has_amx()


def full(shape: tuple[int, ...], value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor on the CPU, whatever torch's default device and dtype are."""
    return torch.full(shape, value, dtype=dtype, device="cpu")


def number(value: float) -> Tensor:
    """A 0-dimensional float32 tensor on the CPU."""
    return full((), value)


def chunk_rows(chunk_size: int, text: Tensor) -> int:
    """Rows of a block of columns that hold as many products as `chunk_size` rows of all columns."""
    return chunk_size * max(1, len(text) // _LIBRARY_COLUMNS)


def column_blocks(image: Tensor, text: Tensor) -> list[slice]:
    """The blocks of columns: one for the matrix unit, several for the library."""
    size = len(text) if takes_amx(image) else _LIBRARY_COLUMNS
    return [slice(start, min(start + size, len(text))) for start in range(0, len(text), size)]


class Gradients:
    """Sums of the gradients over chunks and blocks."""

    def __init__(self, image: Tensor, text: Tensor, scale: float, dtype: torch.dtype) -> None:
        self.scale, self.dtype = scale, dtype
        # With several blocks of columns, each adds to every row.
        self.in_blocks = len(column_blocks(image, text)) > 1
        self.image_grad = image.new_zeros(image.shape, dtype=torch.float32 if self.in_blocks else dtype)
        self.text_grad = text.new_empty(text.shape if self.in_blocks else (0,), dtype=dtype)
        self.scale_grad = 0.0

    def add_chunk(self, chunk: LibraryChunk) -> None:
        """Adds a chunk whose products have been overwritten by G."""
        unscaled = chunk.image_gradient()
        # sum(G * (I @ T.T)) = sum((G @ T) * I), which needs no second pass over S.
        self.scale_grad += (unscaled.double() * chunk.rows).sum().item()
        self.image_grad[chunk.span] += unscaled.mul_(self.scale)

    def add_block(self, block: slice, products: LibraryProducts) -> None:
        """Adds the texts' gradients of a block of columns, after all its chunks."""
        scaled = products.text_grad.mul_(self.scale)
        if self.in_blocks:
            self.text_grad[block] = scaled
        else:
            self.text_grad = scaled.to(self.dtype)

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of image, text and scale."""
        return self.image_grad.to(self.dtype), self.text_grad, number(self.scale_grad)


@dataclass(frozen=True)
class LibraryChunk:
    """The products of some rows of images with all texts of a tile."""

    products: LibraryProducts
    start: int
    rows: Tensor
    """Rows of the images from `start` on, in float32."""
    first: int
    """The column of the first row's positive."""
    dots: Tensor
    """The rows' dot products with all texts, later overwritten by G. All chunks share the memory."""

    @property
    def span(self) -> slice:
        """The chunk's rows among all images."""
        return slice(self.start, self.start + len(self.rows))

    def _tile(self) -> tuple[int, ...]:
        return address(self.dots, torch.float32, *self.dots.shape), *self.dots.shape, self.first

    def exponential_sums(self, factor: float, offset: float, *outputs: int) -> None:
        """Adds the exponentials to the sums of rows and columns at the addresses `outputs`."""
        _cpu.exponential_sums(*self._tile(), factor, offset, *outputs, torch.get_num_threads())

    def softmax_gradient(self, *arguments: Any) -> None:
        """Overwrites the products by G of the softmax loss."""
        _cpu.softmax_gradient(*self._tile(), *arguments, torch.get_num_threads())

    def sigmoid_gradient(
        self, scale: float, bias: float, weight: float, groups: tuple[int, int, int, int]
    ) -> tuple[float, float]:
        """Returns the sums of the loss and of G, and overwrites the products by G if gradients are needed."""
        constants = scale, bias, weight, self.products.with_gradients
        return _cpu.sigmoid_gradient(*self._tile(), *constants, groups, torch.get_num_threads())

    def image_gradient(self) -> Tensor:
        """G @ T. Also adds G.T @ I to the texts' gradient."""
        self.products.text_grad.addmm_(self.dots.T, self.rows)
        return self.dots @ self.products.text


class LibraryProducts:
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

    def chunks(self, first: int, read_only: bool = False) -> Iterator[LibraryChunk]:
        """The chunks in order.

        Args:
            first: column of the first image's positive.
            read_only: whether the products stay as they are, so that given ones need no copy.
        """
        in_place = read_only and self.products is not None and self.products.is_contiguous()
        buffer = self.text.new_empty(0 if in_place else self.chunk_size, len(self.text))
        for start in range(0, len(self.image), self.chunk_size):
            chunk = slice(start, start + self.chunk_size)
            rows = self.image[chunk].float()
            if self.products is None:
                dots = torch.mm(rows, self.text.T, out=buffer[: len(rows)])
            else:
                dots = self.products[chunk] if in_place else buffer[: len(rows)].copy_(self.products[chunk])
            yield LibraryChunk(self, start, rows, first + start, dots)
