"""Templates, filters and thumbnails of the reports.

Captions, labels and keys come from data nobody vouches for: jinja2 escapes them, and images are decoded and encoded
again. The templates' content security policy forbids a page to load or run anything.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable
from typing import Any

import jinja2

from ..data.images import open_image
from . import chart

THUMBNAIL_SIZE = 224


def environment() -> jinja2.Environment:
    """The templates and their filters. All text is escaped."""
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("bclip_fast.html"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"figure": format_figure, "spread": format_spread, "ratio": format_ratio, "number": chart.number}
    return made


def format_figure(value: float | None, unit: str) -> str:
    """A share as per cent with one decimal, a rank with one decimal where it has one, None as a dash."""
    if value is None:
        return "\u2013"
    if unit == "share":
        return f"{100 * value:.1f} %"
    return f"{value:,.0f}" if value == round(value) else f"{value:,.1f}"


def format_spread(figure: dict[str, Any]) -> str:
    """The 95 % interval as `27.3 to 30.1`, a deviation as `+-1.2`, a dash where there is neither."""
    scale, digits = (100, 1) if figure["unit"] == "share" else (1, 1)
    if figure.get("deviation") is not None:
        return f"\u00b1{scale * figure['deviation']:.{digits}f}"
    if figure["interval"] is None:
        return "\u2013"
    return " to ".join(f"{scale * end:,.{digits}f}" for end in figure["interval"])


def format_ratio(figure: dict[str, Any]) -> str:
    """How many times better than chance, as `4.20x`; a dash where chance is zero."""
    value, chance = figure["value"], figure["chance"]
    better, worse = (value, chance) if figure["higher_is_better"] else (chance, value)
    ratio = better / worse if worse else math.inf
    return f"{ratio:.2f}\u00d7" if ratio < 10 else f"{ratio:,.0f}\u00d7" if math.isfinite(ratio) else "\u2013"


def thumbnail(data: bytes, name: Callable[[], str]) -> str:
    """The image as a `data:` address: an RGB JPEG of at most `THUMBNAIL_SIZE` pixels a side, without metadata."""
    image = open_image(data, name).convert("RGB")
    image.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
