"""Reads from a bucket: faults are repeated or reported, and every object has its MD5."""

from __future__ import annotations

import os
import time

import pytest

from bclip_fast.ingest import object_store
from bclip_fast.ingest.articles import FetchError, SourceError
from bclip_fast.ingest.object_store import HttpStore
from bclip_fast.io.hashing import md5_of


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
def test_read_transient_faults_are_repeated(bucket, faults):
    data = os.urandom(50_000)
    bucket.objects["PMC1.1/x.jpg"] = data
    bucket.faults["PMC1.1/x.jpg"] = list(faults)
    store = HttpStore(bucket.address, patience_seconds=1)
    start = time.monotonic()
    assert store.read("PMC1.1/x.jpg", md5_of(data)) == data
    assert bucket.requests["PMC1.1/x.jpg"] == len(faults) + 1
    if isinstance(faults[0], tuple):
        assert time.monotonic() - start >= 0.9  # as Retry-After asks


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("7", 7), (" 7 ", 7), ("9999", 600), ("9" * 5000, 0), ("soon", 0), ("-1", 0),
     ("Fri, 31 Dec 9999 23:59:59 GMT", 600), ("Wed, 21 Oct 2015 07:28:00 GMT", 0), ("1 Jan 99999999999999 0:0 GMT", 0)],
)  # fmt: skip
def test_retry_after_is_a_number_or_a_date(header, seconds):
    assert object_store._retry_after_seconds({"Retry-After": header}) == seconds
    assert object_store._retry_after_seconds({}) == 0


def test_read_permanent_faults_are_reported(bucket):
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
    bucket.faults.clear()
    with pytest.raises(SourceError, match="larger than 0 MiB"):
        store.read("a", limit=1000)
    assert bucket.requests["a"] == 7
    assert bucket.requests["d"] == 1
    with pytest.raises(FetchError, match="6 attempts"):
        HttpStore("http://127.0.0.1:1").read("a")
