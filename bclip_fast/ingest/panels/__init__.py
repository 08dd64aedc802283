"""Split a composite figure into panels with their parts of the caption, but only if image and caption agree.

`captions` reads the labels of the caption, `layout` cuts the image, and `letters` reads the printed letters. Where they
don't agree, a figure gives no panels: precision matters more than recall.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

from bclip_fast.data.image_files import ImageError, open_image
from bclip_fast.ingest.sanitize import MAX_PIXELS

from .captions import split_caption
from .layout import layout
from .letters import Box

__all__ = ["Panel", "layout", "split_caption", "split_panels"]


@dataclass(frozen=True)
class Panel:
    """A panel. `box`: (left, top, right, bottom) in pixels of the figure. `image`: PNG of the box."""

    label: str
    box: Box
    image: bytes
    caption: str


def split_panels(data: bytes, caption: str) -> list[Panel]:
    """Return the panels of a figure that `sanitize` accepts, in the order of their labels. In doubt, return none."""
    parts = split_caption(caption)
    if not parts:
        return []
    try:
        image = open_image(data, MAX_PIXELS).rgb()
    except ImageError:
        return []
    boxes = layout(image, list(parts))
    panels = []
    for (label, text), box in zip(parts.items(), boxes, strict=False):
        buffer = io.BytesIO()
        image.crop(box).save(buffer, "PNG", compress_level=1)
        panels.append(Panel(label, box, buffer.getvalue(), text))
    return panels
