"""Divide a figure into regions that hold one printed letter each.

A region is cut along a gap, from edge to edge, that has letters on both sides. Where there is no gap, it is cut along a
straight edge between two pictures. Of all ways to cut, the one counts in which the letters stand at the same place of
their regions: the upper left corner, the middle below, or another one of `_PLACES`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image

Box = tuple[int, int, int, int]

# Regions are cut on a copy whose longer side has at most this many pixels.
WORKING_SIDE = 800
_WHITE, _BLACK = 242, 12
# Least share of a figure that is black if its background is. Pictures that fill a figure have dark edges, too.
_MIN_BLACK = 0.1
# Share of a row or column that may be JPEG artefacts. Such a row or column still counts as background.
_MAX_SPECKS = 0.004
# An edge between pictures without a gap: the step in grey levels, and the share of the line that has it.
_EDGE_STEP, _EDGE_SHARE = 10, 0.8
# Distance of a letter from its place that one cut along an edge costs, as a share of the region.
_EDGE_COST = 0.15
# Least overlap of a part of a region with another region in one direction, if the part may belong to it.
_MIN_ALIGNED = 0.6
# Least share of a region that may be a panel, or a part of one.
_MIN_PART = 0.25
# What a letter costs that no cut separates from another one.
_UNDIVIDED_COST = 1.0
# Largest distance of a letter from its place in a good region.
MAX_COST = 0.3
# Largest number of panels that a bad one among them makes doubtful.
_MAX_NEIGHBOURS = 3
# Least width and height of a region, as a multiple of its letter's height.
_MIN_SIDE = 2.5
# Figures with more ways to cut than this are given up.
_MAX_REGIONS = 4000
# Where letters stand: across and down, 0 at the left and top, 1 at the right and bottom.
_PLACES = ((0.0, 0.0), (0.5, 1.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (0.5, 0.0))


@dataclass(frozen=True)
class Seed:
    """A letter that a region must hold. `box`: in pixels of the figure."""

    label: str
    box: Box


@dataclass(frozen=True)
class Region:
    """A part of the figure around one letter.

    Attributes:
        box: left, top, right and bottom in pixels of the figure.
        cost: distance of the letter from its place, as a share of the region's width plus a share of its height.
        inner_gap: widest gap inside the region, as a share of the narrowest gap around the regions.
        is_doubtful: whether a neighbour that it was cut from has a letter at another place, or no letter of its own.
    """

    box: Box
    cost: float
    inner_gap: float
    is_doubtful: bool = False


class Page:
    """The ink of a figure, on a copy of at most WORKING_SIDE pixels."""

    def __init__(self, image: Image.Image) -> None:
        self.scale = min(1.0, WORKING_SIDE / max(image.size))
        self.full_size = image.size
        width, height = (max(1, round(side * self.scale)) for side in image.size)
        self.size = width, height
        pixels = np.asarray(image.convert("RGB").resize(self.size, Image.Resampling.BOX))
        white, black = pixels.min(axis=2) >= _WHITE, pixels.max(axis=2) <= _BLACK
        edge = np.ones((height, width), bool)
        edge[2:-2, 2:-2] = False
        self.ink = ~black if black[edge].sum() > white[edge].sum() and black.mean() > _MIN_BLACK else ~white
        self.grey = np.asarray(image.convert("L").resize(self.size, Image.Resampling.BOX)).astype(np.int16)
        down = np.zeros((height + 1, width), np.int32)
        down[1:] = np.cumsum(self.ink, axis=0)
        across = np.zeros((height, width + 1), np.int32)
        across[:, 1:] = np.cumsum(self.ink, axis=1)
        self._down, self._across = down, across

    def lines(self, box: Box, axis: int) -> np.ndarray:
        """Return which columns (axis 0) or rows (axis 1) of a box have ink."""
        left, top, right, bottom = box
        if axis == 0:
            counts, length = self._down[bottom, left:right] - self._down[top, left:right], bottom - top
        else:
            counts, length = self._across[top:bottom, right] - self._across[top:bottom, left], right - left
        return counts > _MAX_SPECKS * length

    def shrunk(self, box: Box) -> Box | None:
        """Return the box without the background around its ink. None if it has no ink."""
        for axis in (1, 0, 1):
            inked = np.flatnonzero(self.lines(box, axis))
            if not len(inked):
                return None
            start, end = int(inked[0]), int(inked[-1]) + 1
            edges = list(box)
            edges[axis], edges[axis + 2] = box[axis] + start, box[axis] + end
            box = (edges[0], edges[1], edges[2], edges[3])
        return box

    def gaps(self, box: Box, axis: int) -> list[tuple[int, int]]:
        """Return the gaps inside a box: start and end of each run of background columns (axis 0) or rows (axis 1)."""
        has_ink = np.concatenate([[True], self.lines(box, axis), [True]]).astype(np.int8)
        bounds = np.flatnonzero(np.diff(has_ink)).reshape(-1, 2) + box[axis]
        return [(start, end) for start, end in bounds.tolist() if start > box[axis] and end < box[axis + 2]]

    def edges(self, box: Box, axis: int, first: int, last: int) -> list[tuple[int, int]]:
        """Return the position of the clearest straight edge from `first` to `last`, as a gap without a width."""
        left, top, right, bottom = box
        part = self.grey[top:bottom, left:right]
        part = part if axis == 0 else part.T
        start = max(1, first - box[axis])
        end = min(part.shape[1] - 1, last - box[axis])
        if end <= start:
            return []
        steps = np.abs(part[:, start:end] - part[:, start - 1 : end - 1]) >= _EDGE_STEP
        shares = steps.mean(axis=0)
        best = int(shares.argmax())
        at = box[axis] + start + best
        return [(at, at)] if shares[best] >= _EDGE_SHARE else []

    def to_figure(self, box: Box) -> Box:
        """Return a box of the copy in pixels of the figure."""
        across, down = self.full_size[0] / self.size[0], self.full_size[1] / self.size[1]
        right, bottom = min(self.full_size[0], round(box[2] * across)), min(self.full_size[1], round(box[3] * down))
        return int(box[0] * across), int(box[1] * down), right, bottom

    def from_figure(self, box: Box) -> Box:
        """Return a box of the figure in pixels of the copy."""
        left, top, right, bottom = (value * self.scale for value in box)
        width, height = self.size
        x, y = min(int(left), width - 1), min(int(top), height - 1)
        return x, y, min(width, max(x + 1, round(right))), min(height, max(y + 1, round(bottom)))


@dataclass(frozen=True)
class _Leaf:
    box: Box
    cost: float
    is_doubtful: bool = False


@dataclass
class _Way:
    """A way to divide a region: the total cost, the leaves by label, and the narrowest gap."""

    cost: float
    leaves: Mapping[str, _Leaf]
    gap: int

    def is_good(self, num_seeds: int) -> bool:
        return len(self.leaves) == num_seeds and all(leaf.cost <= MAX_COST for leaf in self.leaves.values())


def _joined(one: _Way, two: _Way, num_seeds: tuple[int, int], cost: float, gap: int) -> _Way:
    """Return the way that divides both sides of a cut. A bad side makes a few neighbours doubtful."""
    leaves = {**one.leaves, **two.leaves}
    if sum(num_seeds) <= _MAX_NEIGHBOURS and not (one.is_good(num_seeds[0]) and two.is_good(num_seeds[1])):
        leaves = {label: replace(leaf, is_doubtful=True) for label, leaf in leaves.items()}
    return _Way(one.cost + two.cost + cost, leaves, min(one.gap, two.gap, gap))


@dataclass
class _Divider:
    """Finds the best way to divide a page for letters at one place of their regions."""

    page: Page
    place: tuple[float, float]
    known: dict[tuple[Box, tuple[str, ...]], _Way | None] = field(default_factory=dict)

    def best(self, box: Box, seeds: tuple[Seed, ...]) -> _Way | None:
        """Return the best way to divide a box, or None if nothing divides it. Seeds are in pixels of the page."""
        shrunk = self.page.shrunk(box)
        if shrunk is None:
            return None
        box = _around(shrunk, seeds, box)
        key = (box, tuple(seed.label for seed in seeds))
        if key in self.known:
            return self.known[key]
        self.known[key] = None
        if len(self.known) > _MAX_REGIONS:
            return None
        if len(seeds) == 1:
            cost = self.cost(seeds[0].box, box)
            self.known[key] = _Way(cost, {seeds[0].label: _Leaf(box, cost)}, 1 << 30)
            return self.known[key]
        ways = []
        for low, high, gap, cost in self._cuts(box, seeds):
            one, two = self.best(*low), self.best(*high)
            if one and two:
                ways.append(_joined(one, two, (len(low[1]), len(high[1])), cost, gap))
        # Letters that cannot be separated have no region.
        ways.append(_Way(_UNDIVIDED_COST * len(seeds), {}, 1 << 30))
        self.known[key] = min(ways, key=lambda way: (round(way.cost, 3), -way.gap))
        return self.known[key]

    def cost(self, letter: Box, box: Box) -> float:
        """Return how far a letter is from its place in a box."""
        if min(box[2] - box[0], box[3] - box[1]) < _MIN_SIDE * (letter[3] - letter[1]):
            return 1.0
        cost = 0.0
        for axis in (0, 1):
            start, end = box[axis], box[axis + 2]
            at = self.place[axis]
            wanted = start + at * (end - start)
            actual = letter[axis] + at * (letter[axis + 2] - letter[axis])
            cost += abs(actual - wanted) / (end - start)
        return cost

    def _cuts(
        self, box: Box, seeds: tuple[Seed, ...]
    ) -> Iterator[tuple[tuple[Box, tuple[Seed, ...]], tuple[Box, tuple[Seed, ...]], int, float]]:
        """Yield (box and seeds on one side, those on the other side, width of the gap, cost)."""
        for axis in (1, 0):
            ordered = sorted(seeds, key=lambda seed: (seed.box[axis], seed.box))
            gaps = self.page.gaps(box, axis)
            for index in range(1, len(ordered)):
                low, high = tuple(ordered[:index]), tuple(ordered[index:])
                first = max(seed.box[axis + 2] for seed in low)
                last = min(seed.box[axis] for seed in high)
                if last < first - 1:
                    continue
                between = [gap for gap in gaps if gap[1] > first - 1 and gap[0] < last + 1]
                cost = 0.0
                if not between:
                    between, cost = self.page.edges(box, axis, first, last), _EDGE_COST
                widest = sorted(between, key=lambda gap: (gap[0] - gap[1], gap))[:2]
                for start, end in dict.fromkeys([*between[-1:], *between[:1], *widest]):
                    lower, upper = list(box), list(box)
                    lower[axis + 2], upper[axis] = start, end
                    low_box, high_box = (
                        (lower[0], lower[1], lower[2], lower[3]),
                        (upper[0], upper[1], upper[2], upper[3]),
                    )
                    yield (low_box, _sorted(low)), (high_box, _sorted(high)), end - start, cost


def _sorted(seeds: tuple[Seed, ...]) -> tuple[Seed, ...]:
    return tuple(sorted(seeds, key=lambda seed: seed.label))


def _around(box: Box, seeds: tuple[Seed, ...], limit: Box) -> Box:
    """Return the box enlarged to its letters, within the limit."""
    return (
        max(limit[0], min(box[0], *(seed.box[0] for seed in seeds))),
        max(limit[1], min(box[1], *(seed.box[1] for seed in seeds))),
        min(limit[2], max(box[2], *(seed.box[2] for seed in seeds))),
        min(limit[3], max(box[3], *(seed.box[3] for seed in seeds))),
    )


def divide(page: Page, seeds: list[Seed]) -> dict[str, Region]:
    """Return the region of each letter. Empty if the letters cannot be separated by straight cuts."""
    scaled = _sorted(tuple(Seed(seed.label, page.from_figure(seed.box)) for seed in seeds))
    whole = (0, 0, *page.size)
    ways = [(place, way) for place in _PLACES if (way := _Divider(page, place).best(whole, scaled))]
    if not ways:
        return {}
    place, best = min(ways, key=lambda item: round(item[1].cost, 3))
    divider = _Divider(page, place)
    unclear = _unclear(divider, best.leaves, {seed.label: seed.box for seed in scaled})
    regions = {}
    for label, leaf in best.leaves.items():
        gaps = [end - start for axis in (0, 1) for start, end in page.gaps(leaf.box, axis)]
        inner_gap = max(gaps, default=0) / max(1, best.gap)
        regions[label] = Region(page.to_figure(leaf.box), leaf.cost, inner_gap, leaf.is_doubtful or label in unclear)
    return regions


def _unclear(divider: _Divider, leaves: Mapping[str, _Leaf], letters: Mapping[str, Box]) -> set[str]:
    """Return the labels of two regions where a part of one may belong to the other.

    In two columns, A above B and C beside both, the lower half of C may belong to the row of B.
    """
    unclear: set[str] = set()
    for label, leaf in leaves.items():
        for axis in (0, 1):
            for gap in divider.page.gaps(leaf.box, axis):
                part = list(leaf.box)
                # The part beyond the gap, without the letter.
                side = axis if letters[label][axis] < gap[0] else axis + 2
                part[side] = gap[1] if side == axis else gap[0]
                share = (part[axis + 2] - part[axis]) / (leaf.box[axis + 2] - leaf.box[axis])
                if not _MIN_PART <= share <= 1 - _MIN_PART:
                    continue
                for other, neighbour in leaves.items():
                    if other == label or _aligned(part, neighbour.box, axis) < _MIN_ALIGNED:
                        continue
                    joined = _joined_box((part[0], part[1], part[2], part[3]), neighbour.box)
                    is_free = all(
                        overlap(joined, item.box) == 0 for name, item in leaves.items() if name not in (label, other)
                    )
                    if is_free and divider.cost(letters[other], joined) <= MAX_COST / 2:
                        unclear |= {label, other}
    return unclear


def _aligned(one: list[int], two: Box, axis: int) -> float:
    """Return the overlap of two boxes on one axis, as a share of what they cover together."""
    both = min(one[axis + 2], two[axis + 2]) - max(one[axis], two[axis])
    return both / max(1, max(one[axis + 2], two[axis + 2]) - min(one[axis], two[axis]))


def _joined_box(one: Box, two: Box) -> Box:
    return min(one[0], two[0]), min(one[1], two[1]), max(one[2], two[2]), max(one[3], two[3])


def area(box: Box) -> int:
    """Return the number of pixels of a box."""
    return (box[2] - box[0]) * (box[3] - box[1])


def overlap(one: Box, two: Box) -> float:
    """Return the intersection over union of two boxes."""
    sides = [max(0, min(one[axis + 2], two[axis + 2]) - max(one[axis], two[axis])) for axis in (0, 1)]
    return sides[0] * sides[1] / max(1, area(one) + area(two) - sides[0] * sides[1])
