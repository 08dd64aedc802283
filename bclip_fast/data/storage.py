"""Where the files of a dataset are read: in a folder, or below any URL that fsspec knows (s3://, https://, ...).

A read that fails is tried again, later and later. What still fails is a ReadError that names the file: a fault of the
storage, which stops a run rather than changes what it is trained on, since a resumed run continues exactly.

A folder is read with `pread`: 1.75 times as fast as a memory map from a cold cache (2 threads, 100 kB a sample: 9,700
against 5,500 reads/s; from a warm one the map is 1.4 times as fast, at over 80,000 reads/s), and a file that shrinks is
a short read, not a signal that kills the process.
"""

from __future__ import annotations

import functools
import json
import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from bclip_fast.errors import UserError

T = TypeVar("T")

MAX_OPEN_FILES = 128
_FIRST_DELAY_S, _MAX_DELAY_S = 0.2, 10.0


class ReadError(UserError):
    """A file that could not be read, whatever was tried; the message names it."""


@dataclass(frozen=True)
class ReadConfig:
    """How hard a file is tried to be read, and how a remote one is."""

    attempts: int = 5
    """Times a read is tried, with delays of 0.2, 0.4, 0.8 ... s between, at most 10 s, each shortened at random."""
    timeout_s: float = 60.0
    """Of one attempt, where the URL's file system is asynchronous as HTTP's and S3's are."""
    connections: int = 16
    """Reads at a time from a URL."""
    max_gap_kib: int = 256
    """Ranges of a remote shard so near one another are read as one. At 50 ms a request and 16 connections, 256 of 544
    samples of 44 kB took 1.47 s one by one, 0.38 s with gaps of 64 KiB, 0.20 s with 256 KiB and twice the bytes."""
    cache_dir: str = ""
    """Folder for copies of remote shards, which are then downloaded whole; processes and runs can share it."""
    cache_gib: float = 64.0
    """What the copies may take; the least recently opened ones go first. One more a process may be on its way."""

    def __post_init__(self) -> None:
        if self.attempts < 1 or self.timeout_s <= 0 or self.connections < 1 or self.max_gap_kib < 0:
            raise UserError(
                f"attempts={self.attempts}, timeout_s={self.timeout_s}, connections={self.connections}, "
                f"max_gap_kib={self.max_gap_kib}: need at least 1, more than 0, at least 1 and 0"
            )
        if self.cache_gib <= 0:
            raise UserError(f"cache_gib={self.cache_gib}: must be more than 0")


class Files:
    """The files below a root. Safe between threads, after pickling, and after a fork.

    Attributes: `remote`: reads take a round trip, so that many at once and merged ones pay; `reading`: what threads
    read just now, by thread, as (name and bytes, since when): what a stuck one is stuck in.
    """

    remote = False

    def __init__(self, config: ReadConfig) -> None:
        self.config = config
        self.reading: dict[int, tuple[str, float]] = {}

    def path(self, name: str) -> str:
        """What messages call the file."""
        raise NotImplementedError

    def read(self, name: str, start: int, end: int) -> bytes:
        """Bytes [start, end) of a file. Raises ReadError."""
        data = self._try(name, f"bytes {start} to {end}", lambda: self._read(name, start, end))
        if len(data) != end - start:
            raise ReadError(f"{self.path(name)}: ends before byte {end} (truncated?); copy it again")
        return data

    def json(self, name: str) -> Any:
        """What a whole file says. Raises FileNotFoundError where there is none, ReadError."""
        return self._try(name, "the whole file", lambda: json.loads(self._whole(name)))

    def _read(self, name: str, start: int, end: int) -> bytes:
        raise NotImplementedError

    def _whole(self, name: str) -> bytes:
        raise NotImplementedError

    def _is_final(self, error: Exception) -> bool:
        """Another attempt would fail like this one; JSON that came over a network may have been cut on the way."""
        final = (FileNotFoundError, PermissionError, IsADirectoryError) + (() if self.remote else (ValueError,))
        return isinstance(error, final)

    def _try(self, name: str, what: str, function: Callable[[], T]) -> T:
        thread = threading.get_ident()
        for attempt in range(1, self.config.attempts + 1):
            self.reading[thread] = f"{self.path(name)}, {what}", time.monotonic()
            try:
                return function()
            except (UserError, AttributeError, TypeError, NameError):
                raise
            except Exception as error:
                if isinstance(error, FileNotFoundError) and what == "the whole file":
                    raise
                if attempt == self.config.attempts or self._is_final(error):
                    tried = f" ({attempt} attempts)" if attempt > 1 else ""
                    reason = str(error) or type(error).__name__
                    raise ReadError(f"{self.path(name)}: cannot be read, {what}: {reason}{tried}") from error
                # Ranks that fail together shall not come back together.
                time.sleep(min(_MAX_DELAY_S, _FIRST_DELAY_S * 2 ** (attempt - 1)) * random.uniform(0.5, 1.0))
            finally:
                self.reading.pop(thread, None)
        raise AssertionError


class Descriptor:
    """A file descriptor that lives as long as a reader holds it, whatever the cache forgets."""

    def __init__(self, path: Path) -> None:
        self.number = -1
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


class LocalFiles(Files):
    """Files in a folder; each read is one `pread`."""

    def __init__(self, root: Path, config: ReadConfig) -> None:
        super().__init__(config)
        self.root = root
        self._make_cache()

    def _make_cache(self) -> None:
        # lru_cache holds no lock that a fork could leave locked, and is safe between threads.
        self._file = functools.lru_cache(MAX_OPEN_FILES)(lambda name: Descriptor(self.root / name))

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "config": self.config}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def path(self, name: str) -> str:
        return str(self.root / name)

    def _read(self, name: str, start: int, end: int) -> bytes:
        try:
            # Held while it is read: the cache may drop it, and with its last reference the descriptor closes.
            file = self._file(name)
            return os.pread(file.number, end - start, start)
        except OSError:
            # A network's file system may have lost what the descriptor stood for.
            self._file.cache_clear()
            raise

    def _whole(self, name: str) -> bytes:
        return (self.root / name).read_bytes()


class RemoteFiles(Files):
    """Files below a URL, through fsspec."""

    remote = True

    def __init__(self, root: str, config: ReadConfig) -> None:
        super().__init__(config)
        self.root = root.rstrip("/")
        self._system: Any = None
        self._process = -1
        self._lock = threading.Lock()
        self._connect()

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "config": self.config}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def _connect(self) -> Any:
        """fsspec's file system; a new one in a forked process, where its threads and sockets are not."""
        if self._process == os.getpid():
            return self._system
        with self._lock:
            if self._process != os.getpid():
                try:
                    import fsspec
                except ModuleNotFoundError as error:
                    raise UserError(f"{self.root}: reading a URL needs pip install 'bclip_fast[remote]'") from error
                try:
                    self._system, self._base = fsspec.core.url_to_fs(self.root, skip_instance_cache=True)
                except (ImportError, ValueError) as error:
                    raise UserError(f"{self.root}: {error}") from error
                self._process = os.getpid()
        return self._system

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def _cat(self, name: str, **bounds: int) -> bytes:
        system = self._connect()
        # fsspec's wrapper of asynchronous systems takes the time limit itself, and cancels what exceeds it.
        limits = {"timeout": self.config.timeout_s} if system.async_impl else {}
        return system.cat_file(f"{self._base}/{name}", **bounds, **limits)

    def _read(self, name: str, start: int, end: int) -> bytes:
        data = self._cat(name, start=start, end=end)
        if len(data) > end - start:
            raise ReadError(f"{self.path(name)}: the server ignores Range requests; use another, or copy the dataset")
        if len(data) < end - start:
            raise OSError(f"{len(data)} of {end - start} bytes came (truncated?)")
        return data

    def _whole(self, name: str) -> bytes:
        return self._cat(name)

    def _is_final(self, error: Exception) -> bool:
        status = getattr(error, "status", None)
        refused = isinstance(status, int) and 400 <= status < 500 and status not in (408, 429)
        return refused or super()._is_final(error)


def open_files(root: Path | str, config: ReadConfig | None = None) -> Files:
    """`root`: a folder, or a URL with a scheme."""
    config = config or ReadConfig()
    return RemoteFiles(str(root), config) if "://" in str(root) else LocalFiles(Path(root), config)
