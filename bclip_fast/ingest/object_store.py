"""Objects by key, from a bucket over HTTP(S) or from its mirror on disk."""

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
from .articles import MAX_IMAGE_BYTES, FetchError, SourceError, read_regular_file

METADATA_KEY = re.compile(r"metadata/PMC(\d{1,12})\.(\d{1,4})\.json")
_MAX_VERSION = 99
_MD5 = re.compile(r"[0-9a-f]{32}")
_ATTEMPTS = 6
_MAX_WAIT_SECONDS = 60.0
# After `patience_seconds`, a slower response counts as failed, and the store repeats the request.
_MIN_BYTES_PER_SECOND = 4096
_MAX_LIST_BYTES = 16 << 20


class Store(Protocol):
    """Objects by key."""

    def keys(self, prefix: str) -> Iterator[str]:
        """Yield the keys with a prefix, sorted. Raises FetchError."""
        ...

    def read(self, key: str, md5: str = "", limit: int = MAX_IMAGE_BYTES) -> bytes:
        """Return an object of at most `limit` bytes, after a check of its MD5 (empty: no check).

        Raises:
            SourceError: the object is missing, too large, or has another MD5.
            FetchError: the store couldn't be read this time.
        """
        ...


class Mirror:
    """A mirror on disk, as `bclip ingest fetch` writes it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def keys(self, prefix: str) -> Iterator[str]:
        """Yield the keys with a prefix, sorted. For a single article, test the versions 0 to 99."""
        if re.fullmatch(r"metadata/PMC\d+\.", prefix):
            # The folder may hold millions of files, so test each possible name of the article.
            names = (f"{prefix}{number}.json" for number in range(_MAX_VERSION + 1))
            yield from sorted(key for key in names if (self.root / key).exists())
            return
        folder, _, start = prefix.rpartition("/")
        if (self.root / folder).is_dir():
            names = (path.name for path in (self.root / folder).iterdir())
            yield from sorted(f"{folder}/{name}" for name in names if name.startswith(start))

    def read(self, key: str, md5: str = "", limit: int = MAX_IMAGE_BYTES) -> bytes:
        """Return an object, see `Store.read`. The limits are those of `read_regular_file`."""
        if not (self.root / key).exists():
            raise SourceError("not found")
        data = read_regular_file(self.root / key, self.root)
        if md5 and md5_of(data) != md5:
            raise SourceError("wrong MD5")
        return data


class HttpStore:
    """A bucket that answers anonymous HTTP(S) requests.

    The store makes up to 6 attempts at a request. Between them it waits 0.5 to 60 s, doubling each time, or longer if
    Retry-After asks for it. An attempt also fails if the body is incomplete, is slower than 4 KiB/s, or has another
    MD5.

    Args:
        address: `https://...`, or `s3://BUCKET` for a bucket at Amazon.
        connections: number of requests at the same time.
        patience_seconds: timeout for connecting and for each read. After this time, the speed limit applies.
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
        """Yield the keys with a prefix, sorted. Raises FetchError."""
        token = ""
        while True:
            query = {"list-type": "2", "prefix": prefix, **({"continuation-token": token} if token else {})}
            data = self._request("?" + urllib.parse.urlencode(query), _MAX_LIST_BYTES, "")
            try:
                root = safe_xml.parse(data)
            except safe_xml.XmlError as error:
                raise FetchError(f"{self.address}: the list of {prefix!r} cannot be read: {error}") from None
            yield from (node.text or "" for node in root.iterfind("{*}Contents/{*}Key"))
            token = root.findtext("{*}NextContinuationToken") or ""
            if not token:
                return

    def read(self, key: str, md5: str = "", limit: int = MAX_IMAGE_BYTES) -> bytes:
        """Return an object, see `Store.read`. Without `md5`, an ETag that is an MD5 takes its place."""
        return self._request("/" + urllib.parse.quote(key, errors="surrogateescape"), limit, md5)

    def _request(self, path: str, limit: int, md5: str) -> bytes:
        """Repeat a GET request until it succeeds or all attempts have failed."""
        import urllib3

        wait = 0.5
        for attempt in range(_ATTEMPTS):
            try:
                with self._slots:
                    return self._get(path, limit, md5)
            except (urllib3.exceptions.HTTPError, OSError, _RetryError) as error:
                last_error = error
            requested_wait = getattr(last_error, "seconds", 0.0)
            if attempt + 1 < _ATTEMPTS:
                time.sleep(max(requested_wait, wait * random.uniform(0.5, 1.0)))
            wait = min(2 * wait, _MAX_WAIT_SECONDS)
        if str(last_error) == "wrong MD5":
            raise SourceError("wrong MD5")
        reason = " ".join(str(last_error).split())[:200]
        raise FetchError(f"{self.address}{path}: {reason} ({_ATTEMPTS} attempts)") from None

    def _get(self, path: str, limit: int, md5: str) -> bytes:
        response = self._pool.request("GET", self.address + path, preload_content=False, redirect=True)
        try:
            if response.status in (403, 404, 410):
                raise SourceError("not found")
            if response.status != 200:
                raise _RetryError(f"status {response.status}", _retry_after_seconds(response.headers))
            data = self._read_body(response, limit)
        except BaseException:
            response.close()  # the next response must not begin with the rest of this body
            raise
        response.release_conn()
        etag = response.headers.get("ETag", "").strip('"')
        expected = md5 or (etag if _MD5.fullmatch(etag) else "")
        if expected and md5_of(data) != expected:
            raise _RetryError("wrong MD5")
        return data

    def _read_body(self, response: Any, limit: int) -> bytes:
        start, content = time.monotonic(), bytearray()
        while block := response.read1(1 << 16):
            content += block
            if len(content) > limit:
                raise SourceError(f"larger than {limit >> 20} MiB")
            if time.monotonic() - start > self._patience + len(content) / _MIN_BYTES_PER_SECOND:
                raise _RetryError("slower than 4 KiB/s")
        length = response.headers.get("Content-Length")
        if length is not None and len(content) != int(length):
            raise _RetryError(f"{len(content)} bytes of {length}")
        return bytes(content)


def _retry_after_seconds(headers: Mapping[str, str]) -> float:
    """Return the wait that Retry-After asks for, at most 10 minutes. Without a valid header, return 0."""
    import urllib3

    try:
        return min(float(urllib3.Retry().parse_retry_after(headers.get("Retry-After", "0"))), 600.0)
    except (urllib3.exceptions.InvalidHeader, ValueError, OverflowError):
        return 0.0


class _RetryError(Exception):
    def __init__(self, reason: str, seconds: float = 0.0) -> None:
        super().__init__(reason)
        self.seconds = seconds


def is_address(source: str) -> bool:
    """Return whether `source` is the address of a bucket, in contrast to a folder."""
    return source.startswith(("https://", "http://", "s3://"))


def open_store(root: str, connections: int = 8) -> Store:
    """Open the bucket at an address, or the mirror in a folder."""
    return HttpStore(root, connections) if is_address(root) else Mirror(Path(root))


def is_mirror(root: Path) -> bool:
    """Return whether a folder is a mirror with at least one article."""
    return (root / "metadata").is_dir() and any(METADATA_KEY.fullmatch(key) for key in Mirror(root).keys("metadata/"))


# A process keeps its connections from one unit of work to the next.
_STORES: dict[tuple[str, int], Store] = {}


def shared_store(root: str, connections: int) -> Store:
    """Return the process's store for `root`. The first call opens it."""
    return _STORES.setdefault((root, connections), open_store(root, connections))
