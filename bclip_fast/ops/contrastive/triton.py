"""The operators in Triton, for NVIDIA GPUs from sm_80 on. triton_kernels.py describes the kernels.

`_path` decides which kernels take a call: those that read pointers, or on sm_90 those that read tensor descriptors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from bclip_fast.ops.cuda_device import compute_capability, interpreted_capability
from bclip_fast.ops.pointers import aligned

from . import triton_kernels as kernels
from . import triton_tma_gradients as tma_gradients
from . import triton_tma_kernels as tma_kernels
from .call import ContrastiveCall, SoftmaxGradient
from .gpu_tiles import (
    RowParts,
    gradient_rows,
    gradients,
    group_tensors,
    log_sum_exps,
    padded,
    siglip_results,
)

# Tensor descriptors came with Triton 3.4.
_HAS_DESCRIPTORS = find_spec("triton.tools.tensor_descriptor") is not None

# Launch options of `_redo_kernel`: the tiles of each program, and the registers that let two programs fit on a
# multiprocessor.
REDO = {"TILES": 16, "maxnreg": 128}

# Slices of columns in which the kernels with descriptors write G.
SLICES = 8


def configuration(
    dtype: torch.dtype, width: int, grouped: bool = False, capability: tuple[int, int] = (8, 0)
) -> dict[str, Any]:
    """Tile sizes and launch options of the kernels that read pointers, on a GPU of this compute capability.

    They are fixed, so results don't depend on a tuning run. They have not been tuned on a GPU yet. A tile of 128 x 128
    reads a third less from L2 than a tile of 64 x 128. On tensor cores, 16 warps hold its accumulators in 32 registers
    per thread, which leaves 96 for the exponentials. On sm_80, registers would spill with 8 warps. On sm_90 they don't,
    because its tensor cores read both operands from shared memory. There, four warps multiply together: 8 warps do so
    in steps of 64 x 128 x 16, 16 warps in steps of 64 x 64 x 16, which read the images' operand twice as often.

    The softmax's gradient with groups also holds ids and shares, so it takes half the tile. Plain float32
    multiplications are so slow that L2 doesn't matter, so float32 takes a smaller tile, with registers to spare.
    """
    in_float32 = dtype == torch.float32
    largest = 16 if in_float32 else 64
    return {
        "BLOCK_ROWS": 64 if in_float32 or grouped else 128,
        "BLOCK_COLUMNS": 128,
        "BLOCK_WIDTH": next(size for size in (64, 32, 16) if size <= largest and width % size == 0),
        # A constant, like the block sizes, because a model has one D.
        "WIDTH": width,
        "num_warps": 8 if in_float32 or capability[0] == 9 else 16,
        "num_stages": 3,
        # Fused multiplications and additions are Triton's default, which 3.10 changes.
        "enable_fp_fusion": True,
    }


def descriptor_configuration(width: int) -> dict[str, Any]:
    """Tile sizes and launch options of the kernels that read descriptors, for features of `width` numbers.

    Three stages of 128 bytes for each row of a tile take 96 KiB of shared memory, so two programs fit on a
    multiprocessor. A step past the end of a row multiplies zeros.
    """
    # A swizzled row of shared memory has at most 128 bytes.
    block = next(size for size in (16, 32, 64) if size >= min(width, 64))
    return {**configuration(torch.float16, width, False, (9, 0)), "BLOCK_WIDTH": block}


def takes_descriptors(dtype: torch.dtype, capability: tuple[int, int]) -> bool:
    """Whether kernels with tensor descriptors take features of this dtype on a GPU of this compute capability.

    sm_80 has no TMA: there, reads through descriptors become plain loads without copies in flight. Tensor cores don't
    multiply in float32.
    """
    return _HAS_DESCRIPTORS and capability[0] == 9 and dtype != torch.float32


@dataclass(frozen=True)
class Path:
    """The kernels that take a call, and how they take its matrices. config: tile sizes and launch options."""

    descriptors: bool
    config: dict[str, Any]

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and columns of a tile of S."""
        return self.config["BLOCK_ROWS"], self.config["BLOCK_COLUMNS"]

    @property
    def blocks(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns that the descriptors of images, texts and G copy at a time."""
        (rows, columns), width = self.tile, self.config["BLOCK_WIDTH"]
        return (rows, width), (columns, width), (rows, columns // SLICES)

    def features(self, rows: Tensor, text: Tensor) -> tuple[Any, Any]:
        """Images and texts as the kernels' first two arguments."""
        if not self.descriptors:
            return rows, text
        return _descriptor(rows, self.blocks[0]), _descriptor(text, self.blocks[1])

    def gradient(self, grad: Tensor | None) -> dict[str, Any]:
        """G, or None, as the kernels' arguments."""
        if not self.descriptors:
            return {"grad": grad, "grad_stride": 0 if grad is None else grad.stride(0)}
        return {"grad": None if grad is None else _descriptor(grad, self.blocks[2])}


def _descriptor(matrix: Tensor, block: tuple[int, int]) -> Any:
    """A descriptor that copies blocks of a matrix, whose address and rows are multiples of 16 bytes."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(matrix, list(block))


def _capability(call: ContrastiveCall) -> tuple[int, int]:
    """Compute capability of the call's device, or the one that the interpreter stands for."""
    image = call.image
    return compute_capability(image.device.index or 0) if image.is_cuda else interpreted_capability()


def _path(call: ContrastiveCall, small_tile: bool = False) -> Path:
    """The path of the call. small_tile: whether the kernels with pointers need half a tile."""
    dtype, width, capability = call.image.dtype, call.image.shape[1], _capability(call)
    if takes_descriptors(dtype, capability):
        return Path(True, descriptor_configuration(width))
    return Path(False, configuration(dtype, width, small_tile, capability))


def _with_operands(call: ContrastiveCall) -> ContrastiveCall:
    """The call with features and scalars as the kernels read them.

    Kernels and library matmuls are chosen by alignment, and other ones may round differently. So features at any
    address are read from an aligned one.
    """
    bias = None if call.bias is None else call.bias.float()
    image, text = aligned(padded(call.image, 16)), aligned(padded(call.text, 16))
    return replace(call, image=image, text=text, scale=call.scale.float(), bias=bias)


def _first_positive(call: ContrastiveCall, start: int) -> int:
    """The row of text that belongs to image `start`, or 0 for a tile without positives, whose kernels ignore it."""
    return 0 if call.positive_offset is None else call.positive_offset + start


def forward(call: ContrastiveCall) -> tuple[Tensor, Tensor]:
    """Same contract as `reference.forward`."""
    call = _with_operands(call)
    path = _path(call)

    def launch(start: int, rows: Tensor, row_partials: Tensor, column_partials: Tensor) -> None:
        num_tiles = len(row_partials) * len(column_partials)
        arguments = *path.features(rows, call.text), call.scale, row_partials, column_partials
        others = {
            "num_rows": len(rows),
            "num_columns": len(call.text),
            "first": _first_positive(call, start),
            "HAS_POSITIVES": call.positive_offset is not None,
            **path.config,
        }
        if not path.descriptors:
            kernels._forward_kernel[(num_tiles,)](*arguments, **others)
            return
        votes = torch.empty(num_tiles, dtype=torch.int8, device=rows.device)
        tma_kernels._forward_kernel[(num_tiles,)](*arguments, votes, **others)
        programs = -(-num_tiles // REDO["TILES"])
        tma_kernels._redo_kernel[(programs,)](*arguments, votes, num_tiles=num_tiles, **others, **REDO)

    return log_sum_exps(call, path.tile, torch.float64, launch)


def backward(call: ContrastiveCall, upstream: SoftmaxGradient, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Same contract as `reference.backward`."""
    width, call = call.image.shape[1], _with_operands(call)
    sharpness = call.scale + upstream.hardness if upstream.hardness else call.scale
    # The error of half-precision features exceeds that of a log-sum-exp in float32.
    exact = torch.float64 if call.image.dtype == torch.float32 else torch.float32
    rows_lse, columns_lse = upstream.rows_lse.to(exact).contiguous(), upstream.columns_lse.to(exact).contiguous()
    # The kernel ignores the positives' gradients if there are none.
    positive_grad = rows_lse if call.positive_offset is None else upstream.positive_grad.float().contiguous()
    row_ids, column_ids, row_shares, column_shares = group_tensors(call.groups, with_shares=True)
    of_rows = RowParts(gradient_rows(call), rows_lse, positive_grad, row_ids, row_shares)
    path = _path(call, call.groups is not None)
    kernel = (tma_gradients if path.descriptors else kernels)._backward_kernel

    def launch(start: int, rows: Tensor, grad: Tensor, partials: Tensor, unit: float) -> None:
        rows_lse, positive_grad, row_ids, row_shares = of_rows.at(start)
        kernel[(len(partials),)](
            *path.features(rows, call.text),
            sharpness,
            rows_lse,
            columns_lse,
            positive_grad,
            row_ids,
            column_ids,
            row_shares,
            column_shares,
            partials=partials,
            num_rows=len(rows),
            num_columns=len(call.text),
            first=_first_positive(call, start),
            HAS_POSITIVES=call.positive_offset is not None,
            GRADIENT_SCALE=unit,
            **path.gradient(grad),
            **path.config,
        )

    factor = call.scale * upstream.weight
    image_grad, text_grad, sums = gradients(call, width, factor, dtype, path.tile, 1, launch)
    return image_grad, text_grad, upstream.weight * sums[0]


def siglip(
    call: ContrastiveCall, weight: float, dtype: torch.dtype, with_gradients: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Same contract as `reference.siglip`."""
    width, call = call.image.shape[1], _with_operands(call)
    # Other widths have shorter steps. With a complete tile and pointers, registers would spill on sm_90.
    path = _path(call, call.image.shape[1] % 64 != 0)
    kernel = (tma_gradients if path.descriptors else kernels)._siglip_kernel
    # Without the addition of a bias, the compiler would order the kernel such that registers spill on sm_90.
    bias = torch.zeros((), device=call.image.device) if call.bias is None else call.bias
    row_ids, column_ids, *_ = group_tensors(call.groups, with_shares=False)
    of_rows = RowParts(gradient_rows(call) if with_gradients else len(call.image), row_ids)

    def launch(start: int, rows: Tensor, grad: Tensor | None, partials: Tensor, unit: float) -> None:
        kernel[(len(partials),)](
            *path.features(rows, call.text),
            call.scale,
            bias,
            *of_rows.at(start),
            column_ids,
            partials=partials,
            num_rows=len(rows),
            num_columns=len(call.text),
            first=_first_positive(call, start),
            HAS_POSITIVES=call.positive_offset is not None,
            WITH_GRADIENTS=with_gradients,
            GRADIENT_SCALE=unit,
            **path.gradient(grad),
            **path.config,
        )

    return siglip_results(call, width, weight, dtype, path.tile, with_gradients, launch)
