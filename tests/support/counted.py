"""Counts what the host code of the GPU backends asks of a device, without one.

Tensors on the device "meta" have shapes and no memory. The operators' host code runs on them as on a GPU. Our kernels
do nothing, and each launch counts as one operator.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bclip_fast.ops import dispatch
from bclip_fast.ops.contrastive import LIMITS, clip_op, cuda, siglip_op

aten = torch.ops.aten
# Operators whose results depend on the values of a tensor, which a meta tensor lacks: functions that return results of
# a plausible shape. Every value that the host reads is 1.
_BY_VALUE: dict[Any, Callable[..., Any]] = {
    aten._unique2.default: lambda x, *_: (x, x, x.new_empty(0)),
    aten.bincount.default: lambda x, weights=None, minlength=0: x.new_empty(minlength),
    aten.segment_reduce.default: lambda data, *_, lengths, **__: data.new_empty(len(lengths), *data.shape[1:]),
    aten._local_scalar_dense.default: lambda x: 1,
    # torch 2.13's own function for meta tensors raises a TypeError.
    aten.baddbmm.dtype_out: lambda total, left, right, dtype, *, out, **_: out,
}
# The registered operators, whose fake functions would otherwise stand in for the host code on meta tensors.
_OURS = {
    clip_op.clip_loss: clip_op._forward,
    clip_op.clip_loss_backward: clip_op._backward,
    siglip_op.siglip_loss: siglip_op._forward,
}
_COPIES = aten._to_copy, aten.to
_ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")


@dataclass(frozen=True)
class Operation:
    """An operator that ran, with the sizes of the tensors that it reads and writes in bytes, by shape."""

    name: str
    is_view: bool
    allocates: bool
    read: tuple[tuple[tuple[int, ...], int], ...]
    written: tuple[tuple[tuple[int, ...], int], ...]


class Watch(TorchDispatchMode):
    """Records every operator inside the block, views included. `operations` has them in order."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []

    @property
    def launches(self) -> list[Operation]:
        """The operators that run a kernel: neither views nor allocations."""
        return [each for each in self.operations if not each.is_view and not each.allocates]

    def arguments(self, *args: Any) -> None:
        """Called with the arguments of each kernel of Triton. A test may replace it."""

    @property
    def names(self) -> Counter[str]:
        """How often each operator ran."""
        return Counter(operation.name for operation in self.operations)

    def launched(self, name: str) -> None:
        """Count the launch of one of our kernels."""
        self.operations.append(Operation(name, False, False, (), ()))

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in _OURS:
            with self:
                return _OURS[function](*args, **kwargs)
        # Operators that are made of others. Below autograd, torch passes them on whole.
        with self:
            results = function.decompose(*args, **kwargs)
        if results is not NotImplemented:
            return results
        on_meta = any(isinstance(x, Tensor) and x.is_meta for x in tree_leaves((args, kwargs)))
        if on_meta and function in _BY_VALUE:
            results = _BY_VALUE[function](*args, **kwargs)
        elif on_meta and function.overloadpacket in _COPIES and _on_cpu((args, kwargs)):
            results = torch.ones(args[0].shape, dtype=args[0].dtype, device="cpu")
        else:
            results = function(*args, **kwargs)
        allocates = function.__name__.split(".")[0] in _ALLOCATIONS
        read = [] if allocates else list(args)
        if kwargs.get("beta") == 0:
            read = read[1:]
        operation = Operation(str(function), function.is_view, allocates, _sizes(read), _sizes(results))
        self.operations.append(operation)
        return results


def _sizes(values: Any) -> tuple[tuple[tuple[int, ...], int], ...]:
    tensors = (value for value in tree_leaves(values) if isinstance(value, Tensor))
    return tuple((tuple(tensor.shape), tensor.numel() * tensor.element_size()) for tensor in tensors)


def _on_cpu(arguments: Any) -> bool:
    return torch.device("cpu") in (value for value in tree_leaves(arguments) if isinstance(value, torch.device))


class _Launcher:
    """Stands for a kernel of Triton, which is launched as kernel[grid](...)."""

    def __init__(self, name: str, watch: Watch) -> None:
        self.name, self.watch = name, watch

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            self.watch.launched(self.name)
            self.watch.arguments(*args)

        return launch


def watched_losses(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """A `Watch`. The backends `cuda` and `triton` of the losses run on meta tensors, with kernels that do nothing."""
    watch = Watch()
    for name in ("cuda", "triton"):
        monkeypatch.setitem(LIMITS, name, lambda *_: None)
        monkeypatch.delitem(dispatch.MISSING, name, raising=False)
    launches = {name: lambda *_, name=name: watch.launched(name) for name in ("forward", "softmax", "sigmoid")}
    module = SimpleNamespace(
        CONTRASTIVE_TILE=128,
        **{f"contrastive_{name}": launch for name, launch in launches.items()},
        **{name: lambda *_: None for name in ("Features", "Normalizers", "Groups", "GradientTile")},
    )
    monkeypatch.setattr(cuda, "cuda_module", lambda: module)
    for file in ("triton_kernels", "triton_tma_kernels", "triton_tma_gradients"):
        kernels = pytest.importorskip(f"bclip_fast.ops.contrastive.{file}")
        for name in ("_forward_kernel", "_redo_kernel", "_backward_kernel", "_siglip_kernel"):
            if hasattr(kernels, name):
                monkeypatch.setattr(kernels, name, _Launcher(name, watch))
    return watch
