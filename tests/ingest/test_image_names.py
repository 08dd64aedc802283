"""The href of a figure finds its image file, or a reason."""

from __future__ import annotations

import pytest

from bclip_fast.ingest.articles import SourceError
from bclip_fast.ingest.image_names import ImageNames


@pytest.mark.parametrize(
    ("names", "href", "expected"),
    [
        (["a/x.jpg", "b/x.jpg"], "a/x", "a/x.jpg"),
        (["a/x.jpg", "b/x.jpg"], "x", "ambiguous href"),
        (["x.jpg", "b/x.jpg"], "x", "x.jpg"),
        (["x.jpg", "X.jpg"], "X.tif", "X.jpg"),
        (["xy.jpg", "xY.jpg"], "XY", "ambiguous href"),
        (["x.1.jpg", "x.10.jpg"], "x.1", "x.1.jpg"),
        (["x.tif.jpg"], "x.tif", "x.tif.jpg"),
        (["x.jpg"], "http://example.org/../x", "x.jpg"),
        (["x.jpg"], "..\\x", "unsafe href"),
        (["x.jpg"], "%2e%2e/x", "unsafe href"),
        (["x.jpg"], "./x.gif", "x.jpg"),
        (["x.jpg"], "", "image missing"),
        (["x.jpg"], ".jpg", "image missing"),
        ([], "x", "image missing"),
    ],
)
def test_find_href_returns_file_or_reason(names, href, expected):
    try:
        result = ImageNames(names).find([href])
    except SourceError as error:
        result = str(error)
    assert result == expected
