"""The bytes of HBM that a loss's kernel reads, from the order of its tiles and the size of the L2 cache."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable

# The (row, column) of a block's tile, from the numbers of the block, of the rows of tiles and of the columns of tiles.
Order = Callable[[int, int, int], tuple[int, int]]


def banded(height: int, block: int, row_tiles: int, column_tiles: int) -> tuple[int, int]:
    """Return the tile of a block in bands of `height` rows of tiles. Blocks go through a band column by column."""
    first = block // (height * column_tiles) * height
    rows = min(height, row_tiles - first)
    inside = block % (height * column_tiles)
    return first + inside % rows, inside // rows


# The order of our Triton kernels.
BANDS_OF_8 = functools.partial(banded, 8)


@functools.cache
def bytes_read(order: Order, shape: tuple[int, int], operands: tuple[int, int], written: int, cache: int) -> int:
    """Return the bytes of features that the blocks of a launch read from HBM.

    Blocks run one after another. A block reads the features of its tile's rows and columns, and then writes its
    results, which take up a part of the cache too. The cache first forgets the part whose last use is the oldest.

    shape: rows and columns of tiles.
    operands: bytes of the features of a tile's rows, and of its columns.
    written: bytes that a block writes.
    cache: bytes of the cache.
    """
    held: OrderedDict[tuple[str, int, int], int] = OrderedDict()
    free, read = cache, 0
    for block in range(shape[0] * shape[1]):
        row, column = order(block, *shape)
        parts = (("row", row, 0), operands[0]), (("column", 0, column), operands[1]), (("result", row, column), written)
        for key, size in parts:
            if key in held:
                held.move_to_end(key)
                continue
            held[key] = size
            free -= size
            read += size if key[0] != "result" else 0
            while free < 0:
                free += held.popitem(last=False)[1]
    return read
