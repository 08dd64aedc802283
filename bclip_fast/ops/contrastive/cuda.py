"""The operators in CUDA C++ for NVIDIA GPUs from sm_80 on (csrc/cuda/contrastive/); not yet measured on one.

Our kernels compute forward and gradient tiles from bfloat16 or float16 features, with D padded to a multiple of 8.
Library matmuls compute dI and dT from chunks of rows of G in float16 (`gpu_tiles`). The kernels read scale and bias on
the device.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bclip_fast.ops.cuda_device import cuda_module, cuda_stream
from bclip_fast.ops.pointers import aligned, cuda_address

from .call import ContrastiveCall, SoftmaxGradient
from .gpu_tiles import gradients, log_sum_exps, padded, siglip_results
from .groups import Groups

# A row of text beyond the last one.
NO_POSITIVES = 2**40


def forward(call: ContrastiveCall) -> tuple[Tensor, Tensor]:
    """As `reference.forward`."""
    call = _with_operands(call)

    def launch(start: int, rows: Tensor, row_partials: Tensor, column_partials: Tensor) -> None:
        features = _features(call, start, rows, call.scale)
        cuda_module().contrastive_forward(features, row_partials.data_ptr(), column_partials.data_ptr())

    return log_sum_exps(call, _tile(), torch.float32, launch)


def backward(call: ContrastiveCall, upstream: SoftmaxGradient, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.backward`."""
    width, device, weight = call.image.shape[1], call.image.device, upstream.weight
    call = _with_operands(call)
    # The kernel works on G / w, whose range is known. At w = 0 everything is zero, and 0 / 0 must not make it NaN.
    positive_grad = torch.where(weight == 0, 0.0, upstream.positive_grad / weight).float().contiguous()
    sharpness = call.scale + upstream.hardness if upstream.hardness else call.scale
    rows_near, rows_rest = _nearest(upstream.rows_lse)
    columns_near, columns_rest = _nearest(upstream.columns_lse)
    num_columns, ids = len(call.text), _Ids(call.groups)

    def launch(start: int, rows: Tensor, grad: Tensor, partials: Tensor, unit: float) -> None:
        size = len(rows)
        chunk = slice(start, start + size)
        no_positives = call.positive_offset is None
        normalizers = cuda_module().Normalizers(
            cuda_address(rows_near[chunk], torch.float32, device, size),
            cuda_address(rows_rest[chunk], torch.float32, device, size),
            cuda_address(columns_near, torch.float32, device, num_columns),
            cuda_address(columns_rest, torch.float32, device, num_columns),
            0 if no_positives else cuda_address(positive_grad[chunk], torch.float32, device, size),
        )
        features, groups = _features(call, start, rows, sharpness), ids.of_rows(start, size, num_columns, device)
        cuda_module().contrastive_softmax(features, normalizers, groups, _gradient(grad, partials, unit))

    image_grad, text_grad, sums = gradients(call, width, call.scale * weight, dtype, _tile(), 1, launch)
    return image_grad, text_grad, weight * sums[0]


def siglip(
    call: ContrastiveCall, weight: float, dtype: torch.dtype, with_gradients: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `reference.siglip`."""
    width, device, bias = call.image.shape[1], call.image.device, call.bias
    call, ids = _with_operands(call), _Ids(call.groups)

    def launch(start: int, rows: Tensor, grad: Tensor | None, partials: Tensor, unit: float) -> None:
        bias_address = 0 if bias is None else cuda_address(bias, torch.float32, device)
        features = _features(call, start, rows, call.scale)
        groups = ids.of_rows(start, len(rows), len(call.text), device)
        cuda_module().contrastive_sigmoid(features, bias_address, groups, _gradient(grad, partials, unit))

    return siglip_results(call, width, weight, dtype, _tile(), with_gradients, launch)


def _tile() -> tuple[int, int]:
    return cuda_module().CONTRASTIVE_TILE, cuda_module().CONTRASTIVE_TILE


def _with_operands(call: ContrastiveCall) -> ContrastiveCall:
    """The call with features as the kernels read them."""
    return replace(call, image=aligned(padded(call.image, 8)), text=aligned(padded(call.text, 8)))


def _nearest(lse: Tensor) -> tuple[Tensor, Tensor]:
    """(near, rest) in float32 with exp(-lse) = 2^-near * rest, which is exact although `near` is rounded."""
    bits = lse.double() / math.log(2)
    near = bits.float()
    return near, torch.where(near.isinf(), 1.0, (near - bits).exp2()).float()


def _features(call: ContrastiveCall, start: int, rows: Tensor, scale: Tensor) -> Any:
    """The kernels' description of `rows`, the images from `start` on, against all texts."""
    text = call.text
    size, columns, width, device = len(rows), len(text), text.shape[1], text.device
    return cuda_module().Features(
        cuda_address(rows, text.dtype, device, size, width),
        cuda_address(text, text.dtype, device, columns, width),
        text.dtype == torch.bfloat16,
        size,
        columns,
        width,
        NO_POSITIVES if call.positive_offset is None else call.positive_offset + start,
        cuda_address(scale, torch.float32, device),
        cuda_stream(text),
    )


def _gradient(grad: Tensor | None, partials: Tensor, unit: float) -> Any:
    address, stride = (0, 0) if grad is None else (grad.data_ptr(), grad.stride(0))
    return cuda_module().GradientTile(address, stride, unit, partials.data_ptr())


class _Ids:
    """The groups as the kernels take them. It owns the tensors behind the addresses that it returns."""

    def __init__(self, groups: Groups | None) -> None:
        self.parts: tuple[Tensor, ...] = ()
        if groups is not None:
            shares = groups.row_shares.float(), groups.column_shares.float()
            self.parts = tuple(part.contiguous() for part in (groups.rows, groups.columns, *shares))

    def of_rows(self, start: int, size: int, num_columns: int, device: torch.device) -> Any:
        """The groups of `size` rows from `start` on, and of all columns."""
        if not self.parts:
            return cuda_module().Groups(0, 0, 0, 0)
        row_ids, column_ids, row_shares, column_shares = self.parts
        chunk = slice(start, start + size)
        return cuda_module().Groups(
            cuda_address(row_ids[chunk], torch.int32, device, size),
            cuda_address(column_ids, torch.int32, device, num_columns),
            cuda_address(row_shares[chunk], torch.float32, device, size),
            cuda_address(column_shares, torch.float32, device, num_columns),
        )
