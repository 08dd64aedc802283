"""Register the operators with torch.library, with one schema, fake function and gradient for all backends.

A call's dataclass is its schema: `arguments` writes the dataclass's fields in torch's notation. The module uses
`torch.library.Library` because `torch.library.custom_op` spends 20 to 30 microseconds more on each call. Both go
through torch's dispatcher, so compilers, fake tensors, dispatch modes and vmap see the operator. A direct call of an
autograd function would be still faster. But torch has no public function that says whether a compiler, a transform or a
mode watches the call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from .derivatives import Definition, beyond_first, first_by_kernel, refusal
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
    definition: Callable[..., Any] | None = None,
    arguments_of: Callable[[Any], tuple[Any, ...]] | None = None,
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
        definition: function that computes the first result in plain torch. The last argument is the backend. With
            "reference" the definition gives the derivatives that `gradient` doesn't: see `derivatives`.
        arguments_of: function of ctx that returns the arguments, for the definition.

    Returns:
        The operator's only overload, a callable.
    """
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    qualified = f"bclip::{name}"
    torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    definition = None if definition is None else without_autocast(definition)

    def refuse(ctx: Any, *grads: Any) -> Any:
        raise refusal(qualified)

    def definition_of(ctx: Any) -> Definition:
        inputs = () if arguments_of is None else arguments_of(ctx)
        return Definition(qualified, definition if inputs and inputs[-1] == "reference" else None, inputs)

    backward = refuse if gradient is None else first_by_kernel(definition_of, gradient)
    library = _GuardedLibrary(lambda kernel: _guarded(qualified, kernel, fake, definition))
    torch.library.register_autograd(qualified, backward, setup_context=setup, lib=library)
    return getattr(torch.ops.bclip, name).default


def _guarded(
    name: str, kernel: Callable[..., Any], fake: Callable[..., Any], definition: Callable[..., Any] | None
) -> Callable[..., Any]:
    """torch's kernel for autograd, behind a check whether it has the derivatives of this call.

    The check is here because a transform of torch.func, or a compiler that traces one, calls this function for each
    of its levels. A caller of the operator would see the outermost level only.
    """

    def run(keyset: Any, *inputs: Any) -> Any:
        if not beyond_first(inputs):
            return kernel(keyset, *inputs)
        if definition is None or inputs[-1] != "reference":
            raise refusal(name)
        result = definition(*inputs)
        with torch.no_grad():
            results = fake(*inputs)
        # Only the operator's own backward pass reads the other results.
        return (result, *results[1:]) if isinstance(results, tuple) else result

    return run


class _GuardedLibrary:
    """Our library, as `register_autograd` sees it."""

    def __init__(self, guard: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        self._guard = guard

    def impl(self, name: str, kernel: Callable[..., Any], dispatch_key: str, *, with_keyset: bool) -> None:
        """Register torch's kernel for autograd behind our check."""
        _LIBRARY.impl(name, self._guard(kernel), dispatch_key, with_keyset=with_keyset)


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
