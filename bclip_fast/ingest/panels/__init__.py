"""Split a composite figure into panels with their parts of the caption, but only if image and caption agree.

`caption_labels` and `captions` read the caption, `letters` and `glyphs` the printed letters, and `regions` and `layout`
cut the image. With `--panel_model`, a `detector` finds further boxes. `matching` decides. Where they don't agree, a
panel is left out: precision matters more than recall.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

from bclip_fast.data.image_files import ImageError, open_image
from bclip_fast.ingest.sanitize import MAX_PIXELS

from .captions import Part, caption_parts, split_caption
from .layout import layout
from .matching import match_panels
from .regions import Box

__all__ = ["Panel", "Part", "caption_parts", "layout", "match_panels", "split_caption", "split_panels"]


@dataclass(frozen=True)
class Panel:
    """A panel. `box`: (left, top, right, bottom) in pixels of the figure. `image`: PNG. `spans`: own text."""

    label: str
    box: Box
    image: bytes
    caption: str
    spans: tuple[tuple[int, int], ...] = ()


def split_panels(data: bytes, caption: str, boxes: Sequence[Sequence[float]] | str | None = None) -> list[Panel]:
    """Return the panels of a figure that `sanitize` accepts, in the order of their labels. Doubtful ones are left out.

    Args:
        boxes: a detector's boxes, each (left, top, right, bottom, score) in pixels of the figure. `match_panels` tells
            where they count. A string is the reason why the detector found none.
    """
    parts = {part.label: part for part in caption_parts(caption)}
    if not any(part.is_certain for part in parts.values()):
        return []
    try:
        image = open_image(data, MAX_PIXELS).rgb()
    except ImageError:
        return []
    candidates = [_whole(box) for box in boxes or ()] if not isinstance(boxes, str) else []
    panels = []
    for match in match_panels(image, list(parts), candidates):
        part = parts[match.label]
        if part.is_certain:
            buffer = io.BytesIO()
            image.crop(match.box).save(buffer, "PNG", compress_level=1)
            panels.append(Panel(match.label, match.box, buffer.getvalue(), part.text, part.spans))
    return panels


def _whole(box: Sequence[float]) -> Box:
    return int(box[0]), int(box[1]), int(box[2]), int(box[3])
