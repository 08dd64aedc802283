"""The one place where a backend is chosen.

`auto` takes the first of BACKENDS that gives no reason against; a named backend is used or refused with its reason,
never replaced. The nearest name wins: the argument, then `with use_backend(...)`, then the variable BCLIP_BACKEND.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from types import ModuleType

from .arguments import CUDA_HOST

# Best first. The kernels in CUDA C++ come after Triton's as long as no GPU has measured them: none has so far.
BACKENDS = ("triton", "cuda", "cpu", "reference")

# An operator's limits: per backend, a function of the call's inputs that returns None or the reason against.
Limits = Mapping[str, Callable[..., "str | None"]]

_NEEDS = {"cuda": "bclip_fast._cuda", "triton": "triton", "cpu": "bclip_fast._cpu"}
MISSING = {name: f"{module} is not installed" for name, module in _NEEDS.items() if find_spec(module) is None}
if CUDA_HOST is not None:
    MISSING.pop("cuda", None)


class BackendError(RuntimeError):
    """No backend can run this call; the message holds each refusal's reason."""


def _checked(name: str, where: str) -> str:
    if name != "auto" and name not in BACKENDS:
        raise BackendError(f"{where} names the unknown backend {name!r}; known: auto, {', '.join(BACKENDS)}")
    return name


_asked = _checked(os.environ.get("BCLIP_BACKEND", "auto"), "BCLIP_BACKEND")


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


def choose(operator: str, limits: Limits, backend: str, *inputs: object, library: bool = False) -> str:
    """The backend that runs this call.

    Args:
        library: the operator's reference is a kernel of torch's library, tuned for every device. A name given for all
            operators then stands for kernels of ours where there are any; the rest of the calls are the library's.

    Raises:
        BackendError: no backend, or not the one named, can run it.
    """
    asked = _asked if backend == "auto" else _checked(backend, "backend=")
    refusals = []
    names = BACKENDS if asked == "auto" else (asked, "reference") if library and backend == "auto" else (asked,)
    for name in names:
        reason = why_not(limits, name, *inputs)
        if reason is None:
            return name
        refusals.append(f"{name}: {reason}")
    raise BackendError(f"{operator} cannot run: " + "; ".join(refusals))


def kernels(operator: str, backend: str) -> ModuleType:
    """The module with the backend's kernels, imported when first run."""
    return importlib.import_module(f"bclip_fast.ops.{operator}.{backend}")
