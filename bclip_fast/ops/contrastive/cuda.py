"""The operators in CUDA C++ for NVIDIA GPUs from sm_80 on (csrc/cuda/contrastive/). They have not been measured on a
GPU yet.

There are two sets of kernels with one contract. Those of hopper.h run on Hopper, if the module was built with them
(`hopper_refusal`), and take calls without groups. Those of contrastive.h run on every GPU, and have smaller tiles.

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

from bclip_fast.ops.cuda_device import cuda_module, cuda_stream, hopper_refusal
from bclip_fast.ops.pointers import aligned, cuda_address

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

# A row of text beyond the last one.
NO_POSITIVES = 2**40


def forward(call: ContrastiveCall) -> tuple[Tensor, Tensor]:
    """Same contract as `reference.forward`."""
    call, module = _with_operands(call), cuda_module()
    kernel = module.hopper_forward if _on_hopper(call) else module.contrastive_forward

    def launch(start: int, rows: Tensor, row_partials: Tensor, column_partials: Tensor) -> None:
        kernel(_features(call, start, rows, call.scale), row_partials.data_ptr(), column_partials.data_ptr())

    return log_sum_exps(call, _tile(call), torch.float32, launch)


def backward(call: ContrastiveCall, upstream: SoftmaxGradient, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Same contract as `reference.backward`."""
    width, device = call.image.shape[1], call.image.device
    call = _with_operands(call)
    sharpness = call.scale + upstream.hardness if upstream.hardness else call.scale
    num_rows, num_columns = len(call.image), len(call.text)
    near, rest = _nearest(torch.cat([upstream.rows_lse, upstream.columns_lse]))
    (rows_near, columns_near), (rows_rest, columns_rest) = (
        each.split([num_rows, num_columns]) for each in (near, rest)
    )
    positive_grad = None if call.positive_offset is None else upstream.positive_grad.float().contiguous()
    row_ids, column_ids, row_shares, column_shares = group_tensors(call.groups, with_shares=True)
    of_rows = RowParts(gradient_rows(call), rows_near, rows_rest, positive_grad, row_ids, row_shares)

    def launch(start: int, rows: Tensor, grad: Tensor, partials: Tensor, unit: float) -> None:
        size = len(rows)
        near, rest, positive, ids, shares = of_rows.at(start)
        normalizers = cuda_module().Normalizers(
            cuda_address(near, torch.float32, device, size),
            cuda_address(rest, torch.float32, device, size),
            cuda_address(columns_near, torch.float32, device, num_columns),
            cuda_address(columns_rest, torch.float32, device, num_columns),
            _address(positive, torch.float32, device, size),
        )
        features = _features(call, start, rows, sharpness)
        if _on_hopper(call):
            cuda_module().hopper_softmax(features, normalizers, _gradient(grad, partials, unit))
            return
        groups = _groups(device, size, num_columns, ids, column_ids, shares, column_shares)
        cuda_module().contrastive_softmax(features, normalizers, groups, _gradient(grad, partials, unit))

    factor = call.scale * upstream.weight
    image_grad, text_grad, sums = gradients(call, width, factor, dtype, _tile(call), 1, launch)
    return image_grad, text_grad, upstream.weight * sums[0]


def siglip(
    call: ContrastiveCall, weight: float, dtype: torch.dtype, with_gradients: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Same contract as `reference.siglip`."""
    width, device = call.image.shape[1], call.image.device
    call = _with_operands(call)
    row_ids, column_ids, *_ = group_tensors(call.groups, with_shares=False)
    of_rows = RowParts(gradient_rows(call) if with_gradients else len(call.image), row_ids)

    def launch(start: int, rows: Tensor, grad: Tensor | None, partials: Tensor, unit: float) -> None:
        features, bias = _features(call, start, rows, call.scale), _address(call.bias, torch.float32, device)
        if _on_hopper(call):
            cuda_module().hopper_sigmoid(features, bias, _gradient(grad, partials, unit))
            return
        (ids,) = of_rows.at(start)
        groups = _groups(device, len(rows), len(call.text), ids, column_ids)
        cuda_module().contrastive_sigmoid(features, bias, groups, _gradient(grad, partials, unit))

    return siglip_results(call, width, weight, dtype, _tile(call), with_gradients, launch)


def _on_hopper(call: ContrastiveCall) -> bool:
    """Whether the call takes the kernels for Hopper."""
    return call.groups is None and hopper_refusal(call.image.device) is None


def _tile(call: ContrastiveCall) -> tuple[int, int]:
    """Rows and columns of a tile of the kernels."""
    if _on_hopper(call):
        rows, columns = cuda_module().CONTRASTIVE_HOPPER
        return rows, columns
    return cuda_module().CONTRASTIVE_TILE, cuda_module().CONTRASTIVE_TILE


def _with_operands(call: ContrastiveCall) -> ContrastiveCall:
    """The call with features and scalars as the kernels read them."""
    image, text = aligned(padded(call.image, 8)), aligned(padded(call.text, 8))
    bias = None if call.bias is None else call.bias.float()
    return replace(call, image=image, text=text, scale=call.scale.float(), bias=bias)


def _address(tensor: Tensor | None, dtype: torch.dtype, device: torch.device, *shape: int) -> int:
    """`cuda_address`, or 0 for an absent tensor."""
    return 0 if tensor is None else cuda_address(tensor, dtype, device, *shape)


def _nearest(lse: Tensor) -> tuple[Tensor, Tensor]:
    """(near, rest) in float32 with exp(-lse) = 2^-near * rest, exact although `near` is rounded. `lse` is float64."""
    bits = lse / math.log(2)
    near = bits.float()
    # A row without a loss has an infinite log-sum-exp, and inf - inf is NaN.
    return near, torch.exp2((near - bits).nan_to_num_(nan=0.0), out=torch.empty_like(near))


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


def _groups(
    device: torch.device,
    num_rows: int,
    num_columns: int,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    row_shares: Tensor | None = None,
    column_shares: Tensor | None = None,
) -> Any:
    """The kernels' description of the groups of some rows and of all columns."""
    return cuda_module().Groups(
        _address(row_ids, torch.int32, device, num_rows),
        _address(column_ids, torch.int32, device, num_columns),
        _address(row_shares, torch.float32, device, num_rows),
        _address(column_shares, torch.float32, device, num_columns),
    )


def _gradient(grad: Tensor | None, partials: Tensor, unit: float) -> Any:
    address, stride = (0, 0) if grad is None else (grad.data_ptr(), grad.stride(0))
    return cuda_module().GradientTile(address, stride, unit, partials.data_ptr())
