"""Register the operators with torch.library, with one schema, fake function and gradient for all backends.

A call's dataclass is its schema: `arguments` writes the dataclass's fields in torch's notation. The module uses
`torch.library.Library` because `torch.library.custom_op` spends 20 to 30 microseconds more on each call. Both go
through torch's dispatcher, so compilers, fake tensors, dispatch modes and vmap see the operator. A direct call of an
autograd function would be still faster. But torch has no public function that says whether a compiler, a transform or a
mode watches the call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from .dtypes import has_autocast

P = ParamSpec("P")
R = TypeVar("R")

_LIBRARY = torch.library.Library("bclip", "FRAGMENT")

_SCHEMA_TYPES = {
    "Tensor": "Tensor",
    "Tensor | None": "Tensor?",
    "bool": "bool",
    "float": "float",
    "int": "SymInt",
    "torch.dtype": "ScalarType",
    "torch.dtype | None": "ScalarType?",
}


def arguments(call: type) -> str:
    """The fields of a call's dataclass as arguments of a torch schema."""
    return ", ".join(f"{_SCHEMA_TYPES[str(field.type)]} {field.name}" for field in fields(call))


def values(call: Any) -> tuple[Any, ...]:
    """The values of a call's fields, in the order of its schema."""
    return tuple(getattr(call, field.name) for field in fields(call))


def define(
    name: str,
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    setup: Callable[..., None] | None = None,
    gradient: Callable[..., Any] | None = None,
) -> Any:
    """Register the operator `bclip::name` for all devices.

    torch passes the arguments of `implementation` and `fake` by position.

    Args:
        schema: arguments and results, such as "(Tensor x, str backend) -> Tensor".
        implementation: function that computes the results. They must not share memory with arguments or each other.
        fake: function that returns empty results of the right shapes, dtypes and strides.
        setup: function (ctx, inputs, output) that saves what `gradient` reads.
        gradient: function (ctx, *grads) that returns the gradient of each argument. Without it the operator, such as a
            backward pass, cannot be differentiated.

    Returns:
        The operator's only overload, a callable.
    """
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    qualified = f"bclip::{name}"
    torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    backward = _refuse_second_derivative if gradient is None else differentiable_once(gradient)
    torch.library.register_autograd(qualified, backward, setup_context=setup, lib=_LIBRARY)
    return getattr(torch.ops.bclip, name).default


def run(operator: Any, *inputs: Any) -> Any:
    """Call an operator that `define` returned.

    Raises:
        NotImplementedError: an input has a tangent. torch would silently return a zero tangent.
    """
    if not torch.compiler.is_compiling():
        for value in inputs:
            if isinstance(value, Tensor) and unpack_dual(value).tangent is not None:
                raise NotImplementedError(
                    f"{operator.name()} has no forward-mode derivative (torch.func.jvp, torch.autograd.forward_ad): "
                    "use reverse mode, or plain torch operations"
                )
    return operator(*inputs)


def _refuse_second_derivative(ctx: Any, *grads: Tensor) -> Any:
    raise RuntimeError(
        "operators of bclip_fast are differentiable once: for second derivatives (create_graph=True, Hessians, "
        "gradient penalties) use plain torch operations"
    )


class _Refusal(torch.autograd.Function):
    """Passes gradients on and refuses to differentiate them."""

    @staticmethod
    def forward(ctx: Any, num_gradients: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if each is None else each.view_as(each) for each in tensors[:num_gradients])

    backward = staticmethod(_refuse_second_derivative)


def differentiable_once(backward: Callable[..., Sequence[Any]]) -> Callable[..., Sequence[Any]]:
    """Make the gradients of an autograd function raise RuntimeError when they are differentiated.

    torch's `once_differentiable` detaches the gradients from the inputs if the incoming gradient needs none itself. A
    loss has such a gradient, so its second derivatives would silently be zero. The inputs must be among the saved
    tensors.
    """

    @wraps(backward)
    def run(ctx: Any, *grads: Any) -> Sequence[Any]:
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        with torch.no_grad():
            gradients = backward(ctx, *grads)
        sources = [each for each in (*grads, *ctx.saved_tensors) if isinstance(each, Tensor) and each.requires_grad]
        return _Refusal.apply(len(gradients), *gradients, *sources)

    return run


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Switch autocast off inside `function`, on the device of its first tensor.

    The function chooses its precision itself, and autocast would round the operands of its products. Autocast
    may be on in a backward pass too.
    """

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        device = next(value for value in args if isinstance(value, Tensor)).device.type
        if not has_autocast(device) or not torch.is_autocast_enabled(device):
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return run
