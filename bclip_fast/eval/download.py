"""Download a file over HTTP, and continue where an earlier download ended."""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import re
import ssl
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bclip_fast.errors import UserError, first_line
from bclip_fast.io.atomic import write_text
from bclip_fast.io.progress import track
from bclip_fast.version import __version__

log = logging.getLogger(__name__)

_TIMEOUT_S = 60
_NUM_TRIES = 5
_PAUSE_S = 1.0
_BLOCK = 1 << 20
_NETWORK = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError)
_SHA256 = re.compile(r'"?([0-9a-f]{64})"?')


@dataclass(frozen=True)
class Remote:
    """A file on a server. version: its ETag or date, "" if it says neither. sha256: the hub's."""

    url: str
    size: int | None
    version: str
    sha256: str = ""


def probe(url: str) -> Remote:
    """Ask a server for a file's size and version. Raises UserError."""
    if not url.startswith(("https://", "http://")):
        raise UserError(f"{url} is not an address; give http:// or https://")
    try:
        with _opened(url, {}, "HEAD") as answer:
            headers = answer.headers
            size = headers.get("X-Linked-Size") or headers.get("Content-Length")
            version = headers.get("ETag") or headers.get("Last-Modified") or ""
            linked = _SHA256.fullmatch(headers.get("X-Linked-ETag") or "")
            sha256 = linked[1] if linked else ""
            return Remote(url, int(size) if size and size.isdigit() else None, version, sha256)
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"{url} cannot be reached: {_reason(error)}; check the network, or pass --mirror") from error


def part_of(path: Path) -> Path:
    """Return the path of an unfinished download."""
    return path.with_name(f"{path.name}.part")


def download(remote: Remote, path: Path) -> Path:
    """Download a file next to `path`, as `part_of(path)`. Return that path.

    A part of the same version of the file is continued. A lost connection is tried again, as long as bytes arrive.

    Raises:
        UserError: the server refuses, or the connection is lost several times without a new byte.
    """
    part, record = part_of(path), part_of(path).with_suffix(".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {"url": remote.url, "size": remote.size, "version": remote.version}
    if not remote.version or _read(record) != facts:
        part.unlink(missing_ok=True)
        write_text(record, json.dumps(facts) + "\n")
    with track(f"fetch {path.name}", remote.size) as advance:
        done, failures = part.stat().st_size if part.exists() else 0, 0
        advance(done)
        while remote.size is None or done < remote.size:
            start = done
            try:
                for num_bytes in _stream(remote, part, done):
                    if num_bytes < 0:  # the server began again
                        advance(-done)
                        done = start = 0
                    else:
                        done += num_bytes
                        advance(num_bytes)
                if remote.size is None:
                    break
                if done < remote.size:
                    raise http.client.IncompleteRead(b"", remote.size - done)
            except (OSError, http.client.HTTPException) as error:
                if isinstance(error, urllib.error.HTTPError) and error.code < 500 and error.code not in (408, 429):
                    raise UserError(f"{remote.url}: the server answers {error.code} {error.reason}") from error
                if not isinstance(error, _NETWORK):
                    raise OSError(error.errno, error.strerror, str(part)) from error  # the disk, not the network
                failures = 1 if done > start else failures + 1
                if failures >= _NUM_TRIES:
                    raise UserError(
                        f"{remote.url}: the connection was lost {failures} times ({_reason(error)}); {done:,} bytes "
                        f"are kept in {part}, and the same command continues"
                    ) from error
                log.warning("%s: %s; trying again from byte %s", remote.url, _reason(error), f"{done:,}")
                time.sleep(_PAUSE_S)
    if remote.size is not None and part.stat().st_size != remote.size:
        size = part.stat().st_size
        part.unlink()
        raise UserError(f"{remote.url} sent {size:,} bytes instead of {remote.size:,}; fetch it again")
    return part


def _stream(remote: Remote, part: Path, done: int) -> Any:
    """Append to `part` what the server sends. Yield the number of bytes, and -1 before it sends the file from 0."""
    headers = {"Range": f"bytes={done}-", **({"If-Range": remote.version} if remote.version else {})} if done else {}
    with _opened(remote.url, headers) as answer:
        is_rest = answer.status == 206
        if is_rest and not (answer.headers.get("Content-Range") or "").startswith(f"bytes {done}-"):
            raise http.client.HTTPException("the server sends another range than the one asked for")
        if done and not is_rest:
            yield -1
        with part.open("ab" if is_rest else "wb") as file:
            while block := answer.read(_BLOCK):
                file.write(block)
                yield len(block)


def _opened(url: str, headers: dict[str, str], method: str = "GET") -> Any:
    request = urllib.request.Request(url, headers={"User-Agent": f"bclip_fast/{__version__}", **headers}, method=method)
    return contextlib.closing(urllib.request.urlopen(request, timeout=_TIMEOUT_S))


def _read(record: Path) -> Any:
    try:
        return json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _reason(error: BaseException) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answers {error.code} {error.reason}"
    return first_line(getattr(error, "reason", error))
