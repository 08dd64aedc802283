"""Line charts as inline SVG that takes its colours from the page, so that it follows light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup, escape

WIDTH, HEIGHT = 420, 236
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 12, 46
MAX_POINTS = 400


def line_chart(
    steps: Sequence[float],
    values: Sequence[float],
    *,
    title: str,
    smooth: bool = False,
    reference: tuple[float, str] | None = None,
) -> Markup:
    """One series over the step number, with axes from 0 or from the data as fits; finite values only.

    Args:
        smooth: draw a moving average over the faint raw line.
        reference: a dashed horizontal line and its name, for example the chance level.
    """
    points = _thin(list(zip(steps, values, strict=True)))
    xs, ys = [x for x, _ in points], [y for _, y in points]
    spread = [*ys, reference[0]] if reference else ys
    x_ticks, y_ticks = _ticks(min(xs), max(xs), 6), _ticks(min(spread), max(spread), 5)
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1)
    y_low, y_high = min(y_ticks[0], *spread), max(y_ticks[-1], *spread)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low)
        up = (y - y_low) / (y_high - y_low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    def path(series: Sequence[float], style: str) -> str:
        corners = " ".join(f"{px:.1f},{py:.1f}" for px, py in (place(x, y) for x, y in zip(xs, series, strict=True)))
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
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">step</text>')
    if reference:
        _, y = place(x_low, reference[0])
        label_y = y - 6 if y > TOP + 18 else y + 16
        parts.append(f'<line class="reference" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{WIDTH - RIGHT - 4}" y="{label_y:.1f}" text-anchor="end">{escape(reference[1])}</text>')
    window = len(ys) // 25
    if smooth and window > 1:
        parts += [path(ys, "raw"), path(_moving_average(ys, window), "line")]
    elif len(points) > 1:
        parts.append(path(ys, "line"))
    else:
        parts.append('<circle class="dot" cx="{:.1f}" cy="{:.1f}" r="4"/>'.format(*place(*points[0])))
    first, last = (f"{number(values[i])} at step {number(steps[i])}" for i in (0, -1))
    label = escape(f"{title}: from {first} to {last}")
    head = f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
    return Markup("{}{}</svg>").format(Markup(head), Markup("".join(parts)))


def number(value: float) -> str:
    """Up to four significant digits: 12k, 0.35, 5e-4."""
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
    """About `count` round numbers (1, 2 or 5 times a power of ten) that span [low, high]."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        high = low + (abs(low) or 1.0) * 0.1
        low -= (abs(low) or 1.0) * 0.1
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * nice for nice in (1, 2, 5, 10) if power * nice >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _moving_average(values: Sequence[float], window: int) -> list[float]:
    """Centred; near the ends the window shrinks to what is there."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    half = window // 2
    spans = ((max(0, i - half), min(len(values), i + half + 1)) for i in range(len(values)))
    return [(sums[end] - sums[start]) / (end - start) for start, end in spans]


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `MAX_POINTS` points, the means of equal runs."""
    if len(points) <= MAX_POINTS:
        return points
    size = math.ceil(len(points) / MAX_POINTS)
    runs = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in run) / len(run), sum(y for _, y in run) / len(run)) for run in runs]
