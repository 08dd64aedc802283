"""`bclip serve INDEX`: a web page to search an index with words or an image. By default, only this machine reaches it.

    GET  /api/search?q=WORDS&k=10&thumbnails=1     {"query": ..., "k": 10, "hits": [{"row", "score", "key", ...}, ...]}
    POST /api/search?k=10                          with an image as the body, or in the form field `image`

A hit has the fields of `bclip search --json`, and with `thumbnails=1` its image as a data: URL. An error is an object
with the field `error`.

A request holds words, an image and a number, never a path. The page runs no script and loads nothing. Captions and keys
are escaped, and images are decoded and encoded again. The server rejects foreign Host names, against DNS rebinding, and
forms from other sites. It does not log queries. Its caches and the number of requests at a time have bounds.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import socket
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from werkzeug.exceptions import Forbidden, HTTPException, MethodNotAllowed, NotFound, ServiceUnavailable
from werkzeug.serving import BaseWSGIServer, WSGIRequestHandler, make_server
from werkzeug.wrappers import Request, Response

from bclip_fast.errors import UserError

from .searcher import MAX_HITS, Hit, OpenConfig, Searcher, page

log = logging.getLogger(__name__)

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}

API = "/api/search"
MAX_ACTIVE = 64
"""Largest number of requests that are answered at the same time. Others wait up to `WAIT_S` seconds."""
WAIT_S = 10.0

LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "[::1]")


@dataclass(frozen=True, kw_only=True)
class ServeConfig(OpenConfig):
    """Serve a page to search an index."""

    host: str = "127.0.0.1"
    """Address to listen on. With any address except the loopback, everyone who reaches this machine sees the images."""
    port: int = 8000
    """Port to listen on. 0: any free port."""
    k: int = 24
    """Hits on a page, unless the request asks for another number."""
    cache_mb: int = 256
    """Memory for thumbnails, in MB. 0 decodes the images of every answer."""

    def __post_init__(self) -> None:
        """Check the fields. Raises UserError."""
        if not 1 <= self.k <= MAX_HITS or not 0 <= self.port < 65536:
            raise UserError(f"k={self.k} must be 1 to {MAX_HITS}, and port={self.port} must be 0 to 65535")
        if self.cache_mb < 0:
            raise UserError(f"cache_mb={self.cache_mb} must be at least 0")


class _Request(Request):
    max_content_length = 32 << 20
    max_form_memory_size = 1 << 16
    max_form_parts = 8


class _Handler(WSGIRequestHandler):
    timeout = 60  # seconds that a silent client keeps its thread


class App:
    """The page and its JSON interface as a WSGI application."""

    def __init__(self, searcher: Searcher, k: int = 24, hosts: Iterable[str] = LOOPBACK_HOSTS) -> None:
        """hosts: allowed values of a request's Host header. Empty: all."""
        self.searcher, self.k, self.hosts = searcher, k, list(hosts)
        self._slots = threading.BoundedSemaphore(MAX_ACTIVE)

    def __call__(self, environ: Any, start_response: Any) -> Iterable[bytes]:
        """Answer a request, as WSGI defines it."""
        request = _Request(environ)
        request.trusted_hosts = self.hosts
        has_slot = self._slots.acquire(timeout=WAIT_S)
        try:
            response = self._respond(request) if has_slot else _error(request, ServiceUnavailable())
        except HTTPException as error:
            response = _error(request, error)
        finally:
            if has_slot:
                self._slots.release()
        response.headers.extend(HEADERS)
        return response(environ, start_response)

    def _respond(self, request: Request) -> Response:
        _ = request.host  # raises for a host that is not allowed
        if request.path not in ("/", API):
            raise NotFound
        if request.method not in ("GET", "HEAD", "POST"):
            raise MethodNotAllowed(["GET", "HEAD", "POST"])
        if request.method == "POST" and request.headers.get("Sec-Fetch-Site", "none") not in ("same-origin", "none"):
            raise Forbidden
        query, k = request.args.get("q", ""), self.k
        is_api = request.path == API
        try:
            k = _number(request.values.get("k"), self.k)
            if request.method == "POST":
                content, query = _image(request, is_api)
                hits = self.searcher.image(content, k, query)
            else:
                hits = self.searcher.text(query, k) if query or is_api else []
            if is_api:
                found = [self._as_json(hit, request.args.get("thumbnails") == "1") for hit in hits]
                return _json({"query": query, "k": k, "hits": found})
        except UserError as error:
            if is_api:
                return _json({"error": str(error)}, 400)
            return Response(page(self.searcher, [], query=query, error=str(error), form=k), 400, mimetype="text/html")
        return Response(page(self.searcher, hits, query=query, form=k), mimetype="text/html")

    def _as_json(self, hit: Hit, with_thumbnail: bool) -> dict[str, Any]:
        if not with_thumbnail:
            return hit.as_json()
        try:
            return {**hit.as_json(), "thumbnail": self.searcher.thumbnail(hit)}
        except UserError as error:  # the other hits have theirs
            return {**hit.as_json(), "thumbnail": None, "problem": str(error)}


def _image(request: Request, is_api: bool) -> tuple[bytes, str]:
    """Return the content and the name of an uploaded image: a file of a form, or the body of a call of the API."""
    file = request.files.get("image")
    content = file.read() if file else request.get_data() if is_api else b""
    if not content:
        raise UserError("send an image as the body" if is_api else "choose an image first")
    return content, (file.filename if file else "") or ("image" if is_api else "")


def _json(value: dict[str, Any], status: int = 200) -> Response:
    return Response(json.dumps(value), status, mimetype="application/json")


def _error(request: Request, error: HTTPException) -> Response:
    if request.path == API:
        return _json({"error": f"{error.code} {error.name}"}, error.code or 500)
    return Response(f"{error.code} {error.name}\n", error.code, mimetype="text/plain")


def _number(text: str | None, default: int) -> int:
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 6 and 1 <= int(text) <= MAX_HITS):
        raise UserError(f"the number of hits must be 1 to {MAX_HITS}")
    return int(text)


def start_server(config: ServeConfig, searcher: Searcher) -> BaseWSGIServer:
    """Return a server that already listens, on its attribute `port`. Raises UserError if it cannot listen."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        listening = socket.create_server((config.host, config.port), family=family)
    except OSError as error:
        raise UserError(f"cannot listen on {config.host}:{config.port}: {error.strerror or error}") from error
    hosts: Iterable[str] = LOOPBACK_HOSTS
    address = ipaddress.ip_address(listening.getsockname()[0])
    if not address.is_loopback:
        log.warning("%s is not the loopback: everyone who reaches it sees the images and captions", address)
        hosts = ()
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    with listening:  # the server duplicates the descriptor
        app: Callable[..., Any] = App(searcher, config.k, hosts)
        port = listening.getsockname()[1]
        return make_server(config.host, port, app, threaded=True, request_handler=_Handler, fd=listening.fileno())


def run(config: ServeConfig) -> None:
    """Run the command: serve until an interrupt."""
    server = start_server(config, Searcher(config, thumbnail_bytes=config.cache_mb << 20))
    host = f"[{config.host}]" if ":" in config.host else config.host
    log.info("http://%s:%d/ (Ctrl+C stops it)", host, server.port)
    try:
        server.serve_forever()
    finally:
        server.server_close()
