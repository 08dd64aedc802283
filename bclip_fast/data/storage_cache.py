"""Copies of remote shards in a local folder: bounded, shared by processes, named by content."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from bclip_fast.errors import UserError
from bclip_fast.io.atomic import replacing

from .storage import MAX_OPEN_FILES, Descriptor, LocalFiles, ReadConfig, ReadError, RemoteFiles

_PIECE = 8 << 20


class CachedFiles(LocalFiles):
    """Reads a shard from its copy in `config.cache_dir`, which the first read of it downloads whole.

    A copy is called by its SHA-256, so that datasets share the folder and a rebuilt one finds none of the old. It is
    downloaded by one process while others wait for it, appears whole or not at all, and only if its hash is right.
    Where copies would exceed `config.cache_gib`, those opened least recently are removed; who has one open keeps it.

    Args:
        source: where the shards are.
        shards: file name -> (size in bytes, SHA-256 in hexadecimal).
    """

    remote = True

    def __init__(self, source: RemoteFiles, shards: Mapping[str, tuple[int, str]], config: ReadConfig) -> None:
        self.source = source
        self.shards = shards
        self._limit = int(config.cache_gib * (1 << 30))
        if (largest := max(size for size, _ in shards.values())) > self._limit:
            raise UserError(f"cache_gib={config.cache_gib}: a shard of {source.root} has {largest / (1 << 30):.3g} GiB")
        super().__init__(Path(config.cache_dir), config)
        self.root.mkdir(parents=True, exist_ok=True)

    def _make_cache(self) -> None:
        self._file = functools.lru_cache(MAX_OPEN_FILES)(lambda name: Descriptor(self._copy(name)))

    def __getstate__(self) -> dict[str, object]:
        return {"source": self.source, "shards": self.shards, "config": self.config}

    def path(self, name: str) -> str:
        return self.source.path(name)

    def _whole(self, name: str) -> bytes:
        return self.source._whole(name)

    def _is_final(self, error: Exception) -> bool:
        # A copy that another process removed just before it was opened; where the source has none is a ReadError.
        return not isinstance(error, FileNotFoundError) and super()._is_final(error)

    def _copy(self, name: str) -> Path:
        """The copy, downloaded if it isn't there."""
        size, digest = self.shards[name]
        path = self.root / f"{digest}.tar"
        if not path.exists():
            # A lock that its holder's death releases; each thread has a descriptor of its own.
            with (self.root / f"{digest}.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not path.exists():
                    self._download(name, path, size, digest)
        os.utime(path)
        return path

    def _download(self, name: str, path: Path, size: int, digest: str) -> None:
        self._make_room(size)
        actual = hashlib.sha256()
        with replacing(path) as partial:
            with partial.open("wb") as file:
                for start in range(0, size, _PIECE):
                    piece = self.source.read(name, start, min(start + _PIECE, size))
                    actual.update(piece)
                    file.write(piece)
            if actual.hexdigest() != digest:
                raise ReadError(f"{self.path(name)}: its SHA-256 is not that of dataset.json; copy it again")

    def _make_room(self, size: int) -> None:
        with (self.root / "room.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            copies = sorted((path.stat().st_mtime, path.stat().st_size, path) for path in self.root.glob("*.tar"))
            total = size + sum(entry[1] for entry in copies)
            for _, freed, path in copies:
                if total <= self._limit:
                    return
                path.unlink()
                total -= freed
