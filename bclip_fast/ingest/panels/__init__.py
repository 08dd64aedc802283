"""Split a composite figure into panels with their parts of the caption, but only if image and caption agree.

`captions` reads the labels of the caption, `layout` cuts the image, and `letters` reads the printed letters. With
`--panel_model`, a `detector` finds boxes for figures that `layout` cannot cut. Where they don't agree, a figure has no
panels: precision matters more than recall.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

from bclip_fast.data.image_files import ImageError, open_image
from bclip_fast.ingest.sanitize import MAX_PIXELS

from .captions import split_caption
from .layout import layout, layout_of_boxes
from .letters import Box

__all__ = ["Panel", "layout", "split_caption", "split_panels"]


@dataclass(frozen=True)
class Panel:
    """A panel. `box`: (left, top, right, bottom) in pixels of the figure. `image`: PNG of the box."""

    label: str
    box: Box
    image: bytes
    caption: str


def split_panels(data: bytes, caption: str, boxes: Sequence[Sequence[float]] | str | None = None) -> list[Panel]:
    """Return the panels of a figure that `sanitize` accepts, in the order of their labels. In doubt, return none.

    Args:
        boxes: a detector's boxes, each (left, top, right, bottom, score) in pixels of the figure, which count where the
            image's gaps show no layout. A string is the reason why the detector found none.
    """
    parts = split_caption(caption)
    if not parts:
        return []
    try:
        image = open_image(data, MAX_PIXELS).rgb()
    except ImageError:
        return []
    places = layout(image, list(parts))
    if not places and boxes and not isinstance(boxes, str):
        places = layout_of_boxes(image, [_whole(box) for box in boxes], list(parts))
    panels = []
    for (label, text), box in zip(parts.items(), places, strict=False):
        buffer = io.BytesIO()
        image.crop(box).save(buffer, "PNG", compress_level=1)
        panels.append(Panel(label, box, buffer.getvalue(), text))
    return panels


def _whole(box: Sequence[float]) -> Box:
    return int(box[0]), int(box[1]), int(box[2]), int(box[3])
