"""The operator in CUDA C++ for NVIDIA GPUs from sm_80 on (csrc/cuda/contrastive/); not yet measured on one.

Forward and gradient tiles by our kernels from bfloat16 or float16 features, D padded to a multiple of 8; dI and dT
by library matmuls on chunks of rows of G in float16 (`gpu_tiles`). The kernels read scale and bias on the device.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..cuda_device import aligned, cuda_address, cuda_module, cuda_stream
from .gpu_tiles import gradients, log_sum_exps, padded, siglip_results
from .loss_terms import Groups

# Past every row of text.
NO_POSITIVES = 2**40


def forward(image: Tensor, text: Tensor, scale: Tensor, first: int | None, chunk_size: int) -> tuple[Tensor, Tensor]:
    """As `reference.forward`."""
    image, text, module = _operand(image), _operand(text), cuda_module()

    def launch(start: int, rows: Tensor, row_partials: Tensor, column_partials: Tensor) -> None:
        call = _features(rows, text, scale, first, start)
        module.contrastive_forward(call, row_partials.data_ptr(), column_partials.data_ptr())

    return log_sum_exps(image, text, chunk_size, _tile(), torch.float32, launch)


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
    width, device = image.shape[1], image.device
    image, text, module = _operand(image), _operand(text), cuda_module()
    # The kernel works on G / w, whose range is known. All is zero with the weight; 0 / 0 must not make NaN of it.
    positive_grad = torch.where(weight == 0, 0.0, positive_grad / weight).float().contiguous()
    sharpness = scale + hardness if hardness else scale
    rows_near, rows_rest = _nearest(rows_lse)
    columns_near, columns_rest = _nearest(columns_lse)
    ids = _Ids(groups)

    def launch(start: int, rows: Tensor, grad: Tensor, partials: Tensor, unit: float) -> None:
        own = slice(start, start + len(rows))
        size = len(rows)
        normalizers = module.Normalizers(
            cuda_address(rows_near[own], torch.float32, device, size),
            cuda_address(rows_rest[own], torch.float32, device, size),
            cuda_address(columns_near, torch.float32, device, len(text)),
            cuda_address(columns_rest, torch.float32, device, len(text)),
            0 if first is None else cuda_address(positive_grad[own], torch.float32, device, size),
        )
        call = _features(rows, text, sharpness, first, start)
        module.contrastive_softmax(call, normalizers, ids.of(start, rows, text), _gradient(grad, partials, unit))

    image_grad, text_grad, sums = gradients(image, text, width, scale * weight, chunk_size, dtype, _tile(), 1, launch)
    return image_grad, text_grad, weight * sums[0]


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
    width, device = image.shape[1], image.device
    image, text, module, ids = _operand(image), _operand(text), cuda_module(), _Ids(groups)

    def launch(start: int, rows: Tensor, grad: Tensor | None, partials: Tensor, unit: float) -> None:
        added = 0 if bias is None else cuda_address(bias, torch.float32, device)
        call = _features(rows, text, scale, first, start)
        module.contrastive_sigmoid(call, added, ids.of(start, rows, text), _gradient(grad, partials, unit))

    return siglip_results(image, text, width, scale, weight, chunk_size, dtype, _tile(), with_gradients, launch)


def _tile() -> tuple[int, int]:
    return cuda_module().CONTRASTIVE_TILE, cuda_module().CONTRASTIVE_TILE


def _operand(features: Tensor) -> Tensor:
    return aligned(padded(features, 8))


def _nearest(lse: Tensor) -> tuple[Tensor, Tensor]:
    """(near, rest) in float32 with exp(-lse) = 2^-near * rest, exact though `near` is rounded."""
    bits = lse.double() / math.log(2)
    near = bits.float()
    return near, torch.where(near.isinf(), 1.0, (near - bits).exp2()).float()


def _features(rows: Tensor, text: Tensor, scale: Tensor, first: int | None, start: int) -> Any:
    size, columns, width, device = len(rows), len(text), text.shape[1], text.device
    return cuda_module().Features(
        cuda_address(rows, text.dtype, device, size, width),
        cuda_address(text, text.dtype, device, columns, width),
        text.dtype == torch.bfloat16,
        size,
        columns,
        width,
        NO_POSITIVES if first is None else first + start,
        cuda_address(scale, torch.float32, device),
        cuda_stream(text),
    )


def _gradient(grad: Tensor | None, partials: Tensor, unit: float) -> Any:
    address, stride = (0, 0) if grad is None else (grad.data_ptr(), grad.stride(0))
    return cuda_module().GradientTile(address, stride, unit, partials.data_ptr())


class _Ids:
    """The groups as the kernels take them, by rows; holds the tensors whose addresses it gives."""

    def __init__(self, groups: Groups | None) -> None:
        self.parts: tuple[Tensor, ...] = ()
        if groups is not None:
            shares = groups.row_shares.float(), groups.column_shares.float()
            self.parts = tuple(part.contiguous() for part in (groups.rows, groups.columns, *shares))

    def of(self, start: int, rows: Tensor, text: Tensor) -> Any:
        if not self.parts:
            return cuda_module().Groups(0, 0, 0, 0)
        row_ids, column_ids, row_shares, column_shares = self.parts
        own, device = slice(start, start + len(rows)), text.device
        return cuda_module().Groups(
            cuda_address(row_ids[own], torch.int32, device, len(rows)),
            cuda_address(column_ids, torch.int32, device, len(text)),
            cuda_address(row_shares[own], torch.float32, device, len(rows)),
            cuda_address(column_shares, torch.float32, device, len(text)),
        )
