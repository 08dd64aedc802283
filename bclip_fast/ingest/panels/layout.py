"""Find the panels of a composite figure without printed letters in its image.

The image is cut along rows and columns of background, the widest first, into as many parts as the caption has labels.
These gaps must be clearly wider than the remaining ones. The parts must form one row or one column of panels of similar
size, or two rows of which the second is shorter and centred.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .regions import Box

# The layout is determined on a copy whose longer side has at most this many pixels.
_WORKING_SIDE = 600
_WHITE, _BLACK = 242, 12
# Share of a row or column that may be JPEG artefacts. Such a row or column still counts as background.
_MAX_SPECKS = 0.004
# Least ratio of the narrowest gap with a cut to the widest gap without one.
_MIN_GAP_RATIO = 1.3
# Least ratio of the smallest panel's area to the largest panel's.
_MIN_AREA_RATIO = 0.5
# Pixels of the copy.
_MAX_PADDING = 9
# Least share of the figure that the panels cover.
_MIN_FILL = 0.5
# Largest distance between the left sides of a column's panels, as a share of the figure's width.
_MAX_COLUMN_OFFSET = 0.05


def layout(image: Image.Image, labels: list[str]) -> list[Box]:
    """Return the boxes of the panels in reading order, one for each label. Empty if the layout is not clear."""
    scale = min(1.0, _WORKING_SIDE / max(image.size))
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    pixels = np.asarray(image.resize(size, Image.Resampling.BOX)).astype(np.int16)
    for background in (pixels.min(axis=2) >= _WHITE, pixels.max(axis=2) <= _BLACK):
        boxes, gap = _cut(~background, len(labels))
        rows = _grid(boxes, labels) if boxes else []
        if rows:
            # The limit for artefacts also discards thin text at the edge. The text lies within half a gap.
            padding = min(gap // 2, _MAX_PADDING)
            enlarged = [[_enlarged(_padded(box, padding, size), size, image) for box in row] for row in rows]
            return _in_order(enlarged)
    return []


def in_order(boxes: list[Box], labels: list[str]) -> list[Box]:
    """Return candidate boxes in the order of the labels. Empty unless they form a clear row or column, one a label."""
    rows = _grid(boxes, labels) if len(boxes) == len(labels) else []
    return _in_order(rows) if rows else []


def _in_order(rows: list[list[Box]]) -> list[Box]:
    """Return the panels in reading order. Empty in a grid, where the letters may run along the rows or the columns."""
    is_row_or_column = len(rows) == 1 or len(rows[0]) == 1
    return [box for row in rows for box in row] if is_row_or_column or _has_centred_last_row(rows) else []


def _has_centred_last_row(rows: list[list[Box]]) -> bool:
    """Return whether the last row of two is shorter and lies between columns, so that the columns have no order."""
    offsets = [abs(box[0] - above[0]) for box in rows[-1] for above in rows[0]]
    width = max(box[2] for box in rows[0]) - rows[0][0][0]
    return len(rows) == 2 and len(rows[-1]) < len(rows[0]) and min(offsets) > 2 * _MAX_COLUMN_OFFSET * width


def _enlarged(box: Box, size: tuple[int, int], image: Image.Image) -> Box:
    """Return a box of the working copy, whose size is `size`, in pixels of the image."""
    across, down = image.width / size[0], image.height / size[1]
    right, bottom = min(image.width, round(box[2] * across)), min(image.height, round(box[3] * down))
    return int(box[0] * across), int(box[1] * down), right, bottom


def _padded(box: Box, by: int, size: tuple[int, int]) -> Box:
    left, top, right, bottom = box
    return max(0, left - by), max(0, top - by), min(size[0], right + by), min(size[1], bottom + by)


@dataclass
class _Part:
    """A part of the figure. `gap`: pixels of its widest inner gap, or 0. `span`: start and end of the gap on `axis`."""

    box: Box
    gap: float
    axis: int = 0
    span: tuple[int, int] = (0, 0)


def _cut(ink: np.ndarray, count: int) -> tuple[list[Box], int]:
    """Cut the part with the widest gap until there are `count` parts. Return their boxes and the narrowest gap.

    Return no boxes if the gaps are not clearly wider than the remaining ones.
    """
    first = _part(ink, (0, 0, ink.shape[1], ink.shape[0]))
    if first is None:
        return [], 0
    parts, narrowest = [first], float("inf")
    while True:
        widest = max(parts, key=lambda part: part.gap)
        if len(parts) == count:
            break
        if widest.gap <= 0 or len(parts) > count:
            return [], 0
        narrowest = min(narrowest, widest.gap)
        parts.remove(widest)
        left, top, right, bottom = widest.box
        start, end = widest.span
        halves = (
            ((left, top, start, bottom), (end, top, right, bottom))
            if widest.axis == 0
            else ((left, top, right, start), (left, end, right, bottom))
        )
        parts += [part for half in halves if (part := _part(ink, half))]
    if count < 2 or narrowest < _MIN_GAP_RATIO * max(widest.gap, 1):
        return [], 0
    return [part.box for part in parts], int(narrowest)


def _part(ink: np.ndarray, box: Box) -> _Part | None:
    """Return the box shrunk to its ink, and its widest gap that leaves enough for a panel on both sides."""
    left, top, right, bottom = box
    inside = ink[top:bottom, left:right]
    lines = [inside.mean(axis=0) > _MAX_SPECKS, inside.mean(axis=1) > _MAX_SPECKS]
    if not lines[0].any() or not lines[1].any():
        return None
    (x0, x1), (y0, y1) = ((int(np.argmax(line)), len(line) - int(np.argmax(line[::-1]))) for line in lines)
    part = _Part((left + x0, top + y0, left + x1, top + y1), 0.0)
    smallest = 0.12 * max(ink.shape)
    for axis, (line, start, end, offset) in enumerate(((lines[0], x0, x1, left), (lines[1], y0, y1, top))):
        edges = np.flatnonzero(np.diff(np.concatenate([[True], line[start:end], [True]]).astype(np.int8)))
        for begin, stop in edges.reshape(-1, 2).tolist():
            if begin >= smallest and end - start - stop >= smallest and stop - begin > part.gap:
                part.gap, part.axis = float(stop - begin), axis
                part.span = (offset + start + begin, offset + start + stop)
    return part


def _grid(boxes: list[Box], labels: list[str]) -> list[list[Box]]:
    """Return the panels in rows. Empty unless they form rows and columns of similar panels that fit the labels."""
    areas = np.array([(right - left) * (bottom - top) for left, top, right, bottom in boxes], float)
    left, top, right, bottom = np.array(boxes).T
    width, height = max(right) - min(left), max(bottom) - min(top)
    if areas.min() < _MIN_AREA_RATIO * areas.max() or areas.sum() < _MIN_FILL * width * height:
        return []
    rows: list[list[Box]] = []
    for box in sorted(boxes, key=lambda box: box[1]):
        for row in rows:
            overlaps = [min(box[3], other[3]) - max(box[1], other[1]) for other in row]
            heights = [min(box[3] - box[1], other[3] - other[1]) for other in row]
            shares = [overlap / height for overlap, height in zip(overlaps, heights, strict=True)]
            if min(shares) > 0.7:
                row.append(box)
                break
            if max(shares) > 0.2:
                return []  # the box overlaps two rows, so the reading order is ambiguous
        else:
            rows.append([box])
    rows = [sorted(row) for row in rows]
    if any(len(row) != len(rows[0]) for row in rows[:-1]) or len(rows[-1]) > len(rows[0]):
        return []
    for row in rows[1:]:
        starts = [abs(box[0] - above[0]) for box, above in zip(row, rows[0], strict=False)]
        if len(row) == len(rows[0]) and max(starts) > _MAX_COLUMN_OFFSET * width:
            return []
    return rows if _fits_labels(rows, labels) else []


def _fits_labels(rows: list[list[Box]], labels: list[str]) -> bool:
    """Return whether the layout fits the labels.

    Letters fit every layout. Positions need one row (left, middle, right) or one column (top, middle, bottom).
    """
    if len(labels[0]) == 1:
        return True
    positions = [re.sub("upper", "top", re.sub("lower", "bottom", label)) for label in labels]
    across = [name for name in ("left", "middle", "right") if name in positions]
    down = [name for name in ("top", "middle", "bottom") if name in positions]
    return (positions == across and len(rows) == 1) or (positions == down and all(len(row) == 1 for row in rows))
