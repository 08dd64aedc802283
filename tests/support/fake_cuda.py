"""A simulated GPU: the host code runs as on CUDA, with real numbers, on a machine without a GPU.

A tensor on the simulated GPU is a `DeviceTensor`. Python sees a tensor on cuda:0, but its numbers are in the tensor
`memory` on the CPU, and every operator computes there. Within `fake_cuda()`, torch creates such tensors for
device="cuda:0", and the returned `FakeCuda` records each transfer:

- "read": the host reads a number from the device (`item`, `tolist`, `if tensor`), or needs one for the shape of an
  operator's result (`nonzero`). It waits for all queued work.
- "to host", "to device": a copy. The host waits for it.
- "async to host", "async to device": a copy from or to pinned memory. The host doesn't wait.
- "wait": the host waits for an event, a stream or the device.

Each transfer has a stream: "default", or the number of another one. A `DeviceTensor` has the stream of its allocation,
and the streams of its `record_stream` calls. Another thread must enter the `FakeCuda` itself.

Operators with tensors of both devices raise RuntimeError, except for those that CUDA accepts. An asynchronous copy to
the host only happens when the host waits for a later event. Until then, the destination holds NaN.

torch's C++ code sees CPU tensors, so autocast and GradScaler for CUDA are not simulated.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from device_tensors import (
    CPU,
    CUDA,
    DEFAULT_STREAM,
    RUNNING,
    THREAD,
    DeviceTensor,
    FakeCuda,
    Stream,
    Transfer,
    active,
    current_stream,
)
from torch import Tensor
from torch.utils import _foreach_utils

__all__ = ["CPU", "CUDA", "DEFAULT_STREAM", "DeviceTensor", "FakeCuda", "Transfer", "fake_cuda"]


@contextlib.contextmanager
def _stream(stream: Stream) -> Iterator[None]:
    """torch.cuda.stream."""
    before, THREAD.stream = current_stream(), stream
    try:
        yield
    finally:
        THREAD.stream = before


class _Event:
    """torch.cuda.Event."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.enable_timing = enable_timing

    def record(self, stream: Any = None) -> None:
        """Do nothing, because the queue is in order already."""

    def query(self) -> bool:
        """Return whether the device has passed the event. It hasn't while copies are queued."""
        return not active()._queue

    def synchronize(self) -> None:
        """Wait for the event."""
        active().wait("Event.synchronize")

    def elapsed_time(self, end: _Event) -> float:
        """Return milliseconds. torch raises an error if the device hasn't passed both events."""
        assert self.query()
        assert self.enable_timing
        return 1.0


def _groups(tensor_lists: Any, with_indices: bool = False) -> dict[Any, Any]:
    """Replace `_group_tensors_by_device_and_dtype`. Its C++ code would treat every tensor as one on the CPU."""
    groups: dict[Any, Any] = {}
    for number, first in enumerate(tensor_lists[0]):
        lists, numbers = groups.setdefault((first.device, first.dtype), ([[] for _ in tensor_lists], []))
        for items, tensors in zip(lists, tensor_lists, strict=True):
            items += tensors[number : number + 1]
        numbers.append(number)
    return groups


@contextlib.contextmanager
def fake_cuda() -> Iterator[FakeCuda]:
    """Return a context in which the simulated GPU is torch's only one."""
    fake = FakeCuda()
    empty = torch.empty

    def pinnable_empty(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        tensor = empty(*args, **kwargs)
        return fake.pin(tensor) if pin_memory else tensor

    def pinned(tensor: Tensor, *_: Any) -> Tensor:
        return tensor if fake.is_pinned(tensor) else fake.pin(tensor.clone())

    cuda: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "_lazy_init": lambda: None,
        "Event": _Event,
        "Stream": Stream,
        "stream": _stream,
        "current_stream": current_stream,
        "synchronize": lambda device=None: fake.wait("synchronize"),
        "max_memory_reserved": lambda device=None: 0,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: "simulated GPU",
        "manual_seed_all": lambda seed: None,
    }
    with contextlib.ExitStack() as stack:
        for name, value in cuda.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(torch, "empty", pinnable_empty))
        stack.enter_context(mock.patch.object(torch.Tensor, "pin_memory", pinned))
        stack.enter_context(mock.patch.object(torch.Tensor, "is_pinned", lambda tensor, *_: fake.is_pinned(tensor)))
        for module in (_foreach_utils, sys.modules["torch._C"]):
            if hasattr(module, "_group_tensors_by_device_and_dtype"):
                stack.enter_context(mock.patch.object(module, "_group_tensors_by_device_and_dtype", _groups))
        # Otherwise Module.to keeps a parameter's class and replaces its memory, which is CPU memory for C++.
        overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwrites)
        # Otherwise torch.tensor(..., device="cuda:0") copies in C++, past the mode.
        before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, before)
        RUNNING.append(fake)
        stack.callback(RUNNING.pop)
        stack.enter_context(fake)
        yield fake
