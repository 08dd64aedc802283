"""Split a composite figure into panels with their parts of the caption, but only if image and caption agree.

Caption: the labels A, B, C, ... must come in order, each in front of its text ("(a) ...", "A, ...", "(B-D) ...", or
"Left: ..."). Text before the first label belongs to every panel. Labels after their text ("a cell (a)") give no panels.

Image: it is cut along rows and columns of background, the widest first, into as many parts as the caption has labels.
These gaps must be clearly wider than the remaining ones. The parts must form rows and columns of panels of similar
size, in reading order, where the last row may be shorter. In a grid of several rows and columns, the letters may run
along the rows or down the columns. The printed letters decide (`panel_letters`). All other figures
give no panels: precision matters more than recall.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass

import numpy as np
from PIL import Image

from bclip_fast.data.image_files import ImageError, open_image

from .panel_letters import Box, read_order
from .sanitize import MAX_PIXELS

MAX_PANELS = 12
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
_LETTERS = r"[A-La-l](?:\s?(?:[-\u2013\u2014,&/]|and|to)\s?[A-La-l])*"
_STYLES = (
    re.compile(rf"\(({_LETTERS})\)[.:,]?"),
    re.compile(rf"(?<![\w(])({_LETTERS})[).:,](?=\s)"),
    re.compile(
        r"\b((?:upper|lower|top|bottom|left|right|middle)(?:[ -](?:left|right|middle))?)(?: panels?)?\s?[:,]", re.I
    ),
)
# A label comes in front of its text: at the start of the caption, after punctuation, or after "and".
_BEFORE = re.compile(r"(?:^|[.;:,!?\u2013\u2014)\]]|\band)\s*$")
_SEPARATOR = re.compile(r"\s?(?:([-\u2013\u2014]|TO)|[,&/]|AND)\s?")


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


def split_caption(caption: str) -> dict[str, str]:
    """Return the caption of each panel by its label: A to L, or a position such as "left".

    Empty unless the caption uses one style of labels, in order, without a gap, each with its own text.
    """
    for style in _STYLES:
        labels: list[tuple[list[str], int, int]] = []
        for match in style.finditer(caption):
            names = _expand(match.group(1))
            if names and _BEFORE.search(caption[: match.start()]):
                labels.append((names, match.start(), match.end()))
        parts = _parts(caption, labels)
        if parts:
            return parts
    return {}


def _expand(text: str) -> list[str]:
    """Return the letters of a label such as "A", "A and B" or "A-D", or the position that it names."""
    if len(text) > 2 and re.match(r"(?i)upper|lower|top|bottom|left|right|middle", text):
        return [text.lower().replace(" ", "-")]
    tokens = _SEPARATOR.split(text.upper())
    names = [tokens[0]]
    for is_range, letter in zip(tokens[1::2], tokens[2::2], strict=True):
        first = ord(names[-1]) + 1 if is_range else ord(letter)
        names += [chr(code) for code in range(first, ord(letter) + 1)]
    return names


def _parts(caption: str, candidates: list[tuple[list[str], int, int]]) -> dict[str, str]:
    """Return the caption of each panel. `candidates`: (names, start, end) of each label in the caption."""
    if not candidates:
        return {}
    names_position = len(candidates[0][0][0]) > 1
    expected, kept = 0, []
    for names, start, end in candidates:
        if names_position:
            kept.append((names, start, end))
            continue
        if names != [chr(ord("A") + expected + i) for i in range(len(names))]:
            if names[0] < chr(ord("A") + expected):
                continue  # refers to an earlier panel
            return {}
        expected += len(names)
        kept.append((names, start, end))
    labels = [name for names, _, _ in kept for name in names]
    if not 2 <= len(labels) <= MAX_PANELS or len(set(labels)) != len(labels):
        return {}
    head = caption[: kept[0][1]].strip(" :;,")
    parts = {}
    for i, (names, _, end) in enumerate(kept):
        text = caption[end : kept[i + 1][1] if i + 1 < len(kept) else len(caption)].strip(" ;,")
        text = re.sub(r"\s*\band$", "", text).strip(" ;,")
        if len(re.sub(r"[\W\d_]", "", text)) < 2:
            return {}
        for name in names:
            parts[name] = f"{head} {text}".strip()
    return parts


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
            return _in_order(image, enlarged, labels)
    return []


def _in_order(image: Image.Image, rows: list[list[Box]], labels: list[str]) -> list[Box]:
    """Return the panels in the order of their letters. Empty if the image doesn't show the order."""
    by_rows = [box for row in rows for box in row]
    if len(rows) == 1 or len(rows[0]) == 1 or _has_centred_last_row(rows):
        return by_rows
    order = read_order(image, rows, labels)
    if order == "columns":
        return [row[column] for column in range(len(rows[0])) for row in rows if column < len(row)]
    return by_rows if order == "rows" else []


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
