"""How a kernel is judged: the single definition of "close enough".

Truth is the operator's definition in float64; the yardstick is what eager PyTorch errs in the kernel's own dtype. A
backend may err at most twice as much, in its output and in every gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from bclip_fast.ops.dispatch import BACKENDS, Limits, why_not

Function = Callable[..., Tensor]


def every_backend(limits: Limits) -> list[str]:
    """All but torch's own kernels, whose rounding is torch's affair: test_sdpa.py has what we ask of them."""
    return [name for name in BACKENDS if name in limits and name != "torch"]


def skip_if_refused(limits: Limits, backend: str, *inputs: object) -> None:
    reason = why_not(limits, backend, *inputs)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")


def assert_as_accurate_as_eager(
    kernel: Function, definition: Function, inputs: Sequence[Tensor], factor: float = 2.0
) -> None:
    """Compares output and gradients of `kernel` and of eager `definition` with `definition` in float64."""
    truth = _run(definition, [tensor.double() for tensor in inputs])
    eager = _run(definition, inputs)
    ours = _run(kernel, inputs)
    names = ["output", *(f"gradient {index}" for index in range(len(inputs)))]
    for name, true, usual, own in zip(names, truth, eager, ours, strict=True):
        assert own.shape == true.shape, f"{name}: shape {tuple(own.shape)}, should be {tuple(true.shape)}"
        allowed = factor * _error(usual, true) + 1e-6 * max(1.0, true.abs().max().item())
        assert _error(own, true) <= allowed, f"{name}: error {_error(own, true):.3g}, allowed {allowed:.3g}"


def _error(value: Tensor, true: Tensor) -> float:
    difference = (value.double() - true).abs()
    assert not difference.isnan().any(), "NaN in the result: unwritten memory or an invalid operation"
    return difference.max().item()


def _run(function: Function, inputs: Sequence[Tensor]) -> list[Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    output = function(*leaves)
    # A gradient that is not constant, so that a kernel which forgets its factor shows.
    upstream = torch.linspace(0.5, 1.5, output.numel(), dtype=torch.float64).view_as(output).to(output)
    return [output.detach(), *torch.autograd.grad(output, leaves, upstream)]
