"""The store of a batch's micro-batches between the two passes of GradCache."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from bclip_fast.data.batch import Batch
from bclip_fast.errors import UserError

# Stands for a tensor that is in the file.
_EMPTY = torch.empty(0)


class SpillBuffer:
    """Keeps micro-batches in memory up to a limit, and the rest in an unnamed temporary file.

    Args:
        limit: bytes of images and token ids in memory, on the host or on the GPU where they are.
        folder: folder of the file. If empty, the system's folder for temporary files.
    """

    def __init__(self, limit: int, folder: str = "") -> None:
        self._limit, self._folder = limit, folder
        self._file: Any = None
        self.clear()

    def clear(self) -> None:
        """Forget all micro-batches. The next ones overwrite the file."""
        self._num_bytes_in_memory = self._num_bytes_in_file = 0

    def add(self, batch: Batch) -> Callable[[], Batch]:
        """Keep a micro-batch, and return a function that returns it.

        Raises:
            UserError: the file cannot be written.
        """
        tensors = batch.images, batch.ids
        size, start = sum(tensor.nbytes for tensor in tensors), self._num_bytes_in_file
        if self._num_bytes_in_memory + size <= self._limit:
            self._num_bytes_in_memory += size
            return lambda: batch
        self._num_bytes_in_file += size
        try:
            if self._file is None:
                # The file lives as long as the buffer.
                self._file = tempfile.TemporaryFile(prefix="bclip-", dir=self._folder or None)  # noqa: SIM115
            self._file.seek(start)
            for tensor in tensors:
                # The images may be on a GPU. DaliLoader puts only those of undivided batches there.
                self._file.write(tensor.cpu().numpy().data)
            # Flush here, where the error message names the full disk, and not in a later seek.
            self._file.flush()
        except OSError as error:
            raise UserError(
                f"cannot write the images of a batch to {self._folder or tempfile.gettempdir()}: {error}; choose "
                f"another data.spool_dir, or raise data.spool_above_mib to keep more in memory"
            ) from error
        images, ids = (tensor.shape for tensor in tensors)
        # Page-locked memory, if the batch came in it: its next copy to the GPU must not wait either.
        pin = any(tensor.is_cuda or tensor.is_pinned() for tensor in tensors)
        return partial(self._read, start, images, ids, pin, replace(batch, images=_EMPTY, ids=_EMPTY))

    def _read(self, start: int, images: torch.Size, ids: torch.Size, pin: bool, rest: Batch) -> Batch:
        batch = replace(
            rest,
            images=torch.empty(images, dtype=torch.uint8, pin_memory=pin),
            ids=torch.empty(ids, dtype=torch.int64, pin_memory=pin),
        )
        self._file.seek(start)
        for tensor in (batch.images, batch.ids):
            if self._file.readinto(tensor.numpy().data.cast("B")) != tensor.nbytes:
                raise UserError("another program truncated the temporary file that holds the images of a batch")
        return batch
