"""Parts of an index that is being made, so that a killed `bclip embed` goes on without repeating them.

A part holds the embeddings of a range of images, in a file that is complete or missing. It names the model, the data
and the settings that made it, by a hash. Ranks share the missing parts. The parts lie in OUT/.parts, which the finished
index replaces.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bclip_fast.errors import UserError, first_line
from bclip_fast.io import system
from bclip_fast.io.atomic import replacing
from bclip_fast.io.hashing import sha256

log = logging.getLogger(__name__)

FOLDER = ".parts"


class Parts:
    """The parts of one index.

    ranges: the images of each part.
    """

    def __init__(self, out: Path, identity: str, num_images: int, part_size: int) -> None:
        """out: folder of the index. identity: hash of all that decides the embeddings."""
        self.folder, self.identity = out / FOLDER, identity
        self.ranges = [range(i, min(i + part_size, num_images)) for i in range(0, num_images, part_size)]
        self._lock: int | None = None
        self._is_open = False

    def open(self) -> list[int]:
        """Create and lock the folder, check its parts and delete those that do not belong to this index.

        Returns the numbers of the missing parts. Call it on rank 0 only, before any rank writes.

        Raises:
            UserError: another process writes this index.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if system.HAS_FOLDER_DESCRIPTORS:
            self._lock = os.open(self.folder, os.O_RDONLY)
            try:
                system.lock(self._lock, wait=False)
            except BlockingIOError:
                os.close(self._lock)
                self._lock = None
                raise UserError(
                    f"another bclip embed writes {self.folder.parent}; wait for it, or choose another --out"
                ) from None
            except OSError:  # a file system without locks
                pass
        self._is_open = True
        numbers = {self._path(number).name: number for number in range(len(self.ranges))}
        complete, num_other = set(), 0
        for path in sorted(self.folder.iterdir()):
            if path.name in numbers and self._is_complete(path, numbers[path.name]):
                complete.add(numbers[path.name])
            elif path.suffix == ".safetensors":
                path.unlink()
                num_other += 1
        if num_other:
            log.warning("%s: deleted %d parts of another model, data or setting", self.folder, num_other)
        if complete:
            log.info("%d of %d parts are complete in %s", len(complete), len(self.ranges), self.folder)
        return [number for number in range(len(self.ranges)) if number not in complete]

    def close(self, *, delete: bool) -> None:
        """Unlock the folder. Delete it if it is empty, or with its parts if `delete` is set."""
        if self._is_open and (delete or not any(self.folder.iterdir())):
            shutil.rmtree(self.folder, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def write(self, number: int, embeddings: Tensor) -> None:
        """Write a part. embeddings: (n, D) float32. A skipped image has NaN."""
        from safetensors.torch import save_file

        embeddings = embeddings.float().cpu().contiguous()
        metadata = {"identity": self.identity, "sha256": _checksum(embeddings)}
        with replacing(self._path(number), sync=True) as partial:
            save_file({"embeddings": embeddings}, partial, metadata)

    def read(self, number: int) -> np.ndarray:
        """Return the embeddings of a part, float32 (n, D), with NaN for skipped images."""
        from safetensors.numpy import load_file

        return load_file(self._path(number))["embeddings"]

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield for each part the numbers of its embedded images, int64 (m,), and their embeddings, float32 (m, D)."""
        for number, images in enumerate(self.ranges):
            rows = self.read(number)
            finite = np.isfinite(rows).all(1)
            yield np.arange(images.start, images.stop)[finite], rows[finite]

    def _path(self, number: int) -> Path:
        images = self.ranges[number]
        return self.folder / f"{images.start:010d}-{images.stop:010d}.safetensors"

    def _is_complete(self, path: Path, number: int) -> bool:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                metadata, rows = file.metadata() or {}, file.get_tensor("embeddings")
        except (SafetensorError, OSError) as error:
            log.warning("%s is damaged (%s); computing it again", path, first_line(error))
            return False
        if metadata.get("identity") != self.identity:
            return False
        if len(rows) != len(self.ranges[number]) or metadata.get("sha256") != _checksum(rows):
            log.warning("%s is damaged (its checksum is wrong); computing it again", path)
            return False
        return True


def _checksum(rows: Tensor) -> str:
    return sha256(rows.contiguous().view(-1).view(torch.uint8).numpy())
