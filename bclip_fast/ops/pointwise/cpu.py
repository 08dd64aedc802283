"""The operators on the CPU: C++ over rows (csrc/pointwise.h).

Eager PyTorch takes a pass for each of cast, dropout, sum and norm, and draws its random numbers on one thread.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bclip_fast import _cpu

from ..cuda_device import address


def add_norm(
    stream: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    dtype: torch.dtype,
    wide: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    stream, weight, bias = stream.contiguous(), weight.contiguous(), bias.contiguous()
    branch = None if branch is None else branch.contiguous()
    shape = stream.shape
    normed = torch.empty(shape, dtype=dtype)
    total = torch.empty(shape if branch is not None else (0,), dtype=stream.dtype)
    wide_normed = torch.empty(shape if wide else (0,), dtype=stream.dtype)
    _cpu.add_norm(
        *shape,
        _values(stream, *shape),
        _values(branch, *shape),
        _values(weight, shape[1]),
        _values(bias, shape[1]),
        _values(None if branch is None else total, *shape),
        _values(normed, *shape),
        _values(wide_normed if wide else None, *shape),
        eps,
        _dropout(dropout_p, seed),
        torch.get_num_threads(),
    )
    return normed, total, wide_normed


def add_norm_backward(
    grad: Tensor | None,
    total_grad: Tensor | None,
    wide_grad: Tensor | None,
    total: Tensor,
    weight: Tensor,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    branch_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total, weight = total.contiguous(), weight.contiguous()
    shape = total.shape
    grads = [None if part is None else part.contiguous() for part in (grad, wide_grad, total_grad)]
    stream_grad = torch.empty(shape, dtype=total.dtype)
    apart = branch_dtype is not None
    branch_grad = torch.empty(shape if apart else (0,), dtype=branch_dtype or total.dtype)
    sums = [torch.empty(shape[1], dtype=torch.float32) for _ in range(2)]
    _cpu.add_norm_backward(
        *shape,
        *(_values(part, *shape) for part in grads),
        _values(total, *shape),
        _values(weight, shape[1]),
        _values(stream_grad, *shape),
        _values(branch_grad if apart else None, *shape),
        *(address(part, torch.float32, shape[1]) for part in sums),
        eps,
        _dropout(dropout_p, seed),
        torch.get_num_threads(),
    )
    weight_grad, bias_grad = (part.to(weight.dtype) for part in sums)
    return stream_grad, branch_grad, weight_grad, bias_grad


def gelu(x: Tensor) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    _cpu.gelu(_values(x, *x.shape), _values(out, *x.shape), x.numel(), torch.get_num_threads())
    return out


def gelu_backward(grad: Tensor, x: Tensor) -> Tensor:
    grad, x = grad.contiguous(), x.contiguous()
    out = torch.empty_like(x)
    values = (_values(tensor, *x.shape) for tensor in (grad, x, out))
    _cpu.gelu_backward(*values, x.numel(), torch.get_num_threads())
    return out


def _values(tensor: Tensor | None, *shape: int) -> _cpu.Values:
    if tensor is None:
        return _cpu.Values(0, False)
    return _cpu.Values(address(tensor, tensor.dtype, *shape), tensor.dtype == torch.bfloat16)


def _dropout(dropout_p: float, seed: Tensor | None) -> _cpu.Dropout:
    if seed is None:
        return _cpu.Dropout(0, 0, 1.0)
    return _cpu.Dropout(int(seed) & (2**64 - 1), int(dropout_p * 2**32), 1 / (1 - dropout_p))
