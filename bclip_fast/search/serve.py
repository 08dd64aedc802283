"""`bclip serve INDEX`: a web page to search an index with words or a picture, for oneself: on the loopback by default.

A request brings words, a picture and a number, never a path. The page runs no script and loads nothing; captions and
keys are escaped, pictures decoded and encoded anew. A Host that is not ours is refused, so that no foreign name that
points here reads along (DNS rebinding), and so are forms posted by other sites. What is asked is not logged.
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

from .index import MAX_HITS, OpenConfig, Searcher, page

log = logging.getLogger(__name__)

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True, kw_only=True)
class ServeConfig(OpenConfig):
    """Serves a page to search an index."""

    host: str = "127.0.0.1"
    """Address to listen on. Any but the loopback's lets whoever reaches this machine see the pictures."""
    port: int = 8000
    """0 takes a free one."""
    k: int = 24
    """Hits on a page, unless it asks for another number."""

    def __post_init__(self) -> None:
        if not 1 <= self.k <= MAX_HITS or not 0 <= self.port < 65536:
            raise UserError(f"k is {self.k}, port {self.port}: must be 1 to {MAX_HITS} and 0 to 65535")


class _Request(Request):
    max_content_length = 32 << 20
    max_form_memory_size = 1 << 16
    max_form_parts = 8


class App:
    """The page as a WSGI application.

    Args:
        hosts: the names a request may call this server by; empty: any.
    """

    def __init__(
        self, searcher: Searcher, k: int = 24, hosts: Iterable[str] = ("127.0.0.1", "localhost", "[::1]")
    ) -> None:
        self.searcher, self.k, self.hosts = searcher, k, list(hosts)

    def __call__(self, environ: Any, start_response: Any) -> Iterable[bytes]:
        request = _Request(environ)
        request.trusted_hosts = self.hosts
        try:
            response = self._respond(request)
        except HTTPException as error:
            response = Response(f"{error.code} {error.name}\n", error.code, mimetype="text/plain")
        response.headers.extend(HEADERS)
        return response(environ, start_response)

    def _respond(self, request: Request) -> Response:
        _ = request.host  # raises where it isn't one of ours
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
                    raise UserError("choose a picture first")
                hits = self.searcher.picture(content, k, query)
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


def make(config: ServeConfig, searcher: Searcher) -> BaseWSGIServer:
    """A server that listens already; `port` is its port. Raises UserError: it can't listen."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        listening = socket.create_server((config.host, config.port), family=family)
    except OSError as error:
        raise UserError(f"cannot listen on {config.host}:{config.port}: {error.strerror or error}") from error
    hosts = ["127.0.0.1", "localhost", "[::1]"]
    address = ipaddress.ip_address(listening.getsockname()[0])
    if not address.is_loopback:
        log.warning("%s is not the loopback: whoever reaches it sees the pictures and captions of this index", address)
        hosts = []
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    with listening:  # the server duplicates the descriptor
        app: Callable[..., Any] = App(searcher, config.k, hosts)
        return make_server(config.host, listening.getsockname()[1], app, threaded=True, fd=listening.fileno())


def run(config: ServeConfig) -> None:
    """The command: serves until it is interrupted."""
    server = make(config, Searcher(config))
    host = f"[{config.host}]" if ":" in config.host else config.host
    log.info("http://%s:%d/ (Ctrl+C ends it)", host, server.port)
    try:
        server.serve_forever()
    finally:
        server.server_close()
