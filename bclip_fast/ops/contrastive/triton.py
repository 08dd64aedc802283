"""The operators in Triton, for NVIDIA GPUs from sm_80 on. triton_kernels.py describes the kernels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bclip_fast.ops.cuda_device import compute_capability
from bclip_fast.ops.pointers import aligned

from . import triton_kernels as kernels
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


def configuration(
    dtype: torch.dtype, width: int, grouped: bool = False, capability: tuple[int, int] = (8, 0)
) -> dict[str, Any]:
    """Tile sizes and launch options of every kernel, on a GPU of this compute capability.

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


def _configuration(call: ContrastiveCall, grouped: bool = False) -> dict[str, Any]:
    """The configuration of the call's features, on their device."""
    image = call.image
    # The interpreter has no capability.
    capability = compute_capability(image.device.index or 0) if image.is_cuda else (8, 0)
    return configuration(image.dtype, image.shape[1], grouped, capability)


def _tile(config: dict[str, Any]) -> tuple[int, int]:
    return config["BLOCK_ROWS"], config["BLOCK_COLUMNS"]


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
    config = _configuration(call)

    def launch(start: int, rows: Tensor, row_partials: Tensor, column_partials: Tensor) -> None:
        kernels._forward_kernel[(len(row_partials) * len(column_partials),)](
            rows,
            call.text,
            call.scale,
            row_partials,
            column_partials,
            len(rows),
            len(call.text),
            _first_positive(call, start),
            HAS_POSITIVES=call.positive_offset is not None,
            **config,
        )

    return log_sum_exps(call, _tile(config), torch.float64, launch)


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
    config = _configuration(call, call.groups is not None)

    def launch(start: int, rows: Tensor, grad: Tensor, partials: Tensor, unit: float) -> None:
        rows_lse, positive_grad, row_ids, row_shares = of_rows.at(start)
        kernels._backward_kernel[(len(partials),)](
            rows,
            call.text,
            sharpness,
            rows_lse,
            columns_lse,
            positive_grad,
            row_ids,
            column_ids,
            row_shares,
            column_shares,
            grad,
            partials,
            len(rows),
            len(call.text),
            grad.stride(0),
            _first_positive(call, start),
            HAS_POSITIVES=call.positive_offset is not None,
            GRADIENT_SCALE=unit,
            **config,
        )

    factor = call.scale * upstream.weight
    image_grad, text_grad, sums = gradients(call, width, factor, dtype, _tile(config), 1, launch)
    return image_grad, text_grad, upstream.weight * sums[0]


def siglip(
    call: ContrastiveCall, weight: float, dtype: torch.dtype, with_gradients: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Same contract as `reference.siglip`."""
    width, call = call.image.shape[1], _with_operands(call)
    # Other widths have shorter steps. With a complete tile, registers would spill on sm_90.
    config = _configuration(call, call.image.shape[1] % 64 != 0)
    # Without the addition of a bias, the compiler would order the kernel such that registers spill on sm_90.
    bias = torch.zeros((), device=call.image.device) if call.bias is None else call.bias
    row_ids, column_ids, *_ = group_tensors(call.groups, with_shares=False)
    of_rows = RowParts(gradient_rows(call) if with_gradients else len(call.image), row_ids)

    def launch(start: int, rows: Tensor, grad: Tensor | None, partials: Tensor, unit: float) -> None:
        kernels._siglip_kernel[(len(partials),)](
            rows,
            call.text,
            call.scale,
            bias,
            *of_rows.at(start),
            column_ids,
            grad,
            partials,
            len(rows),
            len(call.text),
            0 if grad is None else grad.stride(0),
            _first_positive(call, start),
            HAS_POSITIVES=call.positive_offset is not None,
            WITH_GRADIENTS=with_gradients,
            GRADIENT_SCALE=unit,
            **config,
        )

    return siglip_results(call, width, weight, dtype, _tile(config), with_gradients, launch)
