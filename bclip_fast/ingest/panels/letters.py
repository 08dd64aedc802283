"""Read the order of panels from their printed letters: along the rows of a grid, or down its columns.

Each letter is compared with only two letters, those that the two orders expect in its place. The letters of a figure
have one size, and one place relative to their panels, which starts with the letter A of the first panel.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Box = tuple[int, int, int, int]

# The letters are sought on a copy whose longer side has at most this many pixels.
_WORKING_SIDE = 1600
_DARK, _LIGHT = 110, 190
# Pixels.
_MIN_HEIGHT, _MAX_HEIGHT = 7, 64
# Least distance between letters, as a share of their height, unless the neighbour is a bracket or a dot.
_MIN_DISTANCE = 0.6
# Part of the panel's cell, at its top and at its bottom, that may hold the letter.
_STRIP = 0.3
# Largest difference between the places of two letters, as a share of the panel's width and height. A letter may stand
# in the gap to the left of its panel.
_MAX_ACROSS, _MAX_DOWN = 0.25, 0.15
_MAX_HEIGHT_RATIO = 1.4
_TEMPLATE_SIDE = 24
# Least correlation of the first letter with its template. Least one of the others, and its least advantage.
_MIN_FIRST_CORRELATION = 0.55
_MIN_CORRELATION = 0.45
_MIN_ADVANTAGE = 0.1


@dataclass(frozen=True)
class _Glyph:
    """A connected area of ink that may be a letter. `box`: in pixels. `pixels`: (24, 24) of zero mean and unit norm."""

    box: Box
    pixels: np.ndarray

    @property
    def height(self) -> int:
        return self.box[3] - self.box[1]


def read_order(image: Image.Image, rows: list[list[Box]], labels: list[str]) -> str:
    """Return "rows" or "columns", or an empty string if the image doesn't show which.

    Args:
        rows: panels in rows of a grid, in pixels of `image`.
        labels: the letters, in order.
    """
    scale = min(1.0, _WORKING_SIDE / max(image.size))
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    grey = np.asarray(image.convert("L").resize(size, Image.Resampling.BOX))
    scaled = [[_scaled(box, scale) for box in row] for row in rows]
    by_rows = [box for row in scaled for box in row]
    by_columns = [row[column] for column in range(len(scaled[0])) for row in scaled if column < len(row)]
    expected = {box: (labels[by_rows.index(box)], labels[by_columns.index(box)]) for box in by_rows}
    cells = _cells(scaled, size)
    for ink in (grey <= _DARK, grey >= _LIGHT):
        glyphs_of_first, *others = [_glyphs_of(ink, cells[box]) for box in by_rows]
        glyphs = [*glyphs_of_first, *itertools.chain(*others)]
        candidates = [glyph for glyph in glyphs_of_first if _correlation(glyph, labels[0]) >= _MIN_FIRST_CORRELATION]
        for first in sorted(candidates, key=lambda glyph: -_correlation(glyph, labels[0])):
            if order := _order(first, glyphs, by_rows, expected):
                return order
    return ""


def _scaled(box: Box, scale: float) -> Box:
    left, top, right, bottom = (round(value * scale) for value in box)
    return left, top, right, bottom


def _order(first: _Glyph, glyphs: list[_Glyph], panels: list[Box], expected: dict[Box, tuple[str, str]]) -> str:
    """Return the order that the letters show, if `first` is the letter of the first panel."""
    votes = {"rows": 0, "columns": 0}
    for panel in panels:
        by_rows, by_columns = expected[panel]
        if by_rows == by_columns:
            continue
        places = [glyph for glyph in glyphs if _has_place_of(first, panels[0], glyph, panel)]
        scores = [(_correlation(glyph, by_rows), _correlation(glyph, by_columns)) for glyph in places]
        along, down = max(scores, key=max, default=(0.0, 0.0))
        if max(along, down) >= _MIN_CORRELATION and abs(along - down) >= _MIN_ADVANTAGE:
            votes["rows" if along > down else "columns"] += 1
    num_decisive = sum(by_rows != by_columns for by_rows, by_columns in expected.values())
    winner = max(votes, key=votes.__getitem__)
    return winner if min(votes.values()) == 0 and votes[winner] >= max(2, num_decisive / 2) else ""


def _has_place_of(first: _Glyph, first_panel: Box, glyph: _Glyph, panel: Box) -> bool:
    """Return whether a letter has the size and place of the first panel's letter."""
    if max(first.height, glyph.height) > _MAX_HEIGHT_RATIO * min(first.height, glyph.height):
        return False
    width, height = (min(panel[i + 2] - panel[i], first_panel[i + 2] - first_panel[i]) for i in (0, 1))
    own, other = _offsets(glyph, panel), _offsets(first, first_panel)
    across = min(abs(own[i] - other[i]) for i in (0, 1)) <= _MAX_ACROSS * width
    down = min(abs(own[i] - other[i]) for i in (2, 3)) <= _MAX_DOWN * height
    return across and down


def _offsets(glyph: _Glyph, panel: Box) -> tuple[float, float, float, float]:
    """Return the distances of a letter's middle from the left, right, top and bottom of a panel."""
    left, top, right, bottom = glyph.box
    x, y = (left + right) / 2, (top + bottom) / 2
    return x - panel[0], x - panel[2], y - panel[1], y - panel[3]


def _cells(rows: list[list[Box]], size: tuple[int, int]) -> dict[Box, Box]:
    """Return the part of the image around each panel: to the middle of the gaps, or to the edge of the image."""
    tops = [min(box[1] for box in row) for row in rows]
    bottoms = [max(box[3] for box in row) for row in rows]
    horizontal = [0, *((end + start) // 2 for end, start in zip(bottoms, tops[1:], strict=False)), size[1]]
    cells = {}
    for number, row in enumerate(rows):
        vertical = [0, *((left[2] + right[0]) // 2 for left, right in itertools.pairwise(row)), size[0]]
        for column, box in enumerate(row):
            cells[box] = vertical[column], horizontal[number], vertical[column + 1], horizontal[number + 1]
    return cells


def _glyphs_of(ink: np.ndarray, cell: Box) -> list[_Glyph]:
    """Return the areas of ink in the top and bottom strips of a cell that have the size and distance of letters."""
    left, top, right, bottom = cell
    strip = round(_STRIP * (bottom - top))
    glyphs = []
    for start, end in ((top, top + strip), (bottom - strip, bottom)):
        part = ink[start:end, left:right]
        areas = list(_connected_areas(part))
        boxes = np.array([box for box, _ in areas]).reshape(-1, 4)
        for index, (box, mask) in enumerate(areas):
            height, width = box[3] - box[1], box[2] - box[0]
            has_size = _MIN_HEIGHT <= height <= _MAX_HEIGHT and 0.25 * height <= width <= 1.6 * height
            if has_size and _stands_alone(index, areas, boxes, part):
                shifted = (box[0] + left, box[1] + start, box[2] + left, box[3] + start)
                glyphs.append(_Glyph(shifted, _normalised(mask)))
    return glyphs


def _stands_alone(index: int, areas: list[tuple[Box, np.ndarray]], boxes: np.ndarray, ink: np.ndarray) -> bool:
    """Return whether only narrow areas, such as brackets or a dot, are near an area."""
    left, top, right, bottom = boxes[index].tolist()
    height = bottom - top
    margin, half = round(_MIN_DISTANCE * height), round(_MIN_DISTANCE * height / 2)
    window = max(0, left - margin), max(0, top - half), right + margin, bottom + half
    is_near = (boxes[:, 0] < window[2]) & (boxes[:, 2] > window[0])
    is_near &= (boxes[:, 1] < window[3]) & (boxes[:, 3] > window[1])
    rest = ink[window[1] : window[3], window[0] : window[2]].copy()
    num_neighbours = 0
    for near in np.flatnonzero(is_near).tolist():
        box, mask = areas[near]
        if not mask.size:
            continue
        is_narrow = box[2] - box[0] <= 0.45 * height and box[3] - box[1] <= 1.7 * height
        if near != index and not is_narrow:
            return False
        num_neighbours += near != index
        start, end = (max(0, window[1] - box[1]), max(0, window[0] - box[0])), (window[3] - box[1], window[2] - box[0])
        visible = mask[start[0] : end[0], start[1] : end[1]]
        y, x = box[1] + start[0] - window[1], box[0] + start[1] - window[0]
        rest[y : y + visible.shape[0], x : x + visible.shape[1]] &= ~visible
    # The rest are pixels of large areas, such as a dark background.
    return num_neighbours <= 2 and not rest.any()


def _connected_areas(ink: np.ndarray) -> Iterator[tuple[Box, np.ndarray]]:
    """Yield (box, mask) of each 8-connected area of ink of at most 64 x 64 pixels, and an empty mask of larger ones."""
    padded = np.pad(ink, ((0, 0), (1, 1))).astype(np.int8)
    rows, starts = np.nonzero(np.diff(padded, axis=1) == 1)
    _, ends = np.nonzero(np.diff(padded, axis=1) == -1)
    parents = list(range(len(rows)))

    def root(run: int) -> int:
        while parents[run] != run:
            parents[run] = run = parents[parents[run]]
        return run

    first_of_row = np.searchsorted(rows, np.arange(ink.shape[0] + 1)).tolist()
    start_list, end_list = starts.tolist(), ends.tolist()
    for row in range(1, ink.shape[0]):
        above, stop_above, stop = first_of_row[row - 1], first_of_row[row], first_of_row[row + 1]
        run = stop_above
        while run < stop and above < stop_above:
            if start_list[run] <= end_list[above] and start_list[above] <= end_list[run]:
                parents[root(run)] = root(above)
            if end_list[run] < end_list[above]:
                run += 1
            else:
                above += 1
    areas: dict[int, list[int]] = {}
    for run in range(len(rows)):
        areas.setdefault(root(run), []).append(run)
    for runs in areas.values():
        lefts, rights, tops = starts[runs], ends[runs], rows[runs]
        box = int(lefts.min()), int(tops.min()), int(rights.max()), int(tops.max()) + 1
        width, height = box[2] - box[0], box[3] - box[1]
        mask = np.zeros((height, width) if max(width, height) <= 2 * _MAX_HEIGHT else (0, 0), bool)
        if mask.size:
            for left, right, top in zip(lefts.tolist(), rights.tolist(), tops.tolist(), strict=True):
                mask[top - box[1], left - box[0] : right - box[0]] = True
        yield box, mask


def _normalised(mask: np.ndarray) -> np.ndarray:
    image = Image.fromarray(mask.astype(np.uint8) * 255)
    pixels = np.asarray(image.resize((_TEMPLATE_SIDE, _TEMPLATE_SIDE), Image.Resampling.BILINEAR)).astype(np.float64)
    pixels -= pixels.mean()
    return pixels / (np.linalg.norm(pixels) or 1.0)


def _correlation(glyph: _Glyph, letter: str) -> float:
    """Return the correlation of an area with the best template of a letter, from -1 to 1."""
    return max(float((glyph.pixels * template).sum()) for template in _templates(letter))


@functools.cache
def _templates(letter: str) -> tuple[np.ndarray, ...]:
    """Return the capital and the small letter in Pillow's sans-serif font: light and bold."""
    templates = []
    for character in (letter.upper(), letter.lower()):
        for stroke in (0, 2, 4):
            canvas = Image.new("L", (160, 160))
            font = ImageFont.load_default(64)
            ImageDraw.Draw(canvas).text((40, 40), character, fill=255, font=font, stroke_width=stroke)
            templates.append(_normalised(np.asarray(canvas.crop(canvas.getbbox())) > 127))
    return tuple(templates)
