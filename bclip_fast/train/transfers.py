"""Copies between host and device that run behind the device's other work, so that the host need not wait."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bclip_fast.model.packed import Packed


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on the device, for which the host doesn't wait. A GPU copies without a wait only from pinned memory."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def packed_to_device(text: Packed, device: torch.device) -> Packed:
    """`to_device` for packed captions."""
    return Packed(to_device(text.ids, device), to_device(text.cu_seqlens, device), text.max_seqlen)


class AsyncRead:
    """Scalars of a device on their way to the host, in one copy.

    The constructor queues the copy behind the kernels that compute the scalars, and doesn't wait for it. `numbers()`
    waits for it. By then the device should have other work in its queue.

    Args:
        scalars: tensors of one element on one device.
    """

    def __init__(self, scalars: Sequence[Tensor]) -> None:
        values = torch.stack([scalar.detach().reshape(()).double() for scalar in scalars])
        self._event: Any = None
        if values.device.type == "cuda":
            # A copy to memory that is not pinned would wait for the device.
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._values = values

    def numbers(self) -> list[float]:
        """The scalars, exact in float64. Wait for the copy."""
        if self._event is not None:
            self._event.synchronize()
        return self._values.tolist()

    def is_complete(self, timeout_s: float) -> bool:
        """Whether the copy ends within `timeout_s` seconds. A device that is stuck in a collective never ends it."""
        deadline = time.monotonic() + timeout_s
        while self._event is not None and not self._event.query():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True
