"""`bclip serve INDEX`: a web page to search an index with words or an image. By default, only this machine reaches it.

A request holds words, an image and a number, never a path. The page runs no script and loads nothing. Captions and keys
are escaped, and images are decoded and encoded again. The server rejects foreign Host names, against DNS rebinding, and
forms from other sites. It does not log queries.
"""

from __future__ import annotations

import ipaddress
import logging
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from werkzeug.exceptions import Forbidden, HTTPException, MethodNotAllowed, NotFound
from werkzeug.serving import BaseWSGIServer, make_server
from werkzeug.wrappers import Request, Response

from bclip_fast.errors import UserError

from .searcher import MAX_HITS, OpenConfig, Searcher, page

log = logging.getLogger(__name__)

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}


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

    def __post_init__(self) -> None:
        """Check the fields. Raises UserError."""
        if not 1 <= self.k <= MAX_HITS or not 0 <= self.port < 65536:
            raise UserError(f"k={self.k} must be 1 to {MAX_HITS}, and port={self.port} must be 0 to 65535")


class _Request(Request):
    max_content_length = 32 << 20
    max_form_memory_size = 1 << 16
    max_form_parts = 8


class App:
    """The page as a WSGI application."""

    def __init__(self, searcher: Searcher, k: int = 24, hosts: Iterable[str] = LOOPBACK_HOSTS) -> None:
        """hosts: allowed values of a request's Host header. Empty: all."""
        self.searcher, self.k, self.hosts = searcher, k, list(hosts)

    def __call__(self, environ: Any, start_response: Any) -> Iterable[bytes]:
        """Answer a request, as WSGI defines it."""
        request = _Request(environ)
        request.trusted_hosts = self.hosts
        try:
            response = self._respond(request)
        except HTTPException as error:
            response = Response(f"{error.code} {error.name}\n", error.code, mimetype="text/plain")
        response.headers.extend(HEADERS)
        return response(environ, start_response)

    def _respond(self, request: Request) -> Response:
        _ = request.host  # raises for a host that is not allowed
        if request.path != "/":
            raise NotFound
        if request.method not in ("GET", "HEAD", "POST"):
            raise MethodNotAllowed(["GET", "HEAD", "POST"])
        if request.method == "POST" and request.headers.get("Sec-Fetch-Site", "none") not in ("same-origin", "none"):
            raise Forbidden
        query, k = request.args.get("q", ""), self.k
        try:
            k = _number(request.values.get("k"), self.k)
            if request.method == "POST":
                file = request.files.get("image")
                query = file.filename or "" if file else ""
                if not (content := file.read() if file else b""):
                    raise UserError("choose an image first")
                hits = self.searcher.image(content, k, query)
            else:
                hits = self.searcher.text(query, k) if query else []
        except UserError as error:
            return Response(page(self.searcher, [], query=query, error=str(error), form=k), 400, mimetype="text/html")
        return Response(page(self.searcher, hits, query=query, form=k), mimetype="text/html")


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
        return make_server(config.host, listening.getsockname()[1], app, threaded=True, fd=listening.fileno())


def run(config: ServeConfig) -> None:
    """Run the command: serve until an interrupt."""
    server = start_server(config, Searcher(config))
    host = f"[{config.host}]" if ":" in config.host else config.host
    log.info("http://%s:%d/ (Ctrl+C stops it)", host, server.port)
    try:
        server.serve_forever()
    finally:
        server.server_close()
