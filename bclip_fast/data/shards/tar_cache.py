"""Indexes of tar files in WebDataset's layout, in the user's cache.

Each tar file has one file in BCLIP_CACHE/shards, by default ~/.cache/bclip_fast/shards. It records the
size and the time of the tar file, or the ETag of a URL, and is valid while they are the same. One process makes it
while others wait, and it appears atomically.
"""

from __future__ import annotations

import json
import logging
import os
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from bclip_fast.data.storage import LocalStorage, Storage
from bclip_fast.errors import UserError
from bclip_fast.io import system
from bclip_fast.io.atomic import replacing
from bclip_fast.io.hashing import sha256
from bclip_fast.io.progress import track

from .tar_index import INDEX_VERSION, TarIndex, index_tar

log = logging.getLogger(__name__)

_ARRAYS = ("key_text", "key_ends", "offsets", "sizes", "checksums", "caption_bytes", "is_json")
# Each thread holds one image, of at most MAX_BYTES.
_NUM_THREADS = 4


def _checksum(arrays: dict[str, np.ndarray]) -> int:
    checksum = 0
    for name in _ARRAYS:
        checksum = zlib.crc32(np.ascontiguousarray(arrays[name]).view(np.uint8).data, checksum)
    return checksum


def cache_folder() -> Path:
    """Return the folder of the indexes. Raises UserError if this user has no home folder."""
    try:
        return Path(os.environ.get("BCLIP_CACHE") or Path.home() / ".cache" / "bclip_fast") / "shards"
    except RuntimeError as error:
        raise UserError(f"the index of tar files has no place: {error}; set BCLIP_CACHE to a folder") from None


class IndexFile:
    """The index of one tar file.

    Args:
        name: name of the tar file in the storage.
        caption_key: as in `index_tar`.
    """

    def __init__(self, storage: Storage, name: str, caption_key: str) -> None:
        self.name, self.caption_key = name, caption_key
        path = Path(storage.path(name)).resolve() if isinstance(storage, LocalStorage) else storage.path(name)
        self.path = cache_folder() / f"{sha256(f'{INDEX_VERSION} {caption_key!r} {path}')[:40]}.safetensors"
        try:
            self.stamp: dict[str, Any] = storage.stamp(name)
        except FileNotFoundError:
            raise UserError(f"{storage.path(name)} does not exist; check the path") from None

    def read(self) -> TarIndex | None:
        """Return the index, or None if it is missing, damaged, or of another state of the tar file."""
        # np.load parses Python source, which fails in several threads at once before Python 3.11.8.
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path, "np") as file:
                facts = json.loads(file.metadata()["facts"])
                if facts.pop("stamp") != self.stamp:
                    return None
                arrays = {name: file.get_tensor(name) for name in _ARRAYS}
            if facts.pop("checksum") != _checksum(arrays):
                return None
            facts["reasons"] = {int(position): reason for position, reason in facts["reasons"].items()}
            facts["left_out"] = {reason: (count, first) for reason, (count, first) in facts["left_out"].items()}
            return TarIndex(**facts, **arrays)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError):
            return None

    def write(self, index: TarIndex) -> None:
        """Write the index. Raises OSError."""
        from safetensors.numpy import save

        facts = {name: value for name, value in vars(index).items() if name not in _ARRAYS}
        arrays = {name: np.ascontiguousarray(getattr(index, name)) for name in _ARRAYS}
        text = json.dumps({**facts, "stamp": self.stamp, "checksum": _checksum(arrays)})
        with replacing(self.path) as partial:
            partial.write_bytes(save(arrays, {"facts": text}))

    def make(self, storage: Storage, *, wait: bool) -> bool:
        """Make the index if it is missing. Return False if another process makes it and `wait` is False."""
        with self.path.with_suffix(".lock").open("w") as lock:
            try:
                # The death of its holder releases this lock. Each thread has its own descriptor.
                system.lock(lock, wait=wait)
            except BlockingIOError:
                return False
            if self.read() is None:
                self.write(index_tar(storage, self.name, self.stamp["bytes"], self.caption_key))
        return True


def indexes(storage: Storage, names: Sequence[str], caption_key: str) -> list[tuple[IndexFile, TarIndex]]:
    """Return the index of each tar file, and make those that are missing.

    Raises:
        UserError: a tar file can't be read, or the cache can't be written.
    """
    with ThreadPoolExecutor(storage.config.connections if storage.remote else _NUM_THREADS) as pool:
        files = list(pool.map(lambda name: IndexFile(storage, name, caption_key), names))
        ready = list(pool.map(IndexFile.read, files))
    missing = [file for file, index in zip(files, ready, strict=True) if index is None]
    if missing:
        _make(storage, missing)
        made = {file.name: file.read() for file in missing}
        ready = [made.get(file.name) if index is None else index for file, index in zip(files, ready, strict=True)]
    result = []
    for file, index in zip(files, ready, strict=True):
        if index is None:
            raise UserError(f"{storage.path(file.name)} changed while it was read; start again")
        result.append((file, index))
    return result


def _make(storage: Storage, files: Sequence[IndexFile]) -> None:
    """Make missing indexes. Several processes take different files first, and then wait for one another."""
    folder = cache_folder()
    log.info("indexing %d tar file(s) of %s once; the indexes go to %s", len(files), storage.root, folder)  # type: ignore[attr-defined]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with track("tar files", len(files), show=os.isatty(2), transient=True) as advance:

            def make(wait: bool) -> Callable[[IndexFile], bool]:
                def one(file: IndexFile) -> bool:
                    is_made = file.make(storage, wait=wait)
                    advance(int(is_made))
                    return is_made

                return one

            with ThreadPoolExecutor(min(_NUM_THREADS, system.num_cores())) as pool:
                done = list(pool.map(make(False), files))
                waiting = [file for file, is_made in zip(files, done, strict=True) if not is_made]
                list(pool.map(make(True), waiting))
    except OSError as error:
        raise UserError(
            f"the index of {storage.root} cannot be written to {folder}: {error.strerror or error}; "  # type: ignore[attr-defined]
            "set BCLIP_CACHE to a folder that you can write"
        ) from error
