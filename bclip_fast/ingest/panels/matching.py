"""Decide which part of a figure is which panel, from the printed letters, the gaps, and the labels of the caption.

The letters of a figure have one height and one case. Of the places that look like a letter, those are taken that agree
with each other and line up. `regions` divides the figure around them. A panel is returned if its letter stands where
the others stand, and if the region can hold no other panel. Without letters, a clear row or column is enough.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from .caption_labels import LETTERS
from .layout import in_order, layout
from .letters import Letter, find_letters
from .regions import MAX_COST, Box, Page, Region, Seed, area, divide

# Largest ratio of the heights of two letters of a figure.
_MAX_HEIGHT_RATIO = 1.3
# What one letter that lines up with a place adds to the score of the place.
_ALIGNMENT = 0.12
# Confidence of a candidate box that the cuts don't confirm.
_CANDIDATE_CONFIDENCE = 0.5
# Least score of a letter that the caption doesn't name.
_MIN_FURTHER_SCORE = 0.8
# Largest number of letters after those of the caption that may be missing before another one.
_MAX_MISSING = 1
# Least area of a region, as a share of the middle one.
_MIN_AREA = 0.15
# Least share of the labels whose letters are found.
_MIN_FOUND = 0.6
# Without some of the letters, a region with a gap inside that is this wide may hold two panels.
_MAX_INNER_GAP = 0.9


@dataclass(frozen=True)
class Match:
    """A panel in the figure. `box`: left, top, right and bottom in pixels. `confidence`: 0 to 1."""

    label: str
    box: Box
    confidence: float


def match_panels(image: Image.Image, labels: Sequence[str], boxes: Sequence[Box] | None = None) -> list[Match]:
    """Return the panels that are certain, in the order of the labels.

    Args:
        labels: letters from "A", or places such as "left".
        boxes: candidates of a detector, in pixels of the image. A candidate that holds exactly one letter is its panel
            where the cuts leave the region of the letter in doubt. Without printed letters, candidates in a clear row
            or column are the panels.
    """
    candidates = [box for box in boxes or () if box[0] < box[2] and box[1] < box[3]]
    if len(labels[0]) == 1:
        found = find_letters(image, LETTERS)
        letters = choose_letters(found, labels)
        if len(letters) >= max(2, _MIN_FOUND * len(labels)):
            everything = {**letters, **_further_letters(found, letters, labels)}
            return _by_letters(image, labels, everything, candidates)
        if len(letters) > 1:
            return []
    panels = layout(image, list(labels)) or in_order(candidates, list(labels))
    return [Match(label, box, 1.0) for label, box in zip(labels, panels, strict=False)]


def choose_letters(letters: Sequence[Letter], labels: Sequence[str]) -> dict[str, Letter]:
    """Return the letter of each label whose letters have one height and case and line up best."""
    best: dict[str, Letter] = {}
    best_score = 0.0
    letters = [letter for letter in letters if letter.letter in labels]
    for first in letters:
        if first.score < 0.5:
            continue
        agreeing = [other for other in letters if _agree(first, other)]
        chosen: dict[str, tuple[float, Letter]] = {}
        for other in agreeing:
            score = other.score + _ALIGNMENT * _num_aligned(other, agreeing) - 0.5 * (_height_ratio(first, other) - 1)
            if other.letter not in chosen or score > chosen[other.letter][0]:
                chosen[other.letter] = (score, other)
        total = sum(score for score, _ in chosen.values())
        if total > best_score + 1e-6:
            best_score, best = total, {label: letter for label, (_, letter) in chosen.items()}
    return {label: best[label] for label in labels if label in best}


def _further_letters(found: Sequence[Letter], letters: dict[str, Letter], labels: Sequence[str]) -> dict[str, Letter]:
    """Return the letters after those of the caption. Their panels must not become parts of the panels before."""
    further: dict[str, Letter] = {}
    typical = sorted(letters.values(), key=lambda letter: letter.height)[len(letters) // 2]
    for name in LETTERS[LETTERS.index(labels[-1]) + 1 :]:
        chosen = [*letters.values(), *further.values()]
        alike = [x for x in found if x.letter == name and x.score >= _MIN_FURTHER_SCORE and _agree(typical, x)]
        aligned = [letter for letter in alike if _num_aligned(letter, chosen)]
        if aligned:
            further[name] = aligned[0]
        elif ord(name) - ord(max([*further, labels[-1]])) > _MAX_MISSING:
            break
    return further


def _agree(one: Letter, two: Letter) -> bool:
    """Return whether two letters can have one case and one height."""
    return _height_ratio(one, two) <= _MAX_HEIGHT_RATIO


def _height_ratio(one: Letter, two: Letter) -> float:
    """Return the ratio of the heights of two letters in the same case, at least 1."""
    ratios = [math.inf]
    for is_capital in (True, False):
        if {one.is_capital, two.is_capital} <= {is_capital, None}:
            heights = [letter.height if is_capital else letter.small_height for letter in (one, two)]
            ratios.append(max(heights) / min(heights))
    return min(ratios)


def _num_aligned(letter: Letter, others: Sequence[Letter]) -> int:
    """Return how many other letters have a place that lines up with this one's."""
    aligned = set()
    tolerance = 0.6 * letter.height
    for other in others:
        if other.letter == letter.letter:
            continue
        left, bottom = abs(other.box[0] - letter.box[0]), abs(other.box[3] - letter.box[3])
        if (left <= tolerance) != (bottom <= tolerance) or abs(other.box[1] - letter.box[1]) <= tolerance < left:
            aligned.add(other.letter)
    return min(len(aligned), 3)


def _by_letters(
    image: Image.Image, labels: Sequence[str], letters: dict[str, Letter], candidates: Sequence[Box]
) -> list[Match]:
    held = _boxes_of_letters(letters, candidates)
    page = Page(image)
    regions = divide(page, [Seed(label, letter.box) for label, letter in letters.items()])
    is_complete = all(label in letters for label in labels)
    areas = sorted(area(region.box) for region in regions.values())
    matches = []
    for label in labels:
        region = regions.get(label)
        is_large = region is not None and area(region.box) >= _MIN_AREA * areas[len(areas) // 2]
        if region is None or not is_large or not _is_certain(region, is_complete):
            if label in held:
                matches.append(Match(label, held[label], _CANDIDATE_CONFIDENCE))
        else:
            matches.append(Match(label, region.box, round(1 - region.cost, 3)))
    return matches


def _boxes_of_letters(letters: dict[str, Letter], candidates: Sequence[Box]) -> dict[str, Box]:
    """Return the candidate of each letter that is the only one to hold it, and holds no other letter."""
    held: dict[str, list[Box]] = {label: [] for label in letters}
    for box in candidates:
        inside = []
        for label, letter in letters.items():
            # A letter may stand just outside of its box.
            margin = letter.height
            across, down = (letter.box[0] + letter.box[2]) / 2, (letter.box[1] + letter.box[3]) / 2
            if box[0] - margin <= across <= box[2] + margin and box[1] - margin <= down <= box[3] + margin:
                inside.append(label)
        for label in inside:
            held[label].append(box if len(inside) == 1 else (0, 0, 0, 0))
    return {label: boxes[0] for label, boxes in held.items() if len(boxes) == 1 and area(boxes[0])}


def _is_certain(region: Region, is_complete: bool) -> bool:
    stands_alone = is_complete or region.inner_gap <= _MAX_INNER_GAP
    return region.cost <= MAX_COST and not region.is_doubtful and stands_alone
