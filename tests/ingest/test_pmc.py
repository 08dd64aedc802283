"""Articles from a bucket: a server on loopback that lists, serves, misbehaves; versions, rules, mirrors, resuming."""

from __future__ import annotations

import email.utils
import gzip
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from xml.sax.saxutils import escape

import pyarrow.parquet as pq
import pytest
from test_ingest import article, noise

from bclip_fast.data.shards.verify import verify
from bclip_fast.errors import UserError
from bclip_fast.ingest import object_store
from bclip_fast.ingest.articles import FetchError, SourceError
from bclip_fast.ingest.build import IngestConfig, build
from bclip_fast.ingest.fetch import FetchConfig, fetch
from bclip_fast.ingest.object_store import HttpStore, Mirror
from bclip_fast.ingest.pmc import Rules, choose_version, select


class Bucket:
    """Objects behind HTTP as S3 serves them. `faults[key]` are what the next requests for a key get instead."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.faults: dict[str, list] = {}
        self.requests: Counter[str] = Counter()
        self.times: dict[str, list[float]] = {}
        self.page_size = 3
        bucket = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = 1 << 16  # header and body in one packet: no wait for its acknowledgement

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
                    # A date has whole seconds: this one is 1 to 2 s away.
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
                etag = {"ETag": f'"{hashlib.md5(data).hexdigest()}"'}
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
                try:
                    super().handle()
                except (OSError, ValueError):  # the other side, or a fault of ours, closed it
                    pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def listing(self, query: dict[str, list[str]]) -> bytes:
        prefix = query.get("prefix", [""])[0]
        after = query.get("continuation-token", [""])[0]
        keys = sorted(key for key in self.objects if key.startswith(prefix) and key > after)
        page = keys[: self.page_size]
        more = f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>" if len(keys) > len(page) else ""
        rows = "".join(f"<Contents><Key>{escape(key)}</Key></Contents>" for key in page)
        namespace = "http://s3.amazonaws.com/doc/2006-03-01/"
        return f'<?xml version="1.0"?><ListBucketResult xmlns="{namespace}">{rows}{more}</ListBucketResult>'.encode()

    def put_article(self, number: int, version: int = 1, figures: int = 2, **values: object) -> None:
        name = f"PMC{number}.{version}"
        texts = [(f"fig-{i}", f"Text {i} of {name}") for i in range(figures)]
        files = {f"fig-{i}.jpg": noise(1000 * number + 10 * version + i) for i in range(figures)}
        files |= {f"{name}.xml": article(*texts, number=number), "table s1.xlsx": b"no image"}
        self.objects |= {f"{name}/{file}": data for file, data in files.items()}

        def address(file: str) -> str:
            return f"s3://pmc-oa-opendata/{name}/{file}?md5={hashlib.md5(files[file]).hexdigest()}"

        about = {
            "pmcid": f"PMC{number}", "version": version, "is_pmc_openaccess": True, "is_manuscript": False,
            "is_historical_ocr": False, "is_retracted": False, "license_code": "CC BY", "citation": f"J. {number}",
            "xml_url": address(f"{name}.xml"), "media_urls": [address(file) for file in files if ".xml" not in file],
        }  # fmt: skip
        self.objects[f"metadata/{name}.json"] = json.dumps({**about, **values}).encode()


@pytest.fixture
def bucket(monkeypatch) -> Iterator[Bucket]:
    # The waits are those of use, shortened a hundredfold; Retry-After is kept.
    real = time.sleep
    monkeypatch.setattr(object_store.time, "sleep", lambda seconds: real(seconds if seconds > 0.9 else seconds / 100))
    monkeypatch.setattr(object_store, "_MAX_WAIT_SECONDS", 0.9)
    found = Bucket()
    yield found
    found.server.shutdown()
    found.server.server_close()


def listed(tmp_path: Path, *ids: str) -> Path:
    path = tmp_path / "ids.txt"
    path.write_text("\n".join(ids))
    return path


def tree(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def rejects_of(folder: Path) -> list[tuple[str, str, str, str]]:
    rows = map(json.loads, (folder / "rejects.jsonl").read_text().splitlines())
    return [(row["article"], row["file"], row["kind"], row["reason"]) for row in rows]


@pytest.mark.parametrize(
    "faults",
    [
        [500, 503, 429],
        ["dropped", "dropped"],
        ["truncated", "truncated"],
        ["wrong"],
        ["trickle"],
        [(503, {"Retry-After": "1"})],
        [(429, {"Retry-After": "<date>"})],
        [500, "truncated", "wrong", "dropped", 502],
    ],
    ids=str,
)
def test_an_object_arrives_right_in_spite_of_faults(bucket, faults):
    data = os.urandom(50_000)
    bucket.objects["PMC1.1/x.jpg"] = data
    bucket.faults["PMC1.1/x.jpg"] = list(faults)
    store = HttpStore(bucket.address, patience_seconds=1)
    start = time.monotonic()
    assert store.read("PMC1.1/x.jpg", hashlib.md5(data).hexdigest()) == data
    assert bucket.requests["PMC1.1/x.jpg"] == len(faults) + 1
    if isinstance(faults[0], tuple):
        assert time.monotonic() - start >= 0.9  # as Retry-After asks


@pytest.mark.parametrize(
    "asked, seconds",
    [("7", 7), (" 7 ", 7), ("9999", 600), ("9" * 5000, 0), ("soon", 0), ("-1", 0),
     ("Fri, 31 Dec 9999 23:59:59 GMT", 600), ("Wed, 21 Oct 2015 07:28:00 GMT", 0), ("1 Jan 99999999999999 0:0 GMT", 0)],
)  # fmt: skip
def test_retry_after_is_read_as_a_number_or_a_date(asked, seconds):
    assert object_store._retry_after_seconds({"Retry-After": asked}) == seconds
    assert object_store._retry_after_seconds({}) == 0


def test_faults_that_last_are_reported_and_told_apart(bucket):
    bucket.objects = {"a": b"x" * 2000, "b": b"y" * 2000, "c": b"z"}
    store = HttpStore(bucket.address, patience_seconds=1)
    bucket.faults = {"a": [500] * 20, "b": ["wrong"] * 20}
    with pytest.raises(FetchError, match=r"status 500 \(6 attempts\)"):
        store.read("a")
    with pytest.raises(SourceError, match="wrong MD5"):  # by its ETag
        store.read("b")
    with pytest.raises(SourceError, match="wrong MD5"):
        store.read("c", "0" * 32)
    with pytest.raises(SourceError, match="not found"):
        store.read("d")
    with pytest.raises(SourceError, match="larger than 0 MiB"):
        bucket.faults.clear()
        store.read("a", limit=1000)
    assert bucket.requests["a"] == 7 and bucket.requests["d"] == 1
    with pytest.raises(FetchError, match="6 attempts"):
        HttpStore("http://127.0.0.1:1").read("a")


def test_selection_by_ids_prefix_and_inventory(bucket, tmp_path):
    for number, version in ((7, 1), (7, 2), (71, 1), (8, 1), (1000, 3)):
        bucket.put_article(number, version, figures=0)
    store = HttpStore(bucket.address)

    def chosen(**options) -> list[str]:
        return list(select(store, **{"ids": None, "inventory": "", "prefix": "", **options}))

    assert chosen() == ["PMC7.1,2", "PMC8.1", "PMC71.1", "PMC1000.3"]  # two pages of the list
    assert chosen(prefix="PMC7") == ["PMC7.1,2", "PMC71.1"]
    assert chosen(ids=listed(tmp_path, "PMC8", "7.2", "PMC8")) == ["PMC8", "PMC7.2"]
    rows = "".join(f'"pmc-oa-opendata","{urllib.parse.quote(key)}","2026-10-01","0"\n' for key in bucket.objects)
    (tmp_path / "inventory.csv.gz").write_bytes(gzip.compress(rows.encode()))
    assert chosen(inventory=str(tmp_path / "inventory.csv.gz")) == chosen()
    base = "inventory-reports/pmc-oa-opendata/metadata"
    half = rows.splitlines(keepends=True)
    for date, lines in (("2026-10-01", half[:3]), ("2026-10-02", half)):
        data = gzip.compress("".join(lines).encode())
        manifest = {"files": [{"key": f"{base}/data/{date}.csv.gz", "MD5checksum": hashlib.md5(data).hexdigest()}]}
        bucket.objects[f"{base}/data/{date}.csv.gz"] = data
        bucket.objects[f"{base}/{date}/manifest.json"] = json.dumps(manifest).encode()
    assert chosen(inventory="latest") == chosen()
    with pytest.raises(SourceError, match="not the id"):
        chosen(ids=listed(tmp_path, "PMC1", "https://example.org"))
    with pytest.raises(SourceError, match="cannot be read"):
        chosen(inventory=str(tmp_path / "nowhere.csv"))


def test_the_version_and_the_rules(bucket):
    bucket.put_article(1, 1)
    bucket.put_article(1, 2)
    bucket.put_article(1, 3, is_manuscript=True)
    bucket.put_article(2, 1, is_manuscript=True, license_code="TDM")
    bucket.put_article(3, 1, is_retracted=True)
    bucket.put_article(4, 1, license_code="CC BY-NC-ND")
    bucket.put_article(5, 1, license_code=None)
    bucket.put_article(6, 1, is_pmc_openaccess=False)
    store = HttpStore(bucket.address)

    def problem(item: str, rules: Rules) -> str:
        return choose_version(store, item)[0].problem(rules)

    version, others = choose_version(store, "PMC1")
    assert version.name == "PMC1.2" and [name for _, name, _ in others] == ["PMC1.3", "PMC1.1"]
    assert choose_version(store, "PMC1.1,3")[0].name == "PMC1.1"
    assert choose_version(store, "PMC1.3")[0].name == "PMC1.3"
    assert sorted(version.media) == ["PMC1.2/fig-0.jpg", "PMC1.2/fig-1.jpg"]
    everything = Rules()
    assert problem("PMC2", everything) == "author manuscript without Creative Commons licence"
    assert problem("PMC3", everything) == "retracted"
    assert problem("PMC3", Rules(keep_retracted=True)) == ""
    assert problem("PMC6", everything) == "not open access"
    for license, reason in (("all", ""), ("noncommercial", ""), ("commercial", "licence not commercial: CC BY-NC-ND")):
        assert problem("PMC4", Rules(license)) == reason
    assert problem("PMC5", Rules("commercial")) == ""  # the XML has to tell
    with pytest.raises(SourceError, match="no such article"):
        choose_version(store, "PMC99")


@pytest.mark.parametrize(
    "change",
    [
        {"xml_url": "s3://b/PMC2.1/PMC2.1.xml?md5=" + "0" * 32},
        {"xml_url": "s3://b/PMC1.1/..%2f..%2fetc?md5=" + "0" * 32},
        {"media_urls": ["s3://b/PMC1.1/../x.jpg?md5=" + "0" * 32]},
        {"media_urls": ["s3://b/PMC1.1/.hidden.jpg?md5=" + "0" * 32]},
        {"media_urls": ["s3://b/PMC1.1/x.jpg"]},
        {"media_urls": 5},
        {"pmcid": "PMC2"},
        {"is_retracted": "no"},
    ],
    ids=str,
)
def test_metadata_that_lie_are_refused(bucket, change):
    bucket.put_article(1, 1, **change)
    with pytest.raises(SourceError, match="broken metadata"):
        choose_version(HttpStore(bucket.address), "PMC1")


def test_fetch_mirrors_what_may_be_and_reports_the_rest(bucket, tmp_path, caplog):
    for number in range(1, 6):
        bucket.put_article(number)
    bucket.put_article(2, 2, is_manuscript=True)
    bucket.put_article(3, is_retracted=True)
    bucket.put_article(4, license_code="CC BY-NC")
    bucket.put_article(5, license_code=None)  # and its XML says nothing
    bucket.put_article(6)
    bucket.put_article(7)
    del bucket.objects["PMC6.1/fig-1.jpg"]
    bucket.faults = {"PMC1.1/fig-0.jpg": [500, "truncated"], "PMC7.1/fig-0.jpg": [503] * 6}
    ids = listed(tmp_path, *(f"PMC{number}" for number in range(1, 9)))
    out = tmp_path / "mirror"
    config = FetchConfig(out, source=bucket.address, ids=ids, license="commercial", connections=3)
    assert fetch(config) == 1
    assert rejects_of(out)[:-2] == [
        ("PMC2", "PMC2.2", "reject", "other version: PMC2.1 is used"),
        ("PMC3", "PMC3.1", "reject", "retracted"),
        ("PMC4", "PMC4.1", "reject", "licence not commercial: CC BY-NC"),
        ("PMC5", "PMC5.1", "reject", "licence not commercial: not stated"),
        ("PMC6", "PMC6.1/fig-1.jpg", "reject", "not found"),
    ]
    assert [row[:3] for row in rejects_of(out)[-2:]] == [("PMC7", "PMC7", "failure"), ("PMC8", "PMC8", "reject")]
    assert sorted(Mirror(out).keys("metadata/")) == [f"metadata/PMC{number}.1.json" for number in (1, 2, 6)]
    assert fetch(config) == 0  # the seventh now, and nothing a second time
    assert bucket.requests["PMC1.1/fig-1.jpg"] == 1
    found = tree(out)
    found.pop("rejects.jsonl")
    kept = [f"PMC{number}.1/" for number in (1, 2, 6, 7)]
    expected = {key: data for key, data in bucket.objects.items() if key.startswith(tuple(kept)) and "xlsx" not in key}
    expected |= {f"metadata/{name[:-1]}.json": bucket.objects[f"metadata/{name[:-1]}.json"] for name in kept}
    assert found == expected
    # An update fetches what has changed, that alone.
    bucket.put_article(1, citation="new")
    bucket.put_article(7, is_retracted=True)
    bucket.objects["PMC2.1/fig-0.jpg"] += b"more"
    before = bucket.requests.copy()
    assert fetch(FetchConfig(out, source=bucket.address, ids=ids, license="commercial", update=True)) == 0
    assert json.loads((out / "metadata/PMC1.1.json").read_bytes())["citation"] == "new"
    assert bucket.requests["PMC1.1/fig-0.jpg"] == before["PMC1.1/fig-0.jpg"]
    assert not (out / "metadata/PMC7.1.json").exists() and (out / "metadata/PMC6.1.json").exists()


def test_a_mirror_and_its_bucket_give_the_same_dataset(bucket, tmp_path):
    for number in range(1, 20):
        bucket.put_article(number)
    bucket.put_article(3, is_retracted=True)
    bucket.put_article(4, license_code="CC BY-NC")
    bucket.put_article(5, 2)
    (tmp_path / "ids").mkdir()
    ids = listed(tmp_path / "ids", *(f"PMC{number}.1" for number in range(6, 20)), "PMC3", "PMC4", "PMC5")
    assert fetch(FetchConfig(tmp_path / "mirror", source=bucket.address, prefix="PMC")) == 0
    options = {"workers": 1, "test_fraction": 0.3, "license": "commercial"}
    build(IngestConfig(str(tmp_path / "mirror"), tmp_path / "a", **options))
    build(IngestConfig(bucket.address, tmp_path / "b", prefix="PMC", **options))
    names = [path.name for path in (tmp_path / "a").glob("*.*") if path.suffix in (".tar", ".json")]
    for name in set(names) - {"dataset.json"}:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert verify(tmp_path / "a") == [] and len(names) >= 5
    rows = {row["key"]: row for row in pq.read_table(tmp_path / "b/manifest.parquet").to_pylist()}
    row = rows["PMC5_f1"]
    found = (row["version"], row["retracted"], row["citation"], row["licence"], row["caption"])
    assert found == ("PMC5.2", False, "J. 5", "CC BY", "Text 0 of PMC5.2")
    rejects = [tuple(row.values()) for row in pq.read_table(tmp_path / "b/rejects.parquet").to_pylist()]
    assert sorted(rejects) == [
        ("PMC3", "", "PMC3.1", "retracted"),
        ("PMC4", "", "PMC4.1", "licence not commercial: CC BY-NC"),
        ("PMC5", "", "PMC5.1", "other version: PMC5.2 is used"),
    ]
    build(IngestConfig(bucket.address, tmp_path / "c", ids=ids, **options))
    build(IngestConfig(str(tmp_path / "mirror"), tmp_path / "d", ids=ids, **options))
    for name in ("c", "d"):
        found = {row["article"] for row in pq.read_table(tmp_path / name / "manifest.parquet").to_pylist()}
        assert found == {f"PMC{number}" for number in range(5, 20)}


def test_a_build_from_a_bucket_that_fails_goes_on_where_it_was(bucket, tmp_path):
    for number in range(1, 40):
        bucket.put_article(number, figures=1)
    config = IngestConfig(bucket.address, tmp_path / "out", prefix="PMC", workers=1, test_fraction=0.2)
    bucket.faults = {"PMC20.1/fig-0.jpg": [500] * 6}
    with pytest.raises(UserError, match="1 of 3 packages could not be fetched.*run it again"):
        build(config)
    assert not (tmp_path / "out").exists()
    before = bucket.requests["PMC1.1/fig-0.jpg"]
    build(config)
    assert bucket.requests["PMC1.1/fig-0.jpg"] == before
    build(IngestConfig(bucket.address, tmp_path / "other", prefix="PMC", workers=1, test_fraction=0.2))
    assert tree(tmp_path / "out") == tree(tmp_path / "other")


def test_damage_to_a_mirror_is_noticed(bucket, tmp_path):
    bucket.put_article(1)
    bucket.put_article(2)
    out = tmp_path / "mirror"
    assert fetch(FetchConfig(out, source=bucket.address, prefix="PMC")) == 0
    (out / "PMC1.1/fig-0.jpg").write_bytes(noise(5))
    (out / "PMC2.1/PMC2.1.xml").write_bytes(b"<article/>")
    build(IngestConfig(str(out), tmp_path / "out", workers=1, test_fraction=0.0))
    rejects = [tuple(row.values()) for row in pq.read_table(tmp_path / "out/rejects.parquet").to_pylist()]
    assert rejects == [("PMC1", "F1", "fig-0.jpg", "wrong MD5"), ("PMC2", "", "PMC2.1/PMC2.1.xml", "wrong MD5")]


def test_a_killed_fetch_leaves_nothing_half_written(bucket, tmp_path):
    for number in range(1, 9):
        bucket.put_article(number)
    out = tmp_path / "mirror"
    code = (
        "import sys; from pathlib import Path; from bclip_fast.ingest.fetch import FetchConfig, fetch;"
        "fetch(FetchConfig(Path(sys.argv[1]), source=sys.argv[2], prefix='PMC', connections=2))"
    )
    for attempt in range(4):
        bucket.faults = {f"PMC{2 * attempt + 2}.1/fig-1.jpg": ["trickle"] * 3}
        process = subprocess.Popen([sys.executable, "-c", code, str(out), bucket.address])
        deadline = time.monotonic() + 120
        while not bucket.requests[f"PMC{2 * attempt + 2}.1/fig-1.jpg"] and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        for key, data in tree(out).items():
            if not Path(key).name.startswith((".", "rejects")):
                assert data == bucket.objects[key]
    bucket.faults = {}
    assert fetch(FetchConfig(out, source=bucket.address, prefix="PMC")) == 0
    found = {key: data for key, data in tree(out).items() if not Path(key).name.startswith((".", "rejects"))}
    assert found == {key: data for key, data in bucket.objects.items() if "xlsx" not in key}


@pytest.mark.parametrize(
    "options, words",
    [
        ({}, "give exactly one of"),
        ({"prefix": "PMC", "inventory": "latest"}, "give exactly one of"),
        ({"prefix": "P", "source": "x"}, "address"),
    ],
)
def test_a_fetch_must_say_what(tmp_path, options, words):
    with pytest.raises(UserError, match=words):
        FetchConfig(tmp_path, **options)
