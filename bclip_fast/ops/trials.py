"""Checks of backends against the reference on this device, and the dispatcher's decisions for all operators.

The truth of a check is the operator's definition in float64, on inputs that every dtype holds exactly. The yardstick is
the error of the definition in the kernel's dtype on the same device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from bclip_fast.errors import Refusal

from .dispatch import Decision
from .trial_cases import Tensors, Trial, dtypes, other_heads, results_of, small, timed

# A backend passes if the norm of its error is at most twice the yardstick's, or this many unit roundoffs of the norm.
FACTOR = 2.0
ROUNDOFFS = 8.0


def decisions(device: torch.device, *, check: bool = False) -> Iterator[Decision]:
    """The dispatcher's decisions on the device, for every operator, dtype and class of shapes."""
    for dtype in dtypes(device):
        for trial in timed(device, dtype, empty=True):
            yield trial.decide(check=check)


def other_head_decisions(device: torch.device) -> Iterator[Decision]:
    """The decisions for attention with head dimensions of published towers that no kernel is made for.

    The class of shapes is only the head dimension.
    """
    for dtype in dtypes(device):
        for dim, trial in other_heads(device, dtype):
            yield dataclasses.replace(trial.decide(), shapes=f"d = {dim}")


def check(operator: str, backend: str, device: torch.device, dtype: torch.dtype | None) -> tuple[str, bool]:
    """The fault of the backend's kernels on the device, or "", and whether a record should keep it.

    Running out of memory is temporary, so no record keeps it. An operator or dtype without trials passes.
    """
    trial_dtype = torch.float32 if operator.startswith("image") else dtype
    if trial_dtype is None or trial_dtype not in dtypes(device):
        return "", True
    for trial in small(device, trial_dtype):
        if trial.operator == operator and (fault := fault_of(trial, backend)):
            return fault, "out of memory" not in fault
    return "", True


def fault_of(trial: Trial, backend: str) -> str:
    """The fault in the backend's results and gradients of this call, or "". A call that its limits refuse has none."""
    # The caller may have switched gradients off or autocast on.
    autocast = torch.autocast(trial.device.type, enabled=False)
    with torch.inference_mode(False), torch.enable_grad(), autocast:
        tensors = trial.make()
        try:
            results = trial.run(backend, tensors)
            if trial.device.type == "cuda":
                torch.cuda.synchronize(trial.device)
        except Refusal:
            return ""
        except Exception as raised:  # a compiler, driver or kernel may raise anything
            lines = str(raised).strip().splitlines() or [""]
            return f"{type(raised).__name__}: {lines[0]}"
        if trial.definition is None:
            return _image_fault(results, trial.run("reference", tensors))
        exact = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in tensors]
        truth = results_of(trial.definition, exact)
        eager = results_of(trial.definition, tensors)
    leaves = [tensor for tensor in exact if tensor.requires_grad]
    num_results = len(truth) - len(leaves)
    names = [*("the result" for _ in range(num_results)), *(f"gradient {i}" for i in range(len(leaves)))]
    for i, (name, true) in enumerate(zip(names, truth, strict=True)):
        magnitude = true.norm()
        if i >= num_results and true.ndim == 0:
            # A sum of cancelling terms is as exact as its terms.
            terms = (truth[num_results] * leaves[0]).abs().sum() / leaves[i - num_results].detach().abs()
            magnitude = torch.maximum(magnitude, terms)
        error, usual = ((each.double() - true).norm() / magnitude for each in (results[i], eager[i]))
        allowed = max(FACTOR * usual.item(), ROUNDOFFS * torch.finfo(trial.dtype).eps / 2)
        if not error.item() <= allowed:
            return f"{name} of {trial.what} has a relative error of {error.item():.2g}, above {allowed:.2g}"
    return ""


def _image_fault(images: Tensors, expected: Tensors) -> str:
    """The fault of images whose mean error is above 2 levels, or ""."""
    for pixels, true in zip(images, expected, strict=True):
        error = (pixels.float() - true.float()).abs().mean().item()
        if not error <= 2.0:
            return f"pixels have a mean error of {error:.3g} levels, but only 2 are allowed"
    return ""
