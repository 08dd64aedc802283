"""Charts as inline SVG. The colours come from the page, so that the charts follow its light or dark scheme."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

WIDTH, HEIGHT = 420, 236
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 12, 46
MAX_POINTS = 400
MAX_CURVES = 8


def line_chart(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    title: str,
    smooth: bool = False,
    reference: tuple[float, str] | None = None,
    x_label: str = "step",
) -> Markup:
    """Draw values over the step number, or over `x_label`. The axes start at 0 or near the data, whichever fits.

    Args:
        series: name -> (steps or other places, values), all finite. At most `MAX_CURVES` are drawn.
            Several series are named below.
        smooth: draw a moving average. A single series also shows its raw values as a faint line.
        reference: height and name of a dashed horizontal line, for example the chance baseline.
    """
    shown = {name: _thin(list(zip(*values, strict=True))) for name, values in list(series.items())[:MAX_CURVES]}
    is_single = len(shown) == 1
    xs = [x for points in shown.values() for x, _ in points]
    # Without the raw values, only the averages set the frame: single steps may lie far outside.
    drawn = {name: _averaged(points) if smooth else points for name, points in shown.items()}
    spread = [y for points in (shown if is_single else drawn).values() for _, y in points]
    spread += [reference[0]] if reference else []
    x_ticks, y_ticks = _ticks(min(xs), max(xs), 6), _ticks(min(spread), max(spread), 5)
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1)
    y_low, y_high = min(y_ticks[0], *spread), max(y_ticks[-1], *spread)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low)
        up = (y - y_low) / (y_high - y_low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    def path(points: Sequence[tuple[float, float]], style: str) -> str:
        corners = " ".join(f"{px:.1f},{py:.1f}" for px, py in (place(x, y) for x, y in points))
        return f'<polyline class="{style}" points="{corners}"/>'

    parts = []
    for tick in y_ticks:
        _, y = place(x_low, tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    for tick in x_ticks:
        if x_low <= tick <= x_high:
            x, _ = place(tick, y_low)
            parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{number(tick)}</text>')
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>'
    )
    if reference:
        _, y = place(x_low, reference[0])
        label_y = y - 6 if y > TOP + 18 else y + 16
        parts.append(f'<line class="reference" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{WIDTH - RIGHT - 4}" y="{label_y:.1f}" text-anchor="end">{escape(reference[1])}</text>')
    height = HEIGHT
    for i, (name, points) in enumerate(shown.items()):
        if is_single and drawn[name] is not points:
            parts.append(path(points, "raw"))
        if len(points) > 1:
            parts.append(path(drawn[name], f"s{i}"))
        else:
            parts.append('<circle class="dot" cx="{:.1f}" cy="{:.1f}" r="4"/>'.format(*place(*points[0])))
        if not is_single:
            # Short names fit in two columns.
            columns = 2 if all(len(name) <= 20 for name in shown) else 1
            left, y = LEFT + i % columns * (WIDTH - LEFT) // 2, HEIGHT + 14 + i // columns * 20
            parts.append(f'<polyline class="s{i}" points="{left},{y - 4} {left + 24},{y - 4}"/>')
            label = name if len(name) <= 44 else f"{name[:43]}\u2026"
            parts.append(f'<text x="{left + 32}" y="{y}">{escape(label)}</text>')
            height = y + 10
    ends = []
    for name, (steps, values) in list(series.items())[:MAX_CURVES]:
        first, last = (f"{number(values[i])} at {x_label} {number(steps[i])}" for i in (0, -1))
        ends.append(f"{name + ' ' if name else ''}from {first} to {last}")
    label = escape(f"{title}: {'; '.join(ends)}")
    head = f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{label}">'
    return Markup("{}{}</svg>").format(Markup(head), Markup("".join(parts)))


def roc_chart(curves: Sequence[dict[str, Any]], *, title: str) -> Markup:
    """Draw ROC curves in a square frame with the diagonal of chance. The eight largest areas are drawn and named below.

    curves: dicts of `class`, `auroc` and `points`, which are (false positive rate, true positive rate) from (0, 0) to
        (1, 1) in ascending order.
    """
    shown = sorted(curves, key=lambda curve: -curve["auroc"])[:MAX_CURVES]
    side, row = 300, 20
    left, top = 60, 12
    height = top + side + 46 + row * len(shown)

    def place(x: float, y: float) -> str:
        return f"{left + x * side:.1f},{top + (1 - y) * side:.1f}"

    parts = []
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        x, y = left + tick * side, top + (1 - tick) * side
        parts.append(f'<line class="grid" x1="{left}" x2="{left + side}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
        parts.append(f'<text x="{x:.1f}" y="{top + side + 18}" text-anchor="middle">{tick:g}</text>')
    parts.append(f'<line class="reference" x1="{left}" y1="{top + side}" x2="{left + side}" y2="{top}"/>')
    parts.append(f'<text x="{left + side / 2}" y="{top + side + 36}" text-anchor="middle">false positive rate</text>')
    parts.append(
        f'<text transform="translate(16 {top + side / 2}) rotate(-90)" text-anchor="middle">true positive rate</text>'
    )
    for i, curve in enumerate(shown):
        corners = " ".join(place(x, y) for x, y in curve["points"])
        y = top + side + 58 + row * i
        parts.append(f'<polyline class="s{i}" points="{corners}"/>')
        parts.append(f'<polyline class="s{i}" points="6,{y - 4} 34,{y - 4}"/>')
        name = curve["class"] if len(curve["class"]) <= 44 else curve["class"][:43] + "\u2026"
        parts.append(f'<text x="42" y="{y}">{escape(name)}, {100 * curve["auroc"]:.1f} %</text>')
    label = escape(f"{title}: area {100 * shown[0]['auroc']:.1f} % for {shown[0]['class']}")
    width = left + side + 14 + (60 if shown else 0)
    head = f'<svg class="chart roc" viewBox="0 0 {width} {height + 12}" role="img" aria-label="{label}">'
    return Markup("{}{}</svg>").format(Markup(head), Markup("".join(parts)))


def number(value: float) -> str:
    """Format a number with up to four significant digits: 12k, 0.35, 5e-4."""
    if value == 0:
        return "0"
    if abs(value) < 1e-2:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.4g}{letter}"
    return f"{value:.4g}"


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Return about `count` round numbers (1, 2 or 5 times a power of ten) that span [low, high]."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        high = low + (abs(low) or 1.0) * 0.1
        low -= (abs(low) or 1.0) * 0.1
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * nice for nice in (1, 2, 5, 10) if power * nice >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _averaged(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return a centred moving average over 1/25 of the points, or the points themselves if they are too few.

    Near the ends, the average covers only the existing points.
    """
    half = len(points) // 25 // 2
    if len(points) // 25 <= 1:
        return points
    sums = [0.0]
    for _, value in points:
        sums.append(sums[-1] + value)
    spans = [(max(0, i - half), min(len(points), i + half + 1)) for i in range(len(points))]
    means = [(sums[end] - sums[start]) / (end - start) for start, end in spans]
    return [(x, mean) for (x, _), mean in zip(points, means, strict=True)]


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Reduce the points to at most `MAX_POINTS`: the means of runs of equal length."""
    if len(points) <= MAX_POINTS:
        return points
    size = math.ceil(len(points) / MAX_POINTS)
    runs = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in run) / len(run), sum(y for _, y in run) / len(run)) for run in runs]
