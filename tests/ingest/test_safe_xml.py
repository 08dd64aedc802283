# ruff: noqa: E501 -- XML reads better unbroken
"""Untrusted XML: encodings are decoded, hostile and broken documents are refused."""

from __future__ import annotations

import time

import pytest
from jats_pieces import HEAD

from bclip_fast.ingest import jats, safe_xml
from bclip_fast.ingest.jats import JatsError


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_parse_other_encodings(encoding):
    text = f"{HEAD}<body><fig><caption><p>\u03b2</p></caption></fig></body></article>"
    assert jats.parse(text.encode(encoding)).figures[0].caption == "\u03b2"


BOMB = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 12))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (f'<!DOCTYPE article [<!ENTITY l0 "ha">{BOMB}]><article><p a="&l11;">&l11;</p></article>', "entities of its own"),
        ('<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><article>&x;</article>', "entities of its own"),
        ('<!DOCTYPE a [<!ENTITY % x SYSTEM "http://127.0.0.1:9/x.dtd">%x;]><article/>', "entities of its own"),
        ("<!DOCTYPE article [", "DOCTYPE does not end"),
        ("<article><body></article>", "broken XML"),
        ("<article><!DOCTYPE a [<!ENTITY x 'y'>]>&x;</article>", "broken XML"),
        ("<article>" + "<p>" * 100_000 + "</p>" * 100_000 + "</article>", "broken XML"),
        ("<article>" + "<!--" * 500_000, "broken XML"),
        ("<article>\x00</article>", "control characters"),
        ('<?xml version="1.0" encoding="punycode"?><article/>', "unknown encoding"),
        ("<html><body/></html>", "root is <html>"),
        ("", "broken XML"),
        ("<article>" + "<a/>" * (safe_xml.MAX_TAGS + 1) + "</article>", "more than"),
        (" " * (safe_xml.MAX_XML_BYTES + 1), "larger than"),
    ],
)  # fmt: skip
def test_parse_hostile_or_broken_xml_is_refused_quickly(text, reason):
    start = time.process_time()
    with pytest.raises(JatsError, match=reason) as caught:
        jats.parse(text.encode())
    assert "\n" not in str(caught.value)
    assert time.process_time() - start < 5


def test_parse_external_dtd_is_not_read(tmp_path):
    dtd = tmp_path / "x.dtd"
    dtd.write_text('<!ENTITY hello "read from disk">')
    text = f'<!DOCTYPE article SYSTEM "{dtd.as_uri()}">{HEAD}<body><fig><caption><p>a &hello; b</p></caption></fig></body></article>'
    assert jats.parse(text.encode()).figures[0].caption == "a &hello; b"
