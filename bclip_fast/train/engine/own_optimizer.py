"""Optimisers of the user's own: what a class keeps and needs, which a step of small parameters shows."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bclip_fast.errors import UserError
from bclip_fast.train.schedule import OptimConfig

# Shapes and number of steps of the trial.
_MATRIX, _VECTOR, _STEPS = (4, 6), (5,), 3


@dataclass(frozen=True)
class Traits:
    """Properties of an optimiser class.

    moments: names of the states that have the shape of the matrix or the vector that they belong to.
    num_moments: number of the matrix's states of its shape.
    numbers: types of the states that are Python numbers, by name.
    is_elementwise: whether an element's update depends on no other element. ZeRO 1 to 3 needs it, because a shard of
        several parameters is one vector.
    """

    moments: tuple[str, ...]
    num_moments: int
    numbers: dict[str, type]
    is_elementwise: bool


def import_optimizer(name: str) -> type[torch.optim.Optimizer]:
    """The class `module:Class`.

    Raises:
        UserError: it cannot be imported, or is not an optimiser.
    """
    module, _, attribute = name.partition(":")
    try:
        own = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"optim.name={name} cannot be imported: {error}; set PYTHONPATH to its folder") from error
    if not (isinstance(own, type) and issubclass(own, torch.optim.Optimizer)):
        raise UserError(f"optim.name={name} must be a class derived from torch.optim.Optimizer")
    return own


def options_of(own: type[torch.optim.Optimizer], optim: OptimConfig) -> dict[str, Any]:
    """The arguments of the class after the groups: lr, and two betas and one eps if the class takes them."""
    taken = inspect.signature(own).parameters
    options: dict[str, Any] = {"lr": optim.lr}
    if "betas" in taken and len(tuple(taken["betas"].default)) == 2:
        options["betas"] = optim.beta1, optim.beta2
    if "eps" in taken and isinstance(taken["eps"].default, float):
        options["eps"] = optim.eps
    return options


def traits_of(own: type[torch.optim.Optimizer], optim: OptimConfig) -> Traits:
    """Try the class on a matrix and a vector, and on two shards of both.

    Raises:
        UserError: the class fails, ignores the weight decay, or keeps a state that a checkpoint cannot hold.
    """
    name = optim.name

    def make(parameters: list[Tensor]) -> torch.optim.Optimizer:
        group = {"params": parameters, "weight_decay": optim.weight_decay}
        return own([group], **options_of(own, optim))

    try:
        with torch.random.fork_rng():
            whole, optimizer, groups = _run(make, split=False)
            shards, _, _ = _run(make, split=True)
    except Exception as error:
        first = str(error).partition("\n")[0]
        raise UserError(
            f"optim.name={name} fails in a step of a {_MATRIX[0]} x {_MATRIX[1]} matrix: {type(error).__name__}: "
            f"{first}"
        ) from error
    if optim.weight_decay and "weight_decay" not in optimizer.defaults:
        raise UserError(
            f"optim.name={name} has no weight_decay, but optim.weight_decay={optim.weight_decay}; set it to 0"
        )
    if groups:
        raise UserError(
            f"optim.name={name} keeps {groups[0]} in its parameter groups, which a checkpoint does not hold; keep "
            "it in the state of the parameters"
        )
    shaped: list[list[str]] = []
    numbers: dict[str, type] = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if not isinstance(value, Tensor | bool | int | float | None):
                raise UserError(
                    f"optim.name={name} keeps a {type(value).__name__} named {key}, which a checkpoint cannot hold; "
                    "keep tensors and numbers"
                )
            if isinstance(value, bool | int | float):
                numbers[key] = type(value)
        shaped.append([key for key, value in state.items() if getattr(value, "shape", None) == parameter.shape])
    moments = tuple(dict.fromkeys(key for keys in shaped for key in keys))
    is_elementwise = torch.allclose(whole, shards, rtol=1e-5, atol=1e-5 * optim.lr)
    return Traits(moments, len(shaped[0]) if shaped else 0, numbers, is_elementwise)


def _run(
    make: Callable[[list[Tensor]], torch.optim.Optimizer], split: bool
) -> tuple[Tensor, torch.optim.Optimizer, list[str]]:
    """The updated parameters as one vector, the optimiser, and the names of values that changed in its groups."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    shapes = (torch.Size(_MATRIX), torch.Size(_VECTOR))
    count = sum(shape.numel() for shape in shapes)
    start = torch.randn(count, generator=generator, device="cpu")
    # Gradients of different sizes, because a norm of the whole would else look like an element's.
    scale = torch.logspace(-2, 1, count, device="cpu")
    sizes = [count // 2, count - count // 2] if split else [shape.numel() for shape in shapes]
    parameters = [
        part.clone().view(-1 if split else shape).requires_grad_()
        for part, shape in zip(start.split(sizes), shapes, strict=True)
    ]
    optimizers = [make([part]) for part in parameters] if split else [make(parameters)]
    before = [_settings(optimizer) for optimizer in optimizers]
    for _ in range(_STEPS):
        grad = scale * torch.randn(count, generator=generator, device="cpu")
        for part, values in zip(parameters, grad.split(sizes), strict=True):
            part.grad = values.view_as(part).clone()
        for optimizer in optimizers:
            optimizer.step()
    after = _settings(optimizers[0])
    changed = [key for key, value in after.items() if before[0].get(key) != value]
    return torch.cat([part.detach().flatten() for part in parameters]), optimizers[0], changed


def _settings(optimizer: torch.optim.Optimizer) -> dict[str, str]:
    return {key: repr(value) for key, value in optimizer.param_groups[0].items() if key != "params"}
