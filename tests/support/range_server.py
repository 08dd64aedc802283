"""An HTTP server of a folder with Range requests, and faults on request."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class Server(ThreadingHTTPServer):
    """Serves a folder with Range requests. `fault(name, count)`: fault of the count-th request for a file, or "".

    version: ETag of all files, if it isn't empty.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.fault = lambda name, count: ""
        self.delay_s = 0.0
        self.version = ""
        self.counts: dict[str, int] = {}
        self.ranges: list[tuple[str, int]] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        """URL of the folder."""
        return f"http://127.0.0.1:{self.server_port}/data"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        path = self.server.folder / self.path.removeprefix("/data/")
        self.send_response(200 if path.is_file() else 404)
        if path.is_file():
            self.send_header("Content-Length", str(path.stat().st_size))
        if self.server.version:
            self.send_header("ETag", self.server.version)
        self.end_headers()

    def do_GET(self) -> None:
        name = self.path.removeprefix("/data/")
        path = self.server.folder / name
        with self.server.lock:
            count = self.server.counts[name] = self.server.counts.get(name, 0) + 1
        fault = self.server.fault(name, count)
        time.sleep(self.server.delay_s)
        if fault.isdigit() or not path.is_file():
            self.send_error(int(fault or 404))
            return
        data, status = path.read_bytes(), 200
        total, start = len(data), 0
        is_same = self.headers.get("If-Range", self.server.version) == self.server.version
        if (byte_range := self.headers.get("Range")) and fault != "no range" and is_same:
            first, _, last = byte_range.removeprefix("bytes=").partition("-")
            start = int(first)
            data, status = data[start : int(last) + 1 if last else None], 206
        with self.server.lock:
            self.server.ranges.append((name, len(data)))
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{start + len(data) - 1}/{total}")
        if self.server.version:
            self.send_header("ETag", self.server.version)
        self.send_header("Content-Length", str(len(data) // 2 if fault == "short" else len(data)))
        self.end_headers()
        with contextlib.suppress(OSError):
            if fault == "trickle":
                for byte in data:
                    self.wfile.write(bytes([byte]))
                    self.wfile.flush()
                    time.sleep(0.05)
            self.wfile.write(data[: len(data) // 2] if fault in ("drop", "short") else data)
            if fault == "drop":
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
