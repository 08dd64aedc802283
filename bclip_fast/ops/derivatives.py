"""The derivatives that an operator has.

A kernel computes an operator and its first derivative in reverse mode. The backend "reference" has all others: forward
mode, higher orders and the transforms of torch.func. It takes them from the operator's definition in plain torch, which
holds complete matrices where a kernel holds chunks. Every other backend raises an error instead. torch by itself would
return zeros: it takes a function without a forward-mode derivative, or a gradient without a graph, for a constant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

# The place of a tensor among the arguments of a call. The graph keeps the tensors themselves.
_TENSOR = object()


@dataclass(frozen=True)
class Definition:
    """An operator's definition in plain torch and the arguments of one call."""

    name: str
    function: Callable[..., Any] | None = None
    """Returns the differentiable results, a tensor or a tuple. None: only kernels compute this call."""
    arguments: tuple[Any, ...] = ()

    def with_tensors(self, tensors: Sequence[Tensor | None]) -> Definition:
        """The call of `without_tensors` on these tensors, in their order."""
        remaining = iter(tensors)
        arguments = tuple(next(remaining) if each is _TENSOR else each for each in self.arguments)
        return Definition(self.name, self.function, arguments)

    def without_tensors(self) -> Definition:
        """The call without references to its tensors."""
        arguments = tuple(_TENSOR if isinstance(each, Tensor) else each for each in self.arguments)
        return Definition(self.name, self.function, arguments)

    def tensors(self) -> list[Tensor]:
        """The tensors among the arguments."""
        return [each for each in self.arguments if isinstance(each, Tensor)]

    def results(self) -> tuple[Tensor, ...]:
        """The differentiable results."""
        assert self.function is not None
        results = self.function(*self.arguments)
        return results if isinstance(results, tuple) else (results,)


def refusal(name: str) -> NotImplementedError:
    """The error for a derivative that a kernel lacks."""
    return NotImplementedError(
        f"{name} is differentiable once and in reverse mode: for second derivatives (create_graph=True, Hessians, "
        "gradient penalties), forward mode (torch.func.jvp, torch.autograd.forward_ad) or torch.func.grad pass "
        'backend="reference", or call the model inside ops.use_backend("reference")'
    )


def has_tangent(values: Sequence[Any]) -> bool:
    """Whether forward mode differentiates one of the tensors."""
    return any(isinstance(value, Tensor) and unpack_dual(value).tangent is not None for value in values)


def transforms_active() -> bool:
    """Whether a transform of torch.func is active. `torch.autograd.Function` asks the same."""
    return torch._C._are_functorch_transforms_active()


def beyond_first(values: Sequence[Any]) -> bool:
    """Whether forward mode or torch.func.grad differentiates one of the tensors."""
    if has_tangent(values):
        return True
    if not (transforms_active() and torch.is_grad_enabled()):
        return False
    return any(isinstance(value, Tensor) and value.requires_grad for value in values)


def transformed(values: Sequence[Any]) -> bool:
    """Whether to compute by plain torch what an autograd function computes otherwise.

    Such a function supports neither forward mode nor transforms of torch.func. Dynamo traces it nevertheless, to zeros.
    """
    return transforms_active() or (not torch.compiler.is_compiling() and has_tangent(values))


def check_first_only(name: str, tensor: Tensor) -> Tensor:
    """Return the input of a library's kernel, whose second derivatives raise our error instead of the library's.

    Raises:
        NotImplementedError: forward mode or torch.func.grad differentiates the tensor.
    """
    if torch.compiler.is_compiling():
        return tensor
    if beyond_first((tensor,)):
        raise refusal(name)
    return _FirstOnly.apply(tensor, name) if tensor.requires_grad and torch.is_grad_enabled() else tensor


class _FirstOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, name: str) -> Tensor:
        ctx.name = name
        ctx.save_for_backward(tensor)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if not torch.is_grad_enabled():
            return grad, None
        return _Gradients.apply(Definition(ctx.name), 1, 1, grad.detach(), grad, *ctx.saved_tensors)[0], None


class _Unpacked:
    """A ctx whose saved tensors are unpacked once, as activation checkpointing demands."""

    def __init__(self, ctx: Any) -> None:
        self._ctx, self.saved_tensors = ctx, ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def first_by_kernel(
    definition_of: Callable[[Any], Definition], backward: Callable[..., Sequence[Any]]
) -> Callable[..., Sequence[Any]]:
    """Make the gradients of an autograd function differentiable by the definition, or raise an error.

    torch's `once_differentiable` detaches the gradients from the inputs if the incoming gradient needs none itself. A
    loss has such a gradient, so its second derivatives would silently be zero.

    Args:
        definition_of: function of ctx that returns the definition and the arguments of the call. If the definition has
            no function, the inputs must be among the saved tensors.
        backward: function (ctx, *grads) of the autograd function. It returns one gradient for each argument.
    """

    @wraps(backward)
    def run(ctx: Any, *grads: Any) -> Sequence[Any]:
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        ctx = _Unpacked(ctx)
        call = definition_of(ctx)
        if call.function is not None and has_tangent((*grads, *call.arguments)):
            return _gradients(call, grads)
        with torch.no_grad():
            gradients = backward(ctx, *grads)
        if call.function is None:
            sources = [each for each in ctx.saved_tensors if isinstance(each, Tensor) and each.requires_grad]
        else:
            sources = call.tensors()
        return _Gradients.apply(call, len(grads), len(gradients), *gradients, *grads, *sources)

    return run


def _gradients(call: Definition, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The gradients of a definition in its arguments, with a graph."""
    results = [(result, grad) for result, grad in zip(call.results(), grads, strict=False) if grad is not None]
    places = [place for place, each in enumerate(call.arguments) if isinstance(each, Tensor) and each.requires_grad]
    found = torch.autograd.grad(
        [result for result, _ in results],
        [call.arguments[place] for place in places],
        [grad.to(result.dtype) for result, grad in results],
        create_graph=True,
        allow_unused=True,
    )
    gradients: list[Tensor | None] = [None] * len(call.arguments)
    for place, gradient in zip(places, found, strict=True):
        gradients[place] = gradient
    return tuple(gradients)


class _Gradients(torch.autograd.Function):
    """Passes on the gradients of a kernel. Its own backward differentiates those of the definition, or refuses."""

    @staticmethod
    def forward(
        ctx: Any, call: Definition, num_grads: int, num_gradients: int, *tensors: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        ctx.call, ctx.num_grads, ctx.num_gradients = call.without_tensors(), num_grads, num_gradients
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors[num_gradients:])
        # A backward may return one tensor twice.
        return tuple(None if each is None else each.view_as(each) for each in tensors[:num_gradients])

    @staticmethod
    def backward(ctx: Any, *gradients_grads: Tensor | None) -> tuple[Tensor | None, ...]:
        call, sources = ctx.call, ctx.saved_tensors
        if call.function is None:
            raise refusal(call.name)
        needs_grad = ctx.needs_input_grad[3 + ctx.num_gradients :]
        keep_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            # One source may depend on another. Aliases make autograd stop at each of them.
            aliases: list[Any] = [None if each is None else each.view_as(each) for each in sources]
            gradients = _gradients(call.with_tensors(aliases[ctx.num_grads :]), aliases[: ctx.num_grads])
            pairs = [
                (gradient, grad.to(gradient.dtype))
                for gradient, grad in zip(gradients, gradients_grads, strict=False)
                if gradient is not None and grad is not None and gradient.requires_grad
            ]
            places = [place for place, needed in enumerate(needs_grad) if needed]
            found = torch.autograd.grad(
                [gradient for gradient, _ in pairs],
                [aliases[place] for place in places],
                [grad for _, grad in pairs],
                create_graph=keep_graph,
                allow_unused=True,
            )
        results: list[Tensor | None] = [None] * (3 + ctx.num_gradients + len(sources))
        for place, result in zip(places, found, strict=True):
            results[3 + ctx.num_gradients + place] = result
        return tuple(results)
