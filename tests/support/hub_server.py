"""A model hub on this machine: the requests of huggingface_hub that create a repository and commit files."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub(ThreadingHTTPServer):
    """Keeps what it gets.

    files: content by "ORG/NAME/path". large: suffixes of files that go through LFS. status: of every answer, if not
    0.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.objects: dict[str, bytes] = {}
        self.repositories: dict[str, dict[str, Any]] = {}
        self.messages: list[str] = []
        self.tokens: set[str | None] = set()
        self.num_requests = 0
        self.large = (".safetensors", ".onnx")
        self.status = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, content: Any, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(self.server.status or status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _body(self) -> bytes:
        self.server.num_requests += 1
        self.server.tokens.add(self.headers.get("Authorization"))
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_GET(self) -> None:
        self._body()
        name = self.path.split("?")[0].removeprefix("/api/models/")
        known = "/".join(name.split("/")[:2]) in self.server.repositories
        self._answer({"id": name, "sha": "0" * 40, "siblings": []} if known else {}, 200 if known else 404)

    def do_POST(self) -> None:
        body, path, server = self._body(), self.path.split("?")[0], self.server
        if path == "/api/repos/create":
            request = json.loads(body)
            name = f"{request['organization']}/{request['name']}" if request.get("organization") else request["name"]
            if name in server.repositories:
                self._answer({"url": f"{server.url}/{name}", "error": "exists"}, 409)
                return
            server.repositories[name] = request
            self._answer({"url": f"{server.url}/{name}", "id": name})
        elif path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            links = [
                {**entry, "actions": {"upload": {"href": f"{server.url}/objects/{entry['oid']}"}}} for entry in objects
            ]
            self._answer({"transfer": "basic", "objects": links})
        elif "/preupload/" in path:
            files = json.loads(body)["files"]
            modes = [
                {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(server.large) else "regular"}
                for file in files
            ]
            self._answer({"files": [{**mode, "shouldIgnore": False, "oid": None} for mode in modes]})
        elif "/commit/" in path:
            name = "/".join(path.split("/")[3:5])
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "header":
                    server.messages.append(value["summary"])
                elif line["key"] == "file":
                    server.files[f"{name}/{value['path']}"] = base64.b64decode(value["content"])
                else:
                    server.files[f"{name}/{value['path']}"] = server.objects[value["oid"]]
            url = f"{server.url}/{name}/commit/{'1' * 40}"
            self._answer({"success": True, "commitUrl": url, "commitOid": "1" * 40, "pullRequestUrl": None})
        else:
            self._answer({"error": f"unknown request {path}"}, 404)

    def do_PUT(self) -> None:
        self.server.objects[self.path.rpartition("/")[2]] = self._body()
        self._answer({})


@contextmanager
def hub() -> Iterator[Hub]:
    """A running hub."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
