"""The comparison of JATS parsers names the classes of differences, with examples."""

from __future__ import annotations

import sys
import types

import pytest
from articles import write_files
from jats_pieces import HEAD

from benchmarks.jats_compare import compare, main, plain_captions, relation

BODY = (
    '<fig id="same"><caption><p>Liver.</p></caption><graphic xlink:href="1.tif"/></fig>'
    '<fig id="power"><caption><p>Plated 10<sup>6</sup> cells.</p></caption><graphic xlink:href="2"/></fig>'
    '<fig id="cited"><caption><p>As before<xref ref-type="bibr" rid="b">12</xref>, again.</p></caption></fig>'
    '<fig-group><caption><p>Both.</p></caption><fig id="member"><caption><p>Left.</p></caption></fig></fig-group>'
    '<fig id="two"><caption specific-use="print"><p>See page 3.</p></caption><caption><p>Kidney.</p></caption></fig>'
)


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ("A b.", "A  b.", ""),
        ("10 6 cells", "106 cells", "digits apart"),
        ("", "x", "no caption in ours"),
        ("x", "", "no caption in theirs"),
        ("Both. Left.", "Left.", "more text in ours"),
        ("Left.", "Both. Left.", "more text in theirs"),
        ("before, again", "before12, again", "more text inside theirs"),
        ("before12, again", "before, again", "more text inside ours"),
        ("abc", "xyz", "another text"),
    ],
)
def test_relation_of_two_texts(ours, theirs, expected):
    assert relation(ours, theirs) == expected


def test_comparison_lists_classes_and_examples(tmp_path, monkeypatch, capsys):
    xml = f"{HEAD}<front/><body>{BODY}</body></article>".encode()
    write_files(tmp_path, {"a/x.nxml": xml, "b/broken.xml": b"<article>"})
    monkeypatch.setitem(sys.modules, "pubmed_parser", None)
    main(tmp_path, 1)
    printed = capsys.readouterr().out
    assert "pubmed_parser is not installed" in printed
    assert "plain extraction: 2 figures equal, 3 different, 0 files lost" in printed
    differences = compare([tmp_path / "a/x.nxml"], plain_captions)
    assert differences.classes == {
        "more text inside theirs, references": 1,
        "more text in ours, in a group": 1,
        "another text, several captions": 1,
    }
    assert differences.examples["more text in ours, in a group"] == [("x.nxml#member", "Both. Left.", "Left.")]
    # Another parser: it loses a figure and reads "106".
    rows = [
        {"fig_id": "same", "fig_caption": "Liver.", "graphic_ref": "1"},
        {"fig_id": "power", "fig_caption": "Plated 106 cells.", "graphic_ref": "3"},
    ]
    monkeypatch.setitem(sys.modules, "pubmed_parser", types.SimpleNamespace(parse_pubmed_caption=lambda path: rows))
    main(tmp_path, 1)
    printed = capsys.readouterr().out
    assert "pubmed_parser: 1 figures equal, 4 different, 0 files lost" in printed
    assert "1  digits apart" in printed
    assert printed.count("figure only in ours") == 3
