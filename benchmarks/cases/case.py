"""The benchmark case: inputs, truth, contenders, FLOPs and bytes of one operator at one shape."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bclip_fast.benchmarks.peers import import_open_clip
from bclip_fast.ops.dispatch import BACKENDS, why_not

Inputs = Sequence[Any]
# Takes the inputs and returns the results to compare with the truth. A result that it does not compute is None.
Contender = Callable[..., Any]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# How many times larger the cases of layers are on a GPU. With a CPU's batch, the launches would take longer than the
# kernels.
MORE = 16 if DEVICE.type == "cuda" else 1
# Whether to replace all cases by tiny ones. A rehearsal of `make gpu` sets the variable.
TINY = os.environ.get("BCLIP_BENCHMARKS") == "tiny"


class Unavailable(Exception):
    """The reason why a peer, or the input of a case, is not available here."""


@dataclass(frozen=True, eq=False)
class Case:
    """One operator at one shape.

    make_inputs: maker of the inputs.
    truth: function of the inputs that computes the correct results. Floating-point inputs arrive in float64.
    contenders: maker of each contender by name. The names of ours are "ours:<backend>". The others are peers.
        A maker raises Unavailable with the reason if its contender cannot run.
    flops, bytes: the least work that any method has to do. Tables show it as the floor beside each time.
    curve: name of the curve to which the case belongs. The cases of a curve differ only in their batch.
    large: whether a call takes minutes. Such a case runs only on request, and once.
    unit, num_units: unit of the rate, and units per call. Used if flops is 0.
    """

    operator: str
    name: str
    make_inputs: Callable[[], Inputs]
    truth: Contender
    contenders: dict[str, Callable[[], Contender]]
    flops: float = 0.0
    bytes: float = 0.0
    dtype: torch.dtype = torch.float32
    curve: str = ""
    batch: int = 0
    large: bool = False
    unit: str = "FLOP"
    num_units: float = field(default=0.0)

    @property
    def id(self) -> str:
        """The name of the case's benchmark."""
        return f"{self.operator}-{self.name}"


def ours(limits: Any, make: Callable[[str], Contender], *inputs: Any) -> dict[str, Callable[[], Contender]]:
    """Return a contender's maker for each backend that implements the operator."""

    def maker(backend: str) -> Callable[[], Contender]:
        def make_available() -> Contender:
            reason = why_not(limits, backend, *inputs)
            if reason is not None:
                raise Unavailable(reason)
            return make(backend)

        return make_available

    return {f"ours:{backend}": maker(backend) for backend in BACKENDS if backend in limits}


def with_gradients(function: Callable[..., Tensor], num_constants: int = 0) -> Contender:
    """Return a contender that runs forward and backward, with results (output, gradients of every leaf).

    num_constants: number of leaves at the end that `function` treats as constants. Their gradients are None.
    """

    def run(*inputs: Any) -> list[Tensor | None]:
        leaves = [value for value in inputs if isinstance(value, Tensor) and value.requires_grad]
        output = function(*inputs)
        gradient = torch.ones_like(output) if output.ndim == 0 else output.detach()
        variables = leaves[: len(leaves) - num_constants]
        return [output.detach(), *torch.autograd.grad(output, variables, gradient), *[None] * num_constants]

    return run


def dtype_name(dtype: torch.dtype) -> str:
    """Return the dtype's name without `torch.`."""
    return str(dtype).removeprefix("torch.")


def shared_data() -> Path:
    """Return the folder of real data: BCLIP_SHARED_DATA, or shared/data beside the source tree."""
    default = Path(__file__).resolve().parents[3] / "shared" / "data"
    return Path(os.environ.get("BCLIP_SHARED_DATA", default))


def peer(import_module: Callable[[], Any]) -> Any:
    """Return the module that `import_module` imports. Raises Unavailable if it is not installed."""
    try:
        return import_module()
    except ImportError as error:
        raise Unavailable(f"the peer {error.name} is not installed") from error


def open_clip() -> Any:
    """Return open_clip. Raises Unavailable if it, timm or transformers is not installed, and in a rehearsal."""
    if TINY:
        raise Unavailable("a rehearsal leaves open_clip out, whose import takes seconds")
    return peer(import_open_clip)


def cuda_peer(name: str) -> Any:
    """Return a module whose Triton kernels need CUDA. Raises Unavailable without a device."""
    if DEVICE.type != "cuda":
        raise Unavailable("it needs CUDA, and torch sees no device")
    return peer(lambda: importlib.import_module(name))
