"""Choose the backend of each call of an operator.

`auto` takes the first backend without a refusal, in the order of the device's record (`tuning`). A record lists the
backends that agree with the reference on this device, the fastest first. Without a record, `auto` compares a GPU kernel
with the reference before its first use. A named backend runs the call or raises an error with the reason. No other
backend replaces it. The nearest name wins: the argument, then `with use_backend(...)`, then the variable BCLIP_BACKEND.
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

from bclip_fast.errors import BackendError, Refusal

from . import processor, tuning
from .backend_names import BACKENDS as BACKENDS
from .backend_names import SDPA
from .build_info import why_missing
from .cuda_device import CUDA_HOST
from .dtypes import dtype_name

log = logging.getLogger(__name__)

# torch 2.6 doesn't have this function.
_records_export: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)

# Backends that are compiled for the device, so a new device, driver or compiler may break them.
_CHECKED = ("triton", "cuda", *SDPA)

# An operator's limits: for each backend, a function of the call's inputs that returns None or the reason for a refusal.
Limits = Mapping[str, Callable[..., "str | None"]]

# The backends that need a module, and the reason why it is missing.
_NEEDS = {
    "cuda": why_missing("bclip_fast._cuda"),
    "triton": None if find_spec("triton") else "triton is not installed",
    "cpu": why_missing("bclip_fast._cpu"),
}
MISSING = {name: reason for name, reason in _NEEDS.items() if reason is not None}
if CUDA_HOST is not None:
    MISSING.pop("cuda", None)
if processor.ISA_ERROR is not None:
    log.warning("the cpu backend is off: %s", processor.ISA_ERROR)


@dataclass(frozen=True)
class Decision:
    """The choice for a call. `refusals` holds the reason of each backend that cannot run the call."""

    operator: str
    device: torch.device
    dtype: torch.dtype | None
    shapes: str
    order: tuple[str, ...]
    refusals: dict[str, str]
    chosen: str | None

    @property
    def key(self) -> tuple[str, str, str]:
        """The key of the call's entry in a record."""
        return self.operator, dtype_name(self.dtype), self.shapes


@dataclass(frozen=True)
class _Choice:
    """The inputs of one choice."""

    operator: str
    limits: Limits
    inputs: tuple[object, ...]
    kind: str
    index: int
    dtype: torch.dtype | None
    shapes: str
    names: tuple[str, ...]
    auto: bool

    def refusal(self, name: str) -> str | None:
        """The reason why backend `name` cannot run the call, or None."""
        return why_not(self.limits, name, *self.inputs)


class _Explained(Exception):
    def __init__(self, decision: Decision) -> None:
        super().__init__()
        self.decision = decision


def _known(name: str, source: str) -> str:
    if name != "auto" and name not in BACKENDS:
        raise BackendError(f"{source} names the unknown backend {name!r}; known: auto, {', '.join(BACKENDS)}")
    return name


_requested = _known(os.environ.get("BCLIP_BACKEND", "auto"), "BCLIP_BACKEND")
_explaining = ""


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every operator inside the block on backend `name` (or "auto"), in the whole process."""
    global _requested
    previous, _requested = _requested, _known(name, "use_backend")
    try:
        yield
    finally:
        _requested = previous


def is_exporting(backend: str = "auto") -> bool:
    """Whether another program will run this call: torch.export, torch.onnx.export or torch.jit.trace records it.

    The operators then run as plain torch operations, which every such program knows, for any shape. A named backend,
    `use_backend` and BCLIP_BACKEND keep our operators in the graph.

    Raises:
        BackendError: torch.onnx.export with dynamo=False. Its graphs give wrong embeddings or take one batch size only.
    """
    if backend != "auto" or _requested != "auto" or _explaining:
        return False
    if torch.jit.is_tracing():
        if torch.onnx.is_in_onnx_export():
            raise BackendError("torch.onnx.export(dynamo=False) isn't supported: pass dynamo=True")
        return True
    return _records_export()


def requested() -> str:
    """The backend that `use_backend` or BCLIP_BACKEND names for all operators, or "auto"."""
    return _requested


def why_not(limits: Limits, name: str, *inputs: object) -> str | None:
    """The reason why backend `name` cannot run the call, or None."""
    if name not in limits:
        return "not implemented"
    if name == "cpu" and processor.ISA_ERROR is not None:
        return processor.ISA_ERROR
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
        inputs: arguments of the limits. The first is a tensor on the call's device, or a file on the CPU.
        library: True if the operator's reference is a kernel of torch's library, tuned for every device. Then a backend
            name for all operators selects our kernels if they can run. The library runs the other calls.
        dtype: dtype in the key of the record's entry. By default that of the first input.
        shapes: class of shapes in that key.
        otherwise: order of the backends if the record has no entry.

    Raises:
        BackendError: no backend, or not the named one, can run the call.
        UserError: BCLIP_TUNE names a file that is not a record.
    """
    name = _requested if backend == "auto" else _known(backend, "backend=")
    first = inputs[0]
    kind, index = "cpu", 0
    if isinstance(first, Tensor):
        kind, index, dtype = first.device.type, first.device.index or 0, dtype or first.dtype
    if name == "auto":
        names = tuning.order(operator, kind, index, dtype, shapes, otherwise)
    else:
        names = (name, "reference") if library and backend == "auto" else (name,)
    if _explaining:
        choice = _Choice(operator, limits, inputs, kind, index, dtype, shapes, names, name == "auto")
        raise _Explained(_explain(choice))
    refusals = []
    for candidate in names:
        reason = why_not(limits, candidate, *inputs)
        if reason is None and name == "auto" and candidate in _CHECKED:
            reason = _fault(operator, candidate, kind, index, dtype)
        if reason is None:
            return candidate
        refusals.append(f"{candidate}: {reason}")
    raise Refusal(f"{operator} cannot run: " + "; ".join(refusals))


def load_backend(operator: str, backend: str) -> ModuleType:
    """Import the module of the backend's kernels. `operator` is its folder below `ops`, with dots."""
    # A module named torch would replace torch in its package.
    return importlib.import_module(f"bclip_fast.ops.{operator}.{'aten' if backend == 'torch' else backend}")


def explain(call: Callable[[], object], *, check: bool = False) -> Decision:
    """The dispatcher's decision for `call`, a function that makes one call of an operator.

    The call doesn't run. With `check`, pending comparisons with the reference run. This function is not thread-safe.
    """
    global _explaining
    _explaining = "check" if check else "look"
    try:
        call()
    except _Explained as explained:
        return explained.decision
    finally:
        _explaining = ""
    raise ValueError("the call reached no operator")


def _explain(choice: _Choice) -> Decision:
    global _explaining
    check, _explaining = _explaining == "check", ""
    device_key = choice.kind, choice.index, choice.dtype
    refusals: dict[str, str] = {}
    chosen = None
    for name in (*choice.names, *(name for name in BACKENDS if name not in choice.names)):
        reason = choice.refusal(name)
        if reason is None and choice.auto and name in _CHECKED:
            reason = _verdict(choice.operator, name, *device_key)
            if reason is None and check and chosen is None and name in choice.names:
                reason = _fault(choice.operator, name, *device_key)
        if reason:
            refusals[name] = reason
        elif chosen is None and name in choice.names:
            chosen = name
    device = torch.device(choice.kind) if choice.kind != "cuda" else torch.device(choice.kind, choice.index)
    return Decision(choice.operator, device, choice.dtype, choice.shapes, choice.names, refusals, chosen)


def _verdict(operator: str, backend: str, kind: str, index: int, dtype: torch.dtype | None) -> str | None:
    """The result of an earlier check: "" without a fault, None without a check."""
    return tuning.of_device(kind, index).checks.get((operator, dtype_name(dtype), backend))


def _fault(operator: str, backend: str, kind: str, index: int, dtype: torch.dtype | None) -> str | None:
    """The fault of a kernel on this device, or None. The first call compares the kernel with the reference."""
    verdict = _verdict(operator, backend, kind, index, dtype)
    if verdict is None:
        if tuning.mode() == "off" or (kind == "cuda" and torch.cuda.is_current_stream_capturing()):
            return None
        # Imported late, because the trials call the operators.
        trials = importlib.import_module("bclip_fast.ops.trials")
        device = torch.device(kind, index) if kind == "cuda" else torch.device(kind)
        verdict, keep = trials.check(operator, backend, device, dtype)
        if verdict:
            log.warning(
                "%s in %s fails its check on %s with the backend %s, so `auto` does not take it here: %s. "
                "Please report it together with the output of `bclip doctor`",
                operator,
                dtype_name(dtype),
                tuning.of_device(kind, index).fingerprint["name"],
                backend,
                verdict,
            )
        tuning.note_check(kind, index, (operator, dtype_name(dtype), backend), verdict, keep=keep)
    return f"fails its check on this device: {verdict}" if verdict else None


# See `tuning.order`.
_fault._dynamo_marked_constant = True  # type: ignore[attr-defined]
