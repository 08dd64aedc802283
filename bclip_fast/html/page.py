"""Templates, filters and thumbnails of the reports.

Captions, labels and keys are untrusted data. jinja2 escapes them all, and images are decoded and encoded again. The
templates' content security policy forbids a page to load or run anything.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable
from typing import Any

import jinja2

from bclip_fast.data.image_files import read_rgb

from . import chart

THUMBNAIL_SIZE = 224


def environment() -> jinja2.Environment:
    """Return the templates and their filters. They escape all text."""
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("bclip_fast.html"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"score": format_score, "spread": format_spread, "ratio": format_ratio, "number": chart.number}
    return templates


def format_score(value: float | None, unit: str) -> str:
    """Format a share in per cent with one decimal, a rank with at most one decimal, and None as a dash."""
    if value is None:
        return "\u2013"
    if unit == "share":
        return f"{100 * value:.1f} %"
    return f"{value:,.0f}" if value == round(value) else f"{value:,.1f}"


def format_spread(metric: dict[str, Any]) -> str:
    """Format a deviation as `+-1.2`, or else the 95 % interval as `27.3 to 30.1`, or else a dash."""
    scale = 100 if metric["unit"] == "share" else 1
    if metric.get("deviation") is not None:
        return f"\u00b1{scale * metric['deviation']:.1f}"
    if metric["interval"] is None:
        return "\u2013"
    return " to ".join(f"{scale * end:,.1f}" for end in metric["interval"])


def format_ratio(metric: dict[str, Any]) -> str:
    """Format how many times better than chance a score is, as `4.20x`. A chance baseline of zero gives a dash."""
    value, chance = metric["value"], metric["chance"]
    better, worse = (value, chance) if metric["higher_is_better"] else (chance, value)
    ratio = better / worse if worse else math.inf
    return f"{ratio:.2f}\u00d7" if ratio < 10 else f"{ratio:,.0f}\u00d7" if math.isfinite(ratio) else "\u2013"


def thumbnail(data: bytes, name: Callable[[], str]) -> str:
    """Return an image as a `data:` URL: an RGB JPEG without metadata, at most `THUMBNAIL_SIZE` pixels on each side.

    Raises UserError, with the image's `name`, if the data cannot be decoded.
    """
    image = read_rgb(data, name)
    image.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
