"""The operators in Triton, for NVIDIA GPUs from sm_80 on; triton_kernels.py describes the kernels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import triton_kernels as kernels
from .call import ContrastiveCall, SoftmaxGradient
from .gpu_tiles import gradients, log_sum_exps, padded, siglip_results
from .groups import Groups


def configuration(dtype: torch.dtype, width: int, grouped: bool = False) -> dict[str, Any]:
    """Tile sizes and launch options of every kernel.

    They are fixed, so results don't depend on a tuning run, and not yet tuned on a GPU. A tile of 128 x 128 reads a
    third less from L2 than a tile of 64 x 128. On tensor cores, 16 warps hold its accumulators in 32 registers per
    thread, which leaves 96 for the exponentials; 8 warps would spill registers. The softmax's gradient with groups also
    holds ids and shares, so it takes half the tile. Plain float32 multiplications are so slow that L2 doesn't matter,
    so float32 takes a smaller tile, with registers to spare.
    """
    in_float32 = dtype == torch.float32
    largest = 16 if in_float32 else 64
    return {
        "BLOCK_ROWS": 64 if in_float32 or grouped else 128,
        "BLOCK_COLUMNS": 128,
        "BLOCK_WIDTH": next(size for size in (64, 32, 16) if size <= largest and width % size == 0),
        # A constant, like the block sizes, because a model has one D.
        "WIDTH": width,
        "num_warps": 8 if in_float32 else 16,
        "num_stages": 3,
        # Fused multiplications and additions are Triton's default, which 3.10 changes.
        "enable_fp_fusion": True,
    }


def _tile(config: dict[str, Any]) -> tuple[int, int]:
    return config["BLOCK_ROWS"], config["BLOCK_COLUMNS"]


def _with_operands(call: ContrastiveCall) -> ContrastiveCall:
    """The call with features as the kernels read them."""
    return replace(call, image=padded(call.image, 16), text=padded(call.text, 16))


def _first_positive(call: ContrastiveCall, start: int) -> int:
    """The row of text that belongs to image `start`; 0 for a tile without positives, whose kernels ignore it."""
    return 0 if call.positive_offset is None else call.positive_offset + start


def _ids(groups: Groups | None, start: int) -> tuple[Tensor | None, Tensor | None]:
    """The ids of the rows from `start` on, and those of the columns."""
    return (None, None) if groups is None else (groups.rows[start:], groups.columns)


def forward(call: ContrastiveCall) -> tuple[Tensor, Tensor]:
    """As `reference.forward`."""
    call = _with_operands(call)
    config = configuration(call.image.dtype, call.image.shape[1])

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
    """As `reference.backward`."""
    groups, weight, scale = call.groups, upstream.weight, call.scale
    # The kernel works on G / w, whose range is known. At w = 0 everything is zero, and 0 / 0 must not make it NaN.
    positive_grad = torch.where(weight == 0, 0.0, upstream.positive_grad / weight)
    sharpness = scale + upstream.hardness if upstream.hardness else scale
    # Features in half precision err more than a log-sum-exp that is rounded to float32.
    exact = torch.float64 if call.image.dtype == torch.float32 else torch.float32
    rows_lse, columns_lse = upstream.rows_lse.to(exact).contiguous(), upstream.columns_lse.to(exact).contiguous()

    width, call = call.image.shape[1], _with_operands(call)
    config = configuration(call.image.dtype, call.image.shape[1], groups is not None)

    def launch(start: int, rows: Tensor, grad: Tensor, partials: Tensor, unit: float) -> None:
        kernels._backward_kernel[(len(partials),)](
            rows,
            call.text,
            sharpness,
            rows_lse[start:],
            columns_lse,
            positive_grad[start:],
            *_ids(groups, start),
            None if groups is None else groups.row_shares[start:].float(),
            None if groups is None else groups.column_shares.float(),
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

    image_grad, text_grad, sums = gradients(call, width, scale * weight, dtype, _tile(config), 1, launch)
    return image_grad, text_grad, weight * sums[0]


def siglip(
    call: ContrastiveCall, weight: float, dtype: torch.dtype, with_gradients: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `reference.siglip`."""
    width, call = call.image.shape[1], _with_operands(call)
    config = configuration(call.image.dtype, call.image.shape[1])

    def launch(start: int, rows: Tensor, grad: Tensor | None, partials: Tensor, unit: float) -> None:
        kernels._siglip_kernel[(len(partials),)](
            rows,
            call.text,
            call.scale,
            call.bias,
            *_ids(call.groups, start),
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
