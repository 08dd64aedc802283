"""Copies between host and device that the host queues behind the device's other work and doesn't wait for."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bclip_fast.model.packed import Packed


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to the device. The host doesn't wait, since the copy to a GPU comes from pinned memory."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def packed_to_device(text: Packed, device: torch.device) -> Packed:
    """Copy packed captions to the device as `to_device` does."""
    return Packed(to_device(text.ids, device), to_device(text.cu_seqlens, device), text.max_seqlen)


class AsyncRead:
    """One asynchronous copy of scalars from a device to the host.

    The constructor queues the copy behind the kernels that compute the scalars. `numbers()` waits for the copy. Queue
    other work for the device before this call.

    Args:
        scalars: tensors of one element, all on one device.
    """

    def __init__(self, scalars: Sequence[Tensor]) -> None:
        values = torch.stack([scalar.detach().reshape(()).double() for scalar in scalars])
        self._event: Any = None
        if values.device.type == "cuda":
            # The host would wait for a copy to memory that isn't pinned.
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._values = values

    def numbers(self) -> list[float]:
        """Wait for the copy, and return the scalars. float64 holds them exactly."""
        if self._event is not None:
            self._event.synchronize()
        return self._values.tolist()

    def is_complete(self, timeout_s: float) -> bool:
        """Return whether the copy ends within `timeout_s` seconds. If a collective hangs, the copy never ends."""
        deadline = time.monotonic() + timeout_s
        while self._event is not None and not self._event.query():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True
