"""Find the printed letters of panels in a figure.

A candidate is a connected area of dark or light ink with the size of a letter. Only brackets or a dot are near it.
The letters of axes and words have neighbours. `glyphs` classifies the candidates. Which of them are the letters of
panels is decided in `matching`, by what they have in common.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from bclip_fast.data.shards.positives import connect

from .glyphs import CLASSES, SAME_FORMS, normalised_glyph, probabilities

Box = tuple[int, int, int, int]

# The letters are sought on a copy whose longer side has this many pixels. Small figures are enlarged at most twice.
_WORKING_SIDE = 2000
# Grey levels up to which ink is dark, and from which it is light.
_DARK, _LIGHT = (128, 70, 185), (190,)
# Pixels of the copy.
_MIN_HEIGHT, _MAX_HEIGHT = 7, 110
# Least distance between letters, as a share of their height, unless the neighbour is a bracket or a dot.
_MIN_DISTANCE = 0.55
# The same from an area that is so many times as large as the letter.
_MIN_DISTANCE_OF_LARGE, _LARGE = 0.2, 4
# The same from characters of a smaller font.
_MIN_DISTANCE_OF_SMALL = 0.3
# Least probability of a letter, in thousandths.
_MIN_PROBABILITY = 300
# More runs of ink in the rows of the copy, or more areas of the size of letters, are a texture. Of 196 figures, the
# finest had 129,000 runs.
_MAX_RUNS, _MAX_AREAS = 400_000, 6000
# Heights of small letters, as a share of a capital.
_HEIGHTS = dict.fromkeys("acemno", 0.76) | dict.fromkeys("gp", 1.02) | {"j": 1.3}


@dataclass(frozen=True)
class Letter:
    """A printed letter.

    Attributes:
        letter: "A" to "P".
        box: left, top, right and bottom in pixels of the figure.
        score: probability of the letter from its shape, 0 to 1.
        height: height of a capital in the same font, in pixels of the figure, if the letter is a capital.
        small_height: the same if it is a small letter.
        is_capital: None for letters whose capital has the same form.
    """

    letter: str
    box: Box
    score: float
    height: float
    small_height: float
    is_capital: bool | None


def find_letters(image: Image.Image, letters: Iterable[str]) -> list[Letter]:
    """Return the places in a figure that look like one of `letters`, "A" to "P", best first.

    A place may be several letters, and a letter may have many places.
    """
    wanted = sorted(set(letters) & set(CLASSES))
    scale = min(2.0, _WORKING_SIDE / max(image.size))
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    resampling = Image.Resampling.BICUBIC if scale > 1 else Image.Resampling.BOX
    grey = np.asarray(image.convert("L").resize(size, resampling))
    found: list[Letter] = []
    for is_dark, level in [*((True, level) for level in _DARK), *((False, level) for level in _LIGHT)]:
        ink = grey <= level if is_dark else grey >= level
        if np.count_nonzero(ink[:, 1:] > ink[:, :-1]) > _MAX_RUNS:
            continue
        strength = 255 - grey if is_dark else grey
        for box, letter, score, is_capital in _letters_of(ink, strength, wanted):
            height = float(box[3] - box[1])
            small = height / _HEIGHTS.get(letter.lower(), 1.0)
            left, top, right, bottom = (round(value / scale) for value in box)
            found.append(Letter(letter, (left, top, right, bottom), score, height / scale, small / scale, is_capital))
    found.sort(key=lambda letter: (-letter.score, letter.box, letter.letter))
    return list(_distinct(found))


def _distinct(letters: list[Letter]) -> Iterator[Letter]:
    """Yield each letter once, although several levels of ink show it."""
    seen: set[tuple[str, int, int]] = set()
    for letter in letters:
        size = max(4, round(letter.height))
        across, down = (letter.box[0] + letter.box[2]) // size, (letter.box[1] + letter.box[3]) // size
        cells = {(letter.letter, across + i, down + j) for i in (-1, 0, 1) for j in (-1, 0, 1)}
        if not cells & seen:
            yield letter
            seen.add((letter.letter, across, down))


def _letters_of(
    ink: np.ndarray, strength: np.ndarray, wanted: list[str]
) -> Iterator[tuple[Box, str, float, bool | None]]:
    """Yield (box, letter, score, is_capital) of the areas of ink that look like letters and stand alone."""
    areas = connected_areas(ink)
    boxes = areas.boxes
    heights, widths = boxes[:, 3] - boxes[:, 1], boxes[:, 2] - boxes[:, 0]
    has_size = (
        (heights >= _MIN_HEIGHT) & (heights <= _MAX_HEIGHT) & (5 * widths >= heights) & (5 * widths <= 8 * heights)
    )
    indices = np.flatnonzero(has_size)
    if not 0 < len(indices) <= _MAX_AREAS:
        return
    glyphs = []
    for left, top, right, bottom in boxes[indices].tolist():
        glyphs.append(normalised_glyph(strength[top:bottom, left:right]).ravel())
    chances = probabilities(np.array(glyphs))
    for index, row in zip(indices.tolist(), chances, strict=True):
        readings = []
        for letter in wanted:
            capital, small = int(row[CLASSES.index(letter)]), int(row[CLASSES.index(letter.lower())])
            is_same = letter in SAME_FORMS
            score = capital + small if is_same else max(capital, small)
            if score >= _MIN_PROBABILITY:
                readings.append((letter, score, None if is_same else capital > small))
        if readings and _stands_alone(index, areas):
            left, top, right, bottom = boxes[index].tolist()
            for letter, score, is_capital in readings:
                yield (left, top, right, bottom), letter, score / 1000, is_capital


@dataclass(frozen=True)
class Areas:
    """Connected areas of ink. `boxes`: (N, 4) int64. `numbers`: (height, width) int32, the area of a pixel, or -1."""

    boxes: np.ndarray
    numbers: np.ndarray


def _stands_alone(index: int, areas: Areas) -> bool:
    """Return whether only narrow areas, such as brackets or a dot, are near an area."""
    left, top, right, bottom = areas.boxes[index].tolist()
    height = bottom - top
    margin, half = round(_MIN_DISTANCE * height), round(_MIN_DISTANCE * height / 2)
    window = areas.numbers[max(0, top - half) : bottom + half, max(0, left - margin) : right + margin]
    near = np.unique(window)
    near = near[(near >= 0) & (near != index)]
    sizes = areas.boxes[near]
    is_large = (sizes[:, 3] - sizes[:, 1] > _LARGE * height) & (sizes[:, 2] - sizes[:, 0] > _LARGE * height)
    if is_large.any():
        # The frame or the picture around a patch that holds a letter may be nearer than another letter.
        gap = max(2, round(_MIN_DISTANCE_OF_LARGE * height))
        closest = areas.numbers[max(0, top - gap) : bottom + gap, max(0, left - gap) : right + gap]
        near = near[~is_large | np.isin(near, closest)]
    if len(near) > 6:
        return False
    boxes = areas.boxes[near]
    heights, widths = boxes[:, 3] - boxes[:, 1], boxes[:, 2] - boxes[:, 0]
    # The counters of an "A" in light ink, specks, brackets and dots. Brackets reach below the line, "l" and "1" don't.
    slack = round(0.1 * height)
    inside = (boxes[:, 0] >= left - slack) & (boxes[:, 2] <= right + slack)
    inside &= (boxes[:, 1] >= top - slack) & (boxes[:, 3] <= bottom + slack)
    # Characters of a smaller font stand nearer to each other than to the letter.
    gaps = np.maximum(boxes[:, 0] - right, left - boxes[:, 2])
    is_smaller = (heights <= 0.65 * height) & (gaps > _MIN_DISTANCE_OF_SMALL * height)
    is_speck = (heights <= 0.2 * height) & (widths <= 0.2 * height)
    is_bracket = (widths <= 0.65 * height) & (heights <= 2.4 * height) & (2 * widths <= heights)
    reaches_below = (boxes[:, 1] <= top + 0.1 * height) & (boxes[:, 3] >= bottom + 0.08 * height)
    # A bracket ends at the height of the tail of "g", "j" or "p".
    reaches_above = (boxes[:, 1] <= top - 0.12 * height) & (boxes[:, 3] >= bottom - 0.2 * height)
    is_bracket &= reaches_below | reaches_above
    is_dot = (heights <= 0.35 * height) & (widths <= 0.35 * height)
    return bool((inside | is_speck | is_bracket | is_dot | is_smaller).all() and is_bracket.sum() <= 2)


def connected_areas(ink: np.ndarray) -> Areas:
    """Return the 8-connected areas of ink, (height, width) bool."""
    height, width = ink.shape
    padded = np.zeros((height, width + 2), np.int8)
    padded[:, 1:-1] = ink
    steps = np.diff(padded, axis=1)
    rows, starts = np.nonzero(steps == 1)
    _, ends = np.nonzero(steps == -1)
    # A run touches those of the next row that start before or at its end, and end at or after its start.
    stride = width + 2
    next_row = (rows + 1) * stride
    first = np.searchsorted(rows * stride + ends, next_row + starts)
    last = np.searchsorted(rows * stride + starts, next_row + ends, side="right")
    counts = np.maximum(0, last - first)
    above = np.repeat(np.arange(len(rows)), counts)
    offsets = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    below = np.repeat(first, counts) + offsets
    labels = connect(np.arange(len(rows)), above, below)
    roots, numbers = np.unique(labels, return_inverse=True)
    boxes = np.empty((len(roots), 4), np.int64)
    boxes[:, :2], boxes[:, 2:] = max(height, width), 0
    np.minimum.at(boxes[:, 0], numbers, starts)
    np.minimum.at(boxes[:, 1], numbers, rows)
    np.maximum.at(boxes[:, 2], numbers, ends)
    np.maximum.at(boxes[:, 3], numbers, rows + 1)
    image = np.full(ink.shape, -1, np.int32)
    lengths = ends - starts
    columns = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths) + np.repeat(starts, lengths)
    image[np.repeat(rows, lengths), columns] = np.repeat(numbers, lengths)
    return Areas(boxes, image)
