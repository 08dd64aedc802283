"""Embeddings on disk, under the key of `embedding_key`. A spot check confirms kept ones before they are used.

An entry is a file KEY.safetensors with the tensor `embeddings`. Its metadata have the SHA-256 of the tensor, and the
rows of the spot check. The cache only saves time: a folder that cannot be read or written is a warning.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bclip_fast.errors import first_line
from bclip_fast.io.atomic import replacing
from bclip_fast.io.hashing import sha256

from . import spot_check

log = logging.getLogger(__name__)

FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def default_folder() -> Path | None:
    """Return BCLIP_CACHE, or ~/.cache/bclip_fast/embeddings if it is not set. Without a home folder, return None."""
    try:
        return Path(os.environ.get("BCLIP_CACHE") or Path.home() / ".cache" / "bclip_fast" / "embeddings")
    except RuntimeError as error:
        log.warning("embeddings are not kept: %s; --cache names a folder", error)
        return None


@dataclass(frozen=True)
class Computation:
    """How a set of embeddings is computed, and checked once it was kept.

    num: number of samples.
    all_rows: computes all embeddings (num, D), and their kinds for the spot check.
    some_rows: computes the embeddings of some samples, float32 of unit norm.
    name: returns the name of a sample for messages.
    dtype: dtype of kept embeddings.
    tolerance: largest distance that rounding explains.
    """

    num: int
    all_rows: Callable[[], tuple[Tensor, Sequence[spot_check.Kind]]]
    some_rows: Callable[[list[int]], Tensor]
    name: Callable[[int], str]
    dtype: torch.dtype
    tolerance: float


class EmbeddingCache:
    """A folder of `KEY.safetensors` files. Without a folder, the cache stores nothing."""

    def __init__(self, folder: Path | None) -> None:
        """folder: created by the first entry. None: no cache."""
        self.folder = folder
        self._is_writable = True

    def get_or_compute(self, parts: Sequence[str], computation: Computation) -> Tensor:
        """Return the embeddings under the key `parts`: those of the cache, or else compute and keep them.

        Returns a CPU tensor of `computation.dtype`. If kept embeddings are damaged or fail the spot check, a warning
        says so, and they are computed again.
        """
        if self.folder is None:
            return computation.all_rows()[0].to("cpu", computation.dtype)
        path = self.folder / f"{sha256(chr(0).join(parts))}.safetensors"
        kept = _read(path, computation)
        if kept is not None:
            log.info("embeddings from %s", path)
            return kept
        rows, kinds = computation.all_rows()
        embeddings = rows.to("cpu", computation.dtype).contiguous()
        spots = spot_check.choose(kinds, embeddings.isfinite().all(1).nonzero().ravel().tolist())
        self._write(path, embeddings, spots)
        return embeddings

    def _write(self, path: Path, embeddings: Tensor, spots: list[int]) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        metadata = {"sha256": _checksum(embeddings), "spots": " ".join(map(str, spots))}
        try:
            with replacing(path) as partial:
                save_file({"embeddings": embeddings}, partial, metadata)
        except (OSError, SafetensorError) as error:
            if self._is_writable:
                log.warning(
                    "cannot keep embeddings in %s: %s; the evaluation goes on without (--cache names another folder)",
                    self.folder,
                    first_line(error),
                )
            self._is_writable = False


def _read(path: Path, computation: Computation) -> Tensor | None:
    """Return the embeddings of an entry. If it is missing, damaged or refuted by the spot check, return None."""
    from safetensors import SafetensorError, safe_open

    try:
        if not path.is_file():
            return None
        with safe_open(path, "pt") as file:
            metadata, kept = file.metadata() or {}, file.get_tensor("embeddings")
        spots = [int(row) for row in metadata["spots"].split()]
        if kept.dtype != computation.dtype or kept.ndim != 2 or len(kept) != computation.num:
            raise ValueError(f"{kept.dtype} {tuple(kept.shape)} is another set")
        if metadata["sha256"] != _checksum(kept):
            raise ValueError("its checksum is wrong")
        if not all(0 <= row < len(kept) for row in spots):
            raise ValueError("the rows of its spot check are wrong")
    except (SafetensorError, OSError, LookupError, ValueError) as error:
        log.warning("%s is damaged (%s); computing it again", path, first_line(error))
        return None
    if spots:
        expected = computation.some_rows(spots).cpu()
        actual = F.normalize(kept[spots].float(), dim=1)
        distance, worst = (torch.inf, 0)
        if expected.shape == actual.shape:
            distance, worst = spot_check.largest_distance(expected, actual)
        if distance > computation.tolerance:
            log.warning(
                "%s does not hold what the model computes now (%s differs by %.2g); computing all %d embeddings again",
                path,
                computation.name(spots[worst]),
                distance,
                computation.num,
            )
            return None
    return kept


def _checksum(embeddings: Tensor) -> str:
    return sha256(embeddings.contiguous().view(-1).view(torch.uint8).numpy())
