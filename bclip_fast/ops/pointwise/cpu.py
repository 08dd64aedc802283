"""The operators on the CPU, in C++ over rows (csrc/pointwise.h).

Eager PyTorch makes one pass for each of cast, dropout, sum and norm, and draws its random numbers on one thread.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bclip_fast import _cpu
from bclip_fast.ops.philox import threshold_of, unsigned_seed
from bclip_fast.ops.pointers import address

from .call import AddNormCall, AddNormGradientCall


def add_norm(call: AddNormCall) -> tuple[Tensor, Tensor, Tensor]:
    """(normed in `dtype`, sum or empty without a branch, normed in the stream's dtype or empty unless `wide`)."""
    stream, weight, bias = call.stream.contiguous(), call.weight.contiguous(), call.bias.contiguous()
    branch = None if call.branch is None else call.branch.contiguous()
    shape = stream.shape
    normed = torch.empty(shape, dtype=call.dtype)
    total = torch.empty(shape if branch is not None else (0,), dtype=stream.dtype)
    wide_normed = torch.empty(shape if call.wide else (0,), dtype=stream.dtype)
    _cpu.add_norm(
        *shape,
        _values(stream, *shape),
        _values(branch, *shape),
        _values(weight, shape[1]),
        _values(bias, shape[1]),
        _values(None if branch is None else total, *shape),
        _values(normed, *shape),
        _values(wide_normed if call.wide else None, *shape),
        call.eps,
        _dropout(call.dropout_p, call.seed),
        torch.get_num_threads(),
    )
    return normed, total, wide_normed


def add_norm_backward(call: AddNormGradientCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of stream, branch (empty without `branch_dtype`), weight and bias."""
    total, weight = call.total.contiguous(), call.weight.contiguous()
    shape = total.shape
    grads = [None if part is None else part.contiguous() for part in (call.grad, call.wide_grad, call.total_grad)]
    stream_grad = torch.empty(shape, dtype=total.dtype)
    separate = call.branch_dtype is not None
    branch_grad = torch.empty(shape if separate else (0,), dtype=call.branch_dtype or total.dtype)
    sums = [torch.empty(shape[1], dtype=torch.float32) for _ in range(2)]
    _cpu.add_norm_backward(
        *shape,
        *(_values(part, *shape) for part in grads),
        _values(total, *shape),
        _values(weight, shape[1]),
        _values(stream_grad, *shape),
        _values(branch_grad if separate else None, *shape),
        *(address(part, torch.float32, shape[1]) for part in sums),
        call.eps,
        _dropout(call.dropout_p, call.seed),
        torch.get_num_threads(),
    )
    weight_grad, bias_grad = (part.to(weight.dtype) for part in sums)
    return stream_grad, branch_grad, weight_grad, bias_grad


def gelu(x: Tensor) -> Tensor:
    """x * Phi(x)"""
    x = x.contiguous()
    out = torch.empty_like(x)
    _cpu.gelu(_values(x, *x.shape), _values(out, *x.shape), x.numel(), torch.get_num_threads())
    return out


def gelu_backward(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of `x`."""
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
    return _cpu.Dropout(unsigned_seed(seed), threshold_of(dropout_p), 1 / (1 - dropout_p))
