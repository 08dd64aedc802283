"""A bucket of articles on loopback, with faults on request."""

from __future__ import annotations

import contextlib
import email.utils
import json
import math
import threading
import time
import urllib.parse
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from xml.sax.saxutils import escape

from articles import article_xml, noise_image

from bclip_fast.io.hashing import md5_of


class Bucket:
    """An HTTP server of objects, like S3. `faults[key]`: faults of the next requests for a key.

    A fault is a status, a tuple (status, headers), or one of "dropped", "wrong", "truncated" and "trickle".
    """

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.faults: dict[str, list] = {}
        self.requests: Counter[str] = Counter()
        self.times: dict[str, list[float]] = {}
        self.page_size = 3
        bucket = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = 1 << 16  # send header and body in one packet, to avoid a wait for an acknowledgement

            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                parts = urllib.parse.urlsplit(self.path)
                key = urllib.parse.unquote(parts.path).lstrip("/")
                bucket.requests[key] += 1
                bucket.times.setdefault(key, []).append(time.monotonic())
                faults = bucket.faults.get(key, [])
                fault = faults.pop(0) if faults else None
                if not key:
                    self.answer(200, bucket.listing(urllib.parse.parse_qs(parts.query)))
                elif isinstance(fault, tuple):
                    # A date has whole seconds, so this one is 1 to 2 s away.
                    date = email.utils.formatdate(math.floor(time.time()) + 2, usegmt=True)
                    headers = {name: value.replace("<date>", date) for name, value in fault[1].items()}
                    self.answer(fault[0], b"<html>busy</html>", headers)
                elif isinstance(fault, int):
                    self.answer(fault, b"<html>sorry</html>")
                elif key not in bucket.objects:
                    self.answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
                else:
                    self.serve(bucket.objects[key], fault)

            def answer(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
                self.send_response(status)
                for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def serve(self, data: bytes, fault: str | None) -> None:
                etag = {"ETag": f'"{md5_of(data)}"'}
                if fault == "dropped":
                    self.connection.close()
                elif fault == "wrong":
                    self.answer(200, data[:-1] + bytes([data[-1] ^ 1]), etag)
                elif fault in ("truncated", "trickle"):
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    if fault == "trickle":
                        for _ in range(40):
                            self.wfile.write(b"\xff")
                            self.wfile.flush()
                            time.sleep(0.1)
                    else:
                        self.wfile.write(data[: len(data) // 2])
                    self.wfile.flush()
                    self.close_connection = True
                    self.connection.close()
                else:
                    self.answer(200, data, etag)

            def handle(self) -> None:
                with contextlib.suppress(OSError, ValueError):  # the client or a fault closed the connection
                    super().handle()

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def listing(self, query: dict[str, list[str]]) -> bytes:
        """Return a page of the list of keys, as S3 does."""
        prefix = query.get("prefix", [""])[0]
        after = query.get("continuation-token", [""])[0]
        keys = sorted(key for key in self.objects if key.startswith(prefix) and key > after)
        page = keys[: self.page_size]
        more = f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>" if len(keys) > len(page) else ""
        rows = "".join(f"<Contents><Key>{escape(key)}</Key></Contents>" for key in page)
        namespace = "http://s3.amazonaws.com/doc/2006-03-01/"
        return f'<?xml version="1.0"?><ListBucketResult xmlns="{namespace}">{rows}{more}</ListBucketResult>'.encode()

    def put_article(self, number: int, version: int = 1, figures: int = 2, **values: object) -> None:
        """Add an article. `values`: changes to its metadata."""
        name = f"PMC{number}.{version}"
        texts = [(f"fig-{i}", f"Text {i} of {name}") for i in range(figures)]
        files = {f"fig-{i}.jpg": noise_image(1000 * number + 10 * version + i) for i in range(figures)}
        files |= {f"{name}.xml": article_xml(*texts, number=number), "table s1.xlsx": b"no image"}
        self.objects |= {f"{name}/{file}": data for file, data in files.items()}

        def address(file: str) -> str:
            return f"s3://pmc-oa-opendata/{name}/{file}?md5={md5_of(files[file])}"

        metadata = {
            "pmcid": f"PMC{number}", "version": version, "is_pmc_openaccess": True, "is_manuscript": False,
            "is_historical_ocr": False, "is_retracted": False, "license_code": "CC BY", "citation": f"J. {number}",
            "xml_url": address(f"{name}.xml"), "media_urls": [address(file) for file in files if ".xml" not in file],
        }  # fmt: skip
        self.objects[f"metadata/{name}.json"] = json.dumps({**metadata, **values}).encode()

    def close(self) -> None:
        """Stop the server."""
        self.server.shutdown()
        self.server.server_close()
