"""A teacher's features of all samples of a dataset, in blocks of memory-mapped files.

    RUN/teacher/KEY/0000001024.npy      (n, 2, E) features of the samples from 1024 on, of each image and its caption

KEY is a hash of teacher, data and number format. Each file is complete or absent. So an interrupted run goes on with
the missing blocks, and another teacher or dataset never finds these. A damaged sample has NaN.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bclip_fast import distributed
from bclip_fast.errors import UserError
from bclip_fast.io.atomic import replacing
from bclip_fast.io.hashing import sha256

BLOCK = 1024
_NUM_OPEN = 1024
# np.save aligns the data to this number of bytes, behind a short description.
_HEADER_BYTES = 128


class TeacherCache:
    """The features of N samples. Nothing is written before `fill`.

    Args:
        run: run folder. With several ranks it must be on storage that all of them share.
        identity: text that differs between teachers and between datasets.
        width: number of features E.
        dtype: fp32 or fp16.
    """

    def __init__(self, run: Path, identity: str, num_samples: int, width: int, dtype: str) -> None:
        self._dtype = np.dtype({"fp32": np.float32, "fp16": np.float16}[dtype])
        self._num_samples, self._width, self._block = num_samples, width, BLOCK
        self.folder = run / "teacher" / sha256(f"{identity} {num_samples} {width} {dtype} {self._block}")[:16]
        self._open = functools.lru_cache(_NUM_OPEN)(self._map)

    @property
    def num_bytes(self) -> int:
        """Size of all files, without their headers."""
        return self._num_samples * 2 * self._width * self._dtype.itemsize

    def missing(self) -> list[int]:
        """The numbers of the blocks that must be computed."""
        return [number for number in range(-(-self._num_samples // self._block)) if not self._is_complete(number)]

    def samples_of(self, number: int) -> range:
        """The samples of a block."""
        return range(number * self._block, min((number + 1) * self._block, self._num_samples))

    def rows(self, indices: Sequence[int]) -> Tensor:
        """The features (b, 2, E) of samples, float32 on the CPU.

        Raises:
            UserError: a file is missing, or a sample could not be read when the features were computed.
        """
        features = np.empty((len(indices), 2, self._width), np.float32)
        for row, index in zip(features, indices, strict=True):
            row[:] = self._row(index)
            if np.isnan(row[0, 0]):
                raise UserError(
                    f"sample {index} was damaged when the teacher read it; delete {self._path(index // self._block)}, "
                    "and resume the run"
                )
        return torch.from_numpy(features)

    def is_damaged(self, index: int) -> bool:
        """Whether a sample has no features. Raises UserError if a file cannot be read."""
        return bool(np.isnan(self._row(index)[0, 0]))

    def _row(self, index: int) -> np.ndarray:
        number, position = divmod(index, self._block)
        try:
            row: np.ndarray = self._open(number)[position]
        except (OSError, ValueError, IndexError) as error:
            path = self._path(number)
            raise UserError(f"{path} cannot be read: {error}; delete it, and resume the run") from error
        return row

    def _map(self, number: int) -> np.ndarray:
        # np.load parses Python source, which fails in several threads at once before Python 3.11.8.
        shape = len(self.samples_of(number)), 2, self._width
        return np.memmap(self._path(number), self._dtype, "r", _HEADER_BYTES, shape)

    def fill(self, embed: Callable[[range], Tensor], is_stopped: Callable[[], bool]) -> bool:
        """Compute the missing blocks, in shares of the ranks. Return False if a signal stopped a rank. Collective.

        Args:
            embed: function from samples to their features (n, 2, E), with NaN for damaged ones.

        Raises:
            UserError: on every rank, if one of them cannot read its data, write or see the others' files.
        """
        missing = distributed.run_on_rank0(self.missing)
        num_ranks, rank = distributed.world_size(), distributed.rank()
        for start in range(0, len(missing), num_ranks):
            problem = ""
            try:
                for number in missing[start + rank : start + rank + 1]:
                    self._write(number, embed(self.samples_of(number)))
            except (OSError, UserError) as error:
                problem = str(error)
            if self._agree(problem, is_stopped()):
                return False
        lost = self.missing()
        problem = f"{self._path(lost[0])} is missing; put run on storage that all ranks share" if lost else ""
        return not self._agree(problem, False)

    def _agree(self, problem: str, is_stopped: bool) -> bool:
        """Whether a rank is stopped. Raises UserError on every rank if one of them has a problem. Collective."""
        states = distributed.all_gather_object((problem, is_stopped))
        if problems := [text for text, _ in states if text]:
            raise UserError(f"the teacher's features cannot be kept: {problems[0]}")
        return any(stopped for _, stopped in states)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number * self._block:010d}.npy"

    def _is_complete(self, number: int) -> bool:
        path, count = self._path(number), len(self.samples_of(number))
        size = _HEADER_BYTES + count * 2 * self._width * self._dtype.itemsize
        return path.is_file() and path.stat().st_size == size

    def _write(self, number: int, features: Tensor) -> None:
        with replacing(self._path(number), sync=True) as partial, partial.open("wb") as file:
            np.save(file, features.cpu().numpy().astype(self._dtype))
