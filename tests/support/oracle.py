"""The oracle: the only definition of "close enough" for all kernels, the same on every processor.

The truth is the operator's definition in float64. A kernel passes if its output and every gradient pass two criteria:

- The norm of the error over a few draws of the inputs is at most twice a usual error. Usual errors are those of eager
  PyTorch in the same dtype, and of the operator's formula in float32 (formulas.py). In float32 the larger one counts,
  because eager is exact by accident if few terms cancel. In half precision, eager rounds numbers that a kernel doesn't,
  so the smaller one counts. The error of rounding the truth to the result's dtype is always allowed.
- No element is further from the truth than the formula allows. This bound is derived, not measured: unit roundoff,
  times the growth of each operation, times the size of its terms.

The norm finds a kernel that is systematically worse. Numbers of one row share the errors of its softmax or mean, so
there are only as many independent errors as rows. With few rows, the factor is larger than two. It is so large that two
equal kernels exceed it with a chance of one in a million. The bound finds a fault in a single place. It also judges a
result that is zero because its terms cancel.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from arithmetic import Arithmetic, Bounds
from formulas import Formula
from torch import Tensor

from bclip_fast.ops import attention, contrastive, image, matmul, pointwise
from bclip_fast.ops.attention import single_query
from bclip_fast.ops.backend_names import SDPA
from bclip_fast.ops.cuda_device import CUDA_HOST
from bclip_fast.ops.dispatch import BACKENDS, Limits, why_not

Function = Callable[..., Tensor]
HALF = torch.bfloat16, torch.float16
# Limits of each operator, and inputs that they allow in every dtype that the backend supports.
OPERATORS: dict[str, tuple[Limits, Callable[[torch.dtype], list[Any]]]] = {
    "attention": (attention.LIMITS, lambda dtype: [torch.zeros(1, 3, 1, 64, dtype=dtype)]),
    "single-query attention": (single_query.LIMITS, lambda dtype: [torch.zeros(1, 1, 64, dtype=dtype)]),
    "contrastive": (contrastive.LIMITS, lambda dtype: [torch.zeros(1, 8, dtype=dtype)] * 2),
    "pointwise": (pointwise.LIMITS, lambda dtype: [torch.zeros(1, 8, dtype=dtype)]),
    "linear": (matmul.LIMITS, lambda dtype: [torch.zeros(1, 8, dtype=dtype)] * 2),
    "image": (image.FILE_LIMITS, lambda dtype: [b""]),
}
FACTOR = 2.0
FEW, CHANCE = 100, 1e-6
# The least and the largest number of draws. Small inputs are drawn more often, until their rows suffice for the factor.
# An interpreter or emulator sums in the same order on every machine, and is a thousand times slower.
EMULATED = CUDA_HOST is not None or os.environ.get("TRITON_INTERPRET") == "1"
DRAWS = (1, 5) if EMULATED else (3, 30)
# The ratio of truth and bound below which the truth's terms have cancelled: float64's rounding over float32's.
CANCELLED = 2.0**-24
# A kernel may flush numbers below float32's normal ones to zero.
TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Expected:
    """One draw: the inputs, the upstream gradient, and three lists, with an element for the output and each gradient.

    The lists are the truth, the usual results (by eager PyTorch and perhaps by the formula), and bounds on the errors.
    """

    inputs: list[Tensor]
    upstream: Tensor
    truth: list[Tensor]
    usual: list[list[Tensor]]
    bounds: list[Tensor] | None


def expected(
    definition: Function, draw: Callable[[], Sequence[Tensor]], formula: Formula | None, draws: int | None = None
) -> list[Expected]:
    """Draws inputs and computes the expected results of each draw."""
    cases: list[Expected] = []
    while len(cases) < (draws or DRAWS[0]):
        torch.manual_seed(len(cases))
        inputs = list(draw())
        draws = draws or min(max(DRAWS[0], -(-FEW // max(1, _rows(inputs[0])))), DRAWS[1])
        with torch.no_grad():
            usual = definition(*inputs)
        # The gradient of a single number is not 1, so that a kernel which ignores it fails.
        upstream = torch.randn(usual.shape) if usual.dim() else torch.rand(()) + 0.5
        # Rounded to the lowest dtype, so that it is exact in every dtype of the backward pass.
        lowest = min((tensor.dtype for tensor in inputs), key=lambda dtype: dtype.itemsize)
        upstream = upstream.to(lowest).to(usual)
        truth = results_of(definition, [tensor.double() for tensor in inputs], upstream)
        results, bounds = [results_of(definition, inputs, upstream)], None
        if formula is not None:
            bounds = [number.error + TINY for number in formula(Bounds(), inputs, upstream)]
            results.append(formula(Arithmetic(), inputs, upstream))
        cases.append(Expected(inputs, upstream, truth, results, bounds))
    return cases


def results_of(function: Function, inputs: Sequence[Tensor], upstream: Tensor) -> list[Tensor]:
    """The output and the gradient of each input."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, upstream.to(output))]


def faults(cases: Sequence[Expected], all_results: Sequence[Sequence[Tensor]]) -> list[str]:
    """The faults of the results of each case: a line for each result and criterion that fails."""
    lines = []
    for place in range(len(cases[0].truth)):
        usual = [[results[place] for results in case.usual] for case in cases]
        bounds = None if cases[0].bounds is None else [case.bounds[place] for case in cases]
        actual, truth = [results[place] for results in all_results], [case.truth[place] for case in cases]
        name = f"gradient {place - 1}" if place else "output"
        rows = sum(min(_rows(case.inputs[0]), _rows(case.truth[place])) for case in cases)
        half = any(tensor.dtype.itemsize == 2 for tensor in cases[0].inputs)
        lines += [f"{name}: {line}" for line in compared(actual, usual, truth, bounds, rows, min if half else max)]
    return lines


def compared(
    actual: Sequence[Tensor],
    usual: Sequence[Sequence[Tensor]],
    truth: Sequence[Tensor],
    bounds: Sequence[Tensor] | None,
    rows: int,
    counts: Callable[[list[float]], float] = max,
) -> Iterable[str]:
    """The faults of one result over several draws with `rows` in total. `counts` picks among the usual errors."""
    for mine, true in zip(actual, truth, strict=True):
        if mine.shape != true.shape:
            yield f"shape {tuple(mine.shape)}, should be {tuple(true.shape)}"
            return
        if (mine.isnan() & ~true.isnan()).any():
            yield "NaN in the result: unwritten memory or an invalid operation"
            return
    errors = [mine.double() - true for mine, true in zip(actual, truth, strict=True)]
    size = _norm(truth)
    if size > (0.0 if bounds is None else CANCELLED * _norm(bounds)):
        # The error of rounding: at least 1 / sqrt(12) of the last digit, even if the truth needs no rounding.
        roundings = _norm([true.to(mine.dtype).double() - true for mine, true in zip(actual, truth, strict=True)])
        roundings = max(roundings, size * torch.finfo(actual[0].dtype).eps / 2 / 12**0.5)
        others = [
            _norm([one.double() - true for one, true in zip(way, truth, strict=True)])
            for way in zip(*usual, strict=True)
        ]
        error, allowed = _norm(errors) / size, factor_of(rows) * max(counts(others), roundings) / size
        if not error <= allowed:
            yield f"relative error {error:.3g}, allowed {allowed:.3g}"
    for error, bound in zip(errors, bounds or (), strict=bounds is not None):
        excess = (error.abs() / bound).max() if error.numel() else torch.zeros(())
        if not excess <= 1:
            place = tuple(int(one) for one in torch.unravel_index((error.abs() / bound).argmax(), error.shape))
            yield f"error {error[place].abs():.3g} at {place}, but the bound is {bound[place]:.3g}"


def factor_of(count: int) -> float:
    """The factor by which the norm of `count` errors may exceed the usual norm.

    Take two norms of n independent normal errors of one size. Their squared ratio exceeds x with a probability below 2
    / (n B(n/2, n/2)) x^(-n/2). This follows from the powers of x in the density of the F distribution.
    """
    if count >= FEW:
        return FACTOR
    log_beta = 2 * math.lgamma(count / 2) - math.lgamma(count)
    return FACTOR * math.exp((math.log(2 / count / CHANCE) - log_beta) / count)


def _rows(tensor: Tensor) -> int:
    return tensor.numel() // tensor.shape[-1] if tensor.dim() > 1 and tensor.numel() else tensor.numel()


def _norm(tensors: Sequence[Tensor]) -> float:
    return float(sum(tensor.square().sum() for tensor in tensors)) ** 0.5


def assert_as_accurate_as_eager(
    kernel: Function,
    definition: Function,
    draw: Callable[[], Sequence[Tensor]],
    formula: Formula | None,
    draws: int | None = None,
) -> None:
    """Judges `kernel`, a function of the inputs that `draw` makes, by the criteria of this module.

    `formula` is None if the kernel is the library's own.
    """
    cases = expected(definition, draw, formula, draws)
    lines = faults(cases, [results_of(kernel, case.inputs, case.upstream) for case in cases])
    assert not lines, "\n".join(lines)


def every_backend(operator: str, dtype: torch.dtype = torch.float32) -> list[str]:
    """The backends that run the operator in `dtype` here. Tests of other backends are not collected.

    The report's header names the other backends. torch's own attention is left out, because its rounding is not ours.
    test_sdpa.py tests it, and each of its kernels.
    """
    limits, inputs = OPERATORS[operator]
    torchs = ("torch", *SDPA) if operator == "attention" else ()
    ours = [name for name in BACKENDS if name in limits and name not in torchs]
    return [name for name in ours if why_not(limits, name, *inputs(dtype)) is None]


def every_backend_and(operator: str, *dtypes: torch.dtype) -> list[tuple[str, torch.dtype]]:
    """Pairs of a backend and a dtype that it runs here."""
    return [(name, dtype) for dtype in dtypes for name in every_backend(operator, dtype)]


def collected_if(condition: bool) -> Callable[[Any], Any]:
    """A decorator that collects a test only if `condition` holds, and otherwise leaves no skip behind."""
    return lambda test: test if condition else None


def absent_backends() -> str:
    """One line: the backends without tests in this process, and the reasons."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for operator, (limits, inputs) in OPERATORS.items():
        for name in limits:
            refusals = [why_not(limits, name, *inputs(dtype)) for dtype in (torch.float32, *HALF)]
            if all(refusals):
                reasons.setdefault((name, refusals[1] or ""), []).append(operator)
    return "; ".join(f"{name} of {', '.join(of)}: {reason}" for (name, reason), of in reasons.items())
