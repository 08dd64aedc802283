"""Local copies of remote shards. Processes share them, their names are hashes, and their total size is bounded."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from bclip_fast.errors import UserError
from bclip_fast.io import system
from bclip_fast.io.atomic import replacing

from .storage import MAX_OPEN_FILES, FileDescriptor, LocalStorage, ReadConfig, ReadError, RemoteStorage

_PIECE = 8 << 20


class CachedStorage(LocalStorage):
    """Reads shards from copies in `config.cache_dir`. The first read of a shard downloads all of it.

    The name of a copy is its SHA-256, so datasets can share the folder, and a rebuilt dataset uses no old copies.
    One process downloads a copy while others wait for it. The copy appears atomically, and only if its hash is right.
    If the copies would exceed `config.cache_gib`, the least recently opened ones are removed. A process that has one
    open can still read it.

    Args:
        source: storage of the shards.
        shards: size in bytes and SHA-256 in hexadecimal of each file, by name.
    """

    remote = True

    def __init__(self, source: RemoteStorage, shards: Mapping[str, tuple[int, str]], config: ReadConfig) -> None:
        self.source = source
        self.shards = shards
        self._limit = int(config.cache_gib * (1 << 30))
        if (largest := max(size for size, _ in shards.values())) > self._limit:
            raise UserError(
                f"cache_gib={config.cache_gib} is too small: a shard of {source.root} has {largest / (1 << 30):.3g} GiB"
            )
        super().__init__(Path(config.cache_dir), config)
        self.root.mkdir(parents=True, exist_ok=True)

    def _make_cache(self) -> None:
        self._file = functools.lru_cache(MAX_OPEN_FILES)(lambda name: FileDescriptor(self._copy(name)))

    def __getstate__(self) -> dict[str, object]:
        return {"source": self.source, "shards": self.shards, "config": self.config}

    def path(self, name: str) -> str:
        """Return the file's URL."""
        return self.source.path(name)

    def read_again(self, name: str, start: int, end: int) -> bytes:
        """Read from the URL: the copy is damaged."""
        return self.source.read(name, start, end)

    def _read_all(self, name: str) -> bytes:
        return self.source._read_all(name)

    def _is_final(self, error: Exception) -> bool:
        # Another process may remove a copy just before this one opens it. A file that the source lacks is a ReadError.
        return not isinstance(error, FileNotFoundError) and super()._is_final(error)

    def _copy(self, name: str) -> Path:
        """Return the path of the copy. Download it if necessary."""
        size, digest = self.shards[name]
        path = self.root / f"{digest}.tar"
        if not path.exists():
            # The death of its holder releases this lock. Each thread has its own descriptor.
            with (self.root / f"{digest}.lock").open("w") as lock:
                system.lock(lock)
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
                raise ReadError(f"{self.path(name)}: its SHA-256 differs from dataset.json; copy it to the URL again")

    def _make_room(self, size: int) -> None:
        with (self.root / "room.lock").open("w") as lock:
            system.lock(lock)
            copies = sorted((path.stat().st_mtime, path.stat().st_size, path) for path in self.root.glob("*.tar"))
            total = size + sum(entry[1] for entry in copies)
            for _, freed, path in copies:
                if total <= self._limit:
                    return
                try:
                    path.unlink()
                except PermissionError:  # Windows, and a process has the copy open
                    continue
                total -= freed
