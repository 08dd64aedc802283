"""Objects by key: a bucket over HTTP(S), or its mirror on disk."""

from __future__ import annotations

import random
import re
import threading
import time
import urllib.parse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from bclip_fast.io.hashing import md5_of
from bclip_fast.version import __version__

from . import safe_xml
from .articles import MAX_IMAGE_BYTES, FetchError, SourceError, read_regular

METADATA_KEY = re.compile(r"metadata/PMC(\d{1,12})\.(\d{1,4})\.json")
_MAX_VERSION = 99
_MD5 = re.compile(r"[0-9a-f]{32}")
_ATTEMPTS = 6
_MAX_WAIT_SECONDS = 60.0
# A server that sends less than this, once the patience is over, is asked again.
_MIN_BYTES_PER_SECOND = 4096
_MAX_LIST_BYTES = 16 << 20


class Store(Protocol):
    """Objects by key. `keys`: those with a prefix, sorted. `read` raises SourceError (a fact about the object: it is
    missing, too large, not what its MD5 says) or FetchError (try again later)."""

    def keys(self, prefix: str) -> Iterator[str]: ...

    def read(self, key: str, md5: str = "", limit: int = MAX_IMAGE_BYTES) -> bytes: ...


class Mirror:
    """A mirror on disk, as `bclip ingest fetch` writes it; of an article whose versions aren't named, 0 to 99 count."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def keys(self, prefix: str) -> Iterator[str]:
        if re.fullmatch(r"metadata/PMC\d+\.", prefix):
            # Versions of one article: asked for by name, as the folder may hold millions.
            found = (f"{prefix}{number}.json" for number in range(_MAX_VERSION + 1))
            yield from sorted(key for key in found if (self.root / key).exists())
            return
        folder, _, start = prefix.rpartition("/")
        if (self.root / folder).is_dir():
            names = (path.name for path in (self.root / folder).iterdir())
            yield from sorted(f"{folder}/{name}" for name in names if name.startswith(start))

    def read(self, key: str, md5: str = "", limit: int = MAX_IMAGE_BYTES) -> bytes:
        if not (self.root / key).exists():
            raise SourceError("not found")
        data = read_regular(self.root / key, self.root)
        if md5 and md5_of(data) != md5:
            raise SourceError("wrong MD5")
        return data


class HttpStore:
    """A bucket by anonymous HTTP(S); `s3://bucket` is short for its address at Amazon.

    A request is tried 6 times, with doubling waits of 0.5 to 60 s and those that Retry-After asks for; so is a body
    that is cut short, comes slower than 4 KiB/s, or does not have its MD5. At most `connections` requests run at once.
    """

    def __init__(self, address: str, connections: int = 8, patience_seconds: float = 30.0) -> None:
        import urllib3

        if address.startswith("s3://"):
            address = f"https://{address[5:].strip('/')}.s3.amazonaws.com"
        self.address = address.rstrip("/")
        self._patience = patience_seconds
        self._slots = threading.BoundedSemaphore(connections)
        self._pool = urllib3.PoolManager(
            maxsize=connections,
            headers={"User-Agent": f"bclip_fast/{__version__}", "Accept-Encoding": "identity"},
            timeout=urllib3.Timeout(connect=patience_seconds, read=patience_seconds),
            retries=False,
        )

    def keys(self, prefix: str) -> Iterator[str]:
        token = ""
        while True:
            query = {"list-type": "2", "prefix": prefix, **({"continuation-token": token} if token else {})}
            data = self._tried("?" + urllib.parse.urlencode(query), _MAX_LIST_BYTES, "")
            try:
                root = safe_xml.parse(data)
            except safe_xml.XmlError as error:
                raise FetchError(f"{self.address}: the list of {prefix!r} cannot be read: {error}") from None
            yield from (node.text or "" for node in root.iterfind("{*}Contents/{*}Key"))
            token = root.findtext("{*}NextContinuationToken") or ""
            if not token:
                return

    def read(self, key: str, md5: str = "", limit: int = MAX_IMAGE_BYTES) -> bytes:
        return self._tried("/" + urllib.parse.quote(key), limit, md5)

    def _tried(self, path: str, limit: int, md5: str) -> bytes:
        import urllib3

        wait = 0.5
        for attempt in range(_ATTEMPTS):
            try:
                with self._slots:
                    return self._once(path, limit, md5)
            except (urllib3.exceptions.HTTPError, OSError, _AskAgainError) as error:
                last = error
            asked = getattr(last, "seconds", 0.0)
            if attempt + 1 < _ATTEMPTS:
                time.sleep(max(asked, wait * random.uniform(0.5, 1.0)))
            wait = min(2 * wait, _MAX_WAIT_SECONDS)
        if str(last) == "wrong MD5":
            raise SourceError("wrong MD5")
        reason = " ".join(str(last).split())[:200]
        raise FetchError(f"{self.address}{path}: {reason} ({_ATTEMPTS} attempts)") from None

    def _once(self, path: str, limit: int, md5: str) -> bytes:
        response = self._pool.request("GET", self.address + path, preload_content=False, redirect=True)
        try:
            if response.status in (403, 404, 410):
                raise SourceError("not found")
            if response.status != 200:
                raise _AskAgainError(f"status {response.status}", _asked_seconds(response.headers))
            data = self._body(response, limit)
        except BaseException:
            response.close()  # what is left of the body must not be taken for the next one's
            raise
        response.release_conn()
        etag = response.headers.get("ETag", "").strip('"')
        expected = md5 or (etag if _MD5.fullmatch(etag) else "")
        if expected and md5_of(data) != expected:
            raise _AskAgainError("wrong MD5")
        return data

    def _body(self, response: Any, limit: int) -> bytes:
        start, content = time.monotonic(), bytearray()
        while block := response.read1(1 << 16):
            content += block
            if len(content) > limit:
                raise SourceError(f"larger than {limit >> 20} MiB")
            if time.monotonic() - start > self._patience + len(content) / _MIN_BYTES_PER_SECOND:
                raise _AskAgainError("slower than 4 KiB/s")
        length = response.headers.get("Content-Length")
        if length is not None and len(content) != int(length):
            raise _AskAgainError(f"{len(content)} bytes of {length}")
        return bytes(content)


def _asked_seconds(headers: Mapping[str, str]) -> float:
    """The wait that Retry-After asks for, in seconds or until a date, at most 10 minutes; 0 where it says neither."""
    import urllib3

    try:
        return min(float(urllib3.Retry().parse_retry_after(headers.get("Retry-After", "0"))), 600.0)
    except (urllib3.exceptions.InvalidHeader, ValueError, OverflowError):
        return 0.0


class _AskAgainError(Exception):
    def __init__(self, reason: str, seconds: float = 0.0) -> None:
        super().__init__(reason)
        self.seconds = seconds


def is_address(source: str) -> bool:
    return source.startswith(("https://", "http://", "s3://"))


def open_store(root: str, connections: int = 8) -> Store:
    return HttpStore(root, connections) if is_address(root) else Mirror(Path(root))


def is_mirror(root: Path) -> bool:
    return (root / "metadata").is_dir() and any(METADATA_KEY.fullmatch(key) for key in Mirror(root).keys("metadata/"))


# A process keeps its connections from one unit of work to the next.
_STORES: dict[tuple[str, int], Store] = {}


def shared_store(root: str, connections: int) -> Store:
    return _STORES.setdefault((root, connections), open_store(root, connections))
