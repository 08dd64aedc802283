"""Checks that the results of our operators share no memory, as torch demands of registered operators."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


def check_every_operator() -> None:
    """Let each operator that is registered as bclip::* from now on check its results in every call."""
    register = torch.library.Library.impl

    def impl(
        library: torch.library.Library, name: str, function: Callable[..., Any], *rest: Any, **options: Any
    ) -> Any:
        checked = checked_results(name, function) if library.ns == "bclip" else function
        return register(library, name, checked, *rest, **options)

    torch.library.Library.impl = impl


def checked_results(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which raises AssertionError if a result shares memory with an argument or another result."""

    @wraps(function)
    def run(*args: Any) -> Any:
        results = function(*args)
        owners = {_storage(value): "an argument" for value in args if isinstance(value, Tensor)}
        for place, result in enumerate(tree_leaves(results)):
            assert _storage(result) not in owners, (
                f"result {place} of bclip::{name} shares memory with {owners[_storage(result)]}: "
                "torch.compile raises an error or computes wrong values"
            )
            owners[_storage(result)] = f"result {place}"
        return results

    return run


def _storage(tensor: Tensor) -> int:
    # The wrappers of torch.func's transforms have no storage.
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor.untyped_storage()._cdata
