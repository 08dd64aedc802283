"""Shared memory of the Triton kernels, in bytes per program. A GPU gives a program as much as it gives a thread block.

Triton raises an exception at the launch of a kernel that needs more. So these numbers decide which kernel takes a call,
and whether Triton takes the call at all. The numbers hold for Triton 3.6 and 3.9. A test compiles the kernels and
compares: tests/ops/test_triton_resources.py.
"""

from __future__ import annotations

# By kernel, by width of a head (the power of two from d on, at least 32), and by keys in registers. The variant and
# architecture that need most count.
ROW_BYTES = {
    "_row_forward": {
        32: {64: 10240, 128: 20480, 256: 40960},
        64: {64: 20480, 128: 40960, 256: 81920},
        128: {64: 40960, 128: 73728, 256: 147456},
    },
    # Only d = 64 has enough registers.
    "_row_backward": {64: {64: 40960, 128: 69632, 256: 116736}},
}

# By width of a head: the most that a block kernel needs on GPUs of compute capability 8.x and 12.x. On 9.0 the loops
# hold more stages, up to 118,784 bytes, and 232,448 are available.
BLOCK_BYTES = {32: 28928, 64: 49408, 128: 90112}


def width_of(dim: int) -> int:
    """The width of a head in the kernels' tiles: the least power of two from d on, at least 32."""
    return max(32, 1 << (dim - 1).bit_length())


def longest_row(kernel: str, dim: int, available: int) -> int:
    """The most keys that a row kernel takes on a GPU with `available` bytes. 0 if the kernel cannot run there."""
    needs = ROW_BYTES[kernel].get(width_of(dim), {})
    return max((keys for keys, needed in needs.items() if needed <= available), default=0)


def refusal(dim: int, available: int) -> str | None:
    """The reason why a GPU with `available` bytes cannot run every call with head dimension `dim`, or None."""
    needed = BLOCK_BYTES[width_of(dim)]
    if needed <= available:
        return None
    return f"a program needs {needed} bytes of shared memory, but this device gives it {available}"
