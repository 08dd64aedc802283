"""A chart of scores with their intervals, one row each."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup, escape

_WIDTH, _LEFT, _RIGHT, _TOP, _ROW = 620, 190, 20, 10, 28
_MAX_NAME = 24


def interval_chart(rows: Sequence[tuple[str, float, float | None, float | None]], *, title: str) -> Markup:
    """Draw shares with their intervals over an axis of per cent, as SVG in the colours of the page.

    rows: name, value, and the ends of the interval or None.
    """
    ends = [end for _, value, low, high in rows for end in (value, low, high) if end is not None]
    low_tick = max(0, int(10 * min(ends)))
    high_tick = min(10, max(int(10 * max(ends)) + 1, low_tick + 1))
    height = _TOP + _ROW * len(rows) + 30
    span = _WIDTH - _LEFT - _RIGHT

    def place(share: float) -> float:
        return _LEFT + (10 * share - low_tick) / (high_tick - low_tick) * span

    parts = []
    for tick in range(low_tick, high_tick + 1):
        x = place(tick / 10)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{height - 28}"/>')
        parts.append(f'<text x="{x:.1f}" y="{height - 10}" text-anchor="middle">{10 * tick}</text>')
    for i, (name, value, low, high) in enumerate(rows):
        y = _TOP + _ROW * (i + 0.5)
        label = name if len(name) <= _MAX_NAME else f"{name[: _MAX_NAME - 1]}\u2026"
        parts.append(f'<text x="{_LEFT - 12}" y="{y + 5:.1f}" text-anchor="end">{escape(label)}</text>')
        if low is not None and high is not None:
            parts.append(f'<polyline points="{place(low):.1f},{y:.1f} {place(high):.1f},{y:.1f}"/>')
        parts.append(f'<circle class="dot" cx="{place(value):.1f}" cy="{y:.1f}" r="5"/>')
    text = escape(f"{title}, per cent: {'; '.join(f'{name} {100 * value:.1f}' for name, value, _, _ in rows)}")
    head = f'<svg class="chart" viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{text}">'
    return Markup("{}{}</svg>").format(Markup(head), Markup("".join(parts)))
