"""The one place where a backend is chosen.

`auto` takes the first backend that gives no reason against, in the order of the device's record (`tuning`): those that
agree with the reference on this device, the fastest first. Without a record a kernel for a GPU is compared with the
reference once, before its first use. A named backend is used or refused with its reason, never replaced. The nearest
name wins: the argument, then `with use_backend(...)`, then the variable BCLIP_BACKEND.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from ..errors import BackendError
from . import tuning
from .cuda_device import CUDA_HOST

log = logging.getLogger(__name__)

# The order where nothing has been measured. `torch` is a kernel of torch's library where `reference` is none.
BACKENDS = ("triton", "cuda", "cpu", "torch", "reference")

# Compiled for the device they meet, so that a new device, driver or compiler may break them.
_CHECKED = ("triton", "cuda")

# An operator's limits: per backend, a function of the call's inputs that returns None or the reason against.
Limits = Mapping[str, Callable[..., "str | None"]]

_NEEDS = {"cuda": "bclip_fast._cuda", "triton": "triton", "cpu": "bclip_fast._cpu"}
MISSING = {name: f"{module} is not installed" for name, module in _NEEDS.items() if find_spec(module) is None}
if CUDA_HOST is not None:
    MISSING.pop("cuda", None)


@dataclass(frozen=True)
class Decision:
    """What `choose` decided for a call. `refusals` has the reason of each backend that cannot run it."""

    operator: str
    device: torch.device
    dtype: torch.dtype | None
    shapes: str
    order: tuple[str, ...]
    refusals: dict[str, str]
    chosen: str | None

    @property
    def key(self) -> tuple[str, str, str]:
        return self.operator, tuning.short(self.dtype), self.shapes


class _Explained(Exception):
    def __init__(self, decision: Decision) -> None:
        super().__init__()
        self.decision = decision


def _checked(name: str, where: str) -> str:
    if name != "auto" and name not in BACKENDS:
        raise BackendError(f"{where} names the unknown backend {name!r}; known: auto, {', '.join(BACKENDS)}")
    return name


_asked = _checked(os.environ.get("BCLIP_BACKEND", "auto"), "BCLIP_BACKEND")
_explaining = ""


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs every operator inside the block on backend `name` (or "auto"), for the whole process."""
    global _asked
    before, _asked = _asked, _checked(name, "use_backend")
    try:
        yield
    finally:
        _asked = before


def why_not(limits: Limits, name: str, *inputs: object) -> str | None:
    """The reason why backend `name` cannot run the call, or None."""
    if name not in limits:
        return "not implemented"
    return MISSING.get(name) or limits[name](*inputs)


def choose(
    operator: str,
    limits: Limits,
    backend: str,
    *inputs: object,
    library: bool = False,
    dtype: torch.dtype | None = None,
    shapes: str = "",
    otherwise: tuple[str, ...] = BACKENDS,
) -> str:
    """The backend that runs this call.

    Args:
        inputs: what the limits ask about; the first is a tensor on the call's device, or a file on the CPU.
        library: the operator's reference is a kernel of torch's library, tuned for every device. A name given for all
            operators then stands for kernels of ours where there are any; the rest of the calls are the library's.
        dtype: under which the record keeps such calls, that of the first input unless given.
        shapes: the class of shapes under which the record keeps them.
        otherwise: the order where nothing is known.

    Raises:
        BackendError: no backend, or not the one named, can run it.
        UserError: BCLIP_TUNE names a file that is no record.
    """
    asked = _asked if backend == "auto" else _checked(backend, "backend=")
    first = inputs[0]
    kind, index = "cpu", 0
    if isinstance(first, Tensor):
        kind, index, dtype = first.device.type, first.device.index or 0, dtype or first.dtype
    if asked == "auto":
        names = tuning.order(operator, kind, index, dtype, shapes, otherwise)
    else:
        names = (asked, "reference") if library and backend == "auto" else (asked,)
    if _explaining:
        raise _Explained(_explain(operator, limits, kind, index, dtype, shapes, names, asked == "auto", *inputs))
    refusals = []
    for name in names:
        reason = why_not(limits, name, *inputs)
        if reason is None and asked == "auto" and name in _CHECKED:
            reason = _fault(operator, name, kind, index, dtype)
        if reason is None:
            return name
        refusals.append(f"{name}: {reason}")
    raise BackendError(f"{operator} cannot run: " + "; ".join(refusals))


def kernels(operator: str, backend: str) -> ModuleType:
    """The module with the backend's kernels, imported when first run."""
    return importlib.import_module(f"bclip_fast.ops.{operator}.{backend}")


def explain(call: Callable[[], object], *, check: bool = False) -> Decision:
    """What `call`, one call of an operator, would be run by. Nothing is run but, with `check`, outstanding checks.

    Not for several threads at a time.
    """
    global _explaining
    _explaining = "check" if check else "look"
    try:
        call()
    except _Explained as found:
        return found.decision
    finally:
        _explaining = ""
    raise ValueError("the call reached no operator")


def _explain(
    operator: str,
    limits: Limits,
    kind: str,
    index: int,
    dtype: torch.dtype | None,
    shapes: str,
    names: tuple[str, ...],
    auto: bool,
    *inputs: object,
) -> Decision:
    global _explaining
    check, _explaining = _explaining == "check", ""
    refusals, chosen = {}, None
    for name in (*names, *(name for name in BACKENDS if name not in names)):
        reason = why_not(limits, name, *inputs)
        if reason is None and auto and name in _CHECKED:
            reason = _verdict(operator, name, kind, index, dtype)
            if reason is None and check and chosen is None and name in names:
                reason = _fault(operator, name, kind, index, dtype)
        if reason:
            refusals[name] = reason
        elif chosen is None and name in names:
            chosen = name
    device = torch.device(kind) if kind != "cuda" else torch.device(kind, index)
    return Decision(operator, device, dtype, shapes, names, refusals, chosen)


def _verdict(operator: str, backend: str, kind: str, index: int, dtype: torch.dtype | None) -> str | None:
    """What an earlier check found: "" for no fault, None where there was no check."""
    return tuning.of_device(kind, index).checks.get((operator, tuning.short(dtype), backend))


def _fault(operator: str, backend: str, kind: str, index: int, dtype: torch.dtype | None) -> str | None:
    """What is wrong with a kernel on this device, or None; compared with the reference the first time it is asked."""
    verdict = _verdict(operator, backend, kind, index, dtype)
    if verdict is None:
        if tuning.mode() == "off" or (kind == "cuda" and torch.cuda.is_current_stream_capturing()):
            return None
        # Here, because the cases call the operators.
        trials = importlib.import_module("bclip_fast.ops.trials")
        device = torch.device(kind, index) if kind == "cuda" else torch.device(kind)
        verdict, keep = trials.check(operator, backend, device, dtype)
        if verdict:
            log.warning(
                "%s in %s fails its check on %s with the backend %s, which `auto` does not take here: %s. "
                "Please report it together with what `bclip doctor` prints",
                operator,
                tuning.short(dtype),
                tuning.of_device(kind, index).fingerprint["name"],
                backend,
                verdict,
            )
        tuning.note_check(kind, index, (operator, tuning.short(dtype), backend), verdict, keep=keep)
    return f"fails its check on this device: {verdict}" if verdict else None


# As `tuning.order`.
_fault._dynamo_marked_constant = True  # type: ignore[attr-defined]
