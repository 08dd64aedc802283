"""Split a composite figure into panels with their parts of the caption, but only if image and caption agree.

`caption_labels` and `captions` read the caption, `letters` and `glyphs` the printed letters, and `regions` and `layout`
cut the image. `matching` decides. Where they don't agree, a panel is left out: precision matters more than recall.
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


def split_panels(data: bytes, caption: str, boxes: Sequence[Box] | None = None) -> list[Panel]:
    """Return the panels of a figure that `sanitize` accepts, in the order of their labels. Doubtful ones are left out.

    Args:
        boxes: candidates of a detector, see `match_panels`.
    """
    parts = {part.label: part for part in caption_parts(caption)}
    if not any(part.is_certain for part in parts.values()):
        return []
    try:
        image = open_image(data, MAX_PIXELS).rgb()
    except ImageError:
        return []
    panels = []
    for match in match_panels(image, list(parts), boxes):
        part = parts[match.label]
        if part.is_certain:
            buffer = io.BytesIO()
            image.crop(match.box).save(buffer, "PNG", compress_level=1)
            panels.append(Panel(match.label, match.box, buffer.getvalue(), part.text, part.spans))
    return panels
