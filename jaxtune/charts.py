"""Line charts as inline SVG: text that a browser draws, with no script, font or library."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence

Points = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT = 560, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 12, 34, 30
# More points than pixels are drawn as each column's first, lowest, highest and last.
_COLUMNS = 400
SERIES_CLASSES = ("a", "b", "c", "d", "e", "f")


def line_chart(
    title: str, series: Mapping[str, Points], show: Callable[[float], str] = "{:.4g}".format, *, x_title: str = "step"
) -> str:
    """A chart of named lines over the same x axis, as one `<svg>` element.

    Points that are not finite break a line; a lone point is a dot. Lines are coloured by CSS classes, in the order of
    `SERIES_CLASSES`, so that a page decides how they look.

    Args:
        title: above the chart. series: by name, points (x, y) in the order of x.
        show: a y value as text.
    """
    drawn = {name: [(x, y) for x, y in points if math.isfinite(x)] for name, points in series.items()}
    finite = [point for points in drawn.values() for point in points if math.isfinite(point[1])]
    head = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(title)}">'
    text = [f'<text class="title" x="{_LEFT}" y="16">{html.escape(title)}</text>']
    if not finite:
        return "".join([head, *text, f'<text x="{_LEFT}" y="{_HEIGHT / 2}">no values</text></svg>'])
    (x_low, x_high), (y_low, y_high) = (_range([point[axis] for point in finite]) for axis in (0, 1))
    y_ticks = _ticks(y_low, y_high)
    y_low, y_high = min(y_low, y_ticks[0]), max(y_high, y_ticks[-1])

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT)
        down = (y_high - y) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM)
        return round(_LEFT + across, 1), round(_TOP + down, 1)

    parts = []
    for tick in y_ticks:
        _, y = at(x_low, tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" y1="{y}" x2="{_WIDTH - _RIGHT}" y2="{y}"/>')
        parts.append(f'<text class="y" x="{_LEFT - 6}" y="{y + 4}">{html.escape(show(tick))}</text>')
    for tick in _ticks(x_low, x_high, whole=True):
        x, _ = at(tick, y_low)
        parts.append(f'<text class="x" x="{x}" y="{_HEIGHT - 12}">{tick:,.0f}</text>')
    parts.append(f'<text class="x" x="{_WIDTH - _RIGHT - 12}" y="{_HEIGHT - 1}">{html.escape(x_title)}</text>')
    legend_x = _WIDTH - _RIGHT
    for name, css in reversed(list(zip(drawn, SERIES_CLASSES * len(drawn), strict=False))):
        parts += [_line(piece, at, css) for piece in _pieces(_thinned(drawn[name]))]
        if len(drawn) > 1:
            parts.append(f'<text class="legend {css}" x="{legend_x}" y="16">{html.escape(name)}</text>')
            legend_x -= 8 * len(name) + 14
    return "".join([head, *text, *parts, "</svg>"])


def _line(points: Points, at: Callable[[float, float], tuple[float, float]], css: str) -> str:
    places = [at(x, y) for x, y in points]
    if len(places) == 1:
        return f'<circle class="{css}" cx="{places[0][0]}" cy="{places[0][1]}" r="3"/>'
    return f'<polyline class="{css}" points="{" ".join(f"{x},{y}" for x, y in places)}"/>'


def _pieces(points: Points) -> list[list[tuple[float, float]]]:
    """The runs of finite points."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for point in points:
        if math.isfinite(point[1]):
            pieces[-1].append(point)
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]


def _thinned(points: Points) -> Points:
    """No more points than can be told apart, extremes kept; a gap of values that are not finite stays one."""
    if len(points) <= 4 * _COLUMNS:
        return points
    size = math.ceil(len(points) / _COLUMNS)
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), size):
        column = list(range(start, min(start + size, len(points))))
        finite = [index for index in column if math.isfinite(points[index][1])]
        chosen = {column[0], column[-1], *(index for index in column if index not in finite)}
        if finite:
            chosen |= {min(finite, key=lambda i: points[i][1]), max(finite, key=lambda i: points[i][1])}
        kept += [points[index] for index in sorted(chosen)]
    return kept


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    if low == high:
        margin = abs(low) / 10 or 1.0
        return low - margin, high + margin
    return low, high


def _ticks(low: float, high: float, count: int = 5, *, whole: bool = False) -> list[float]:
    """About `count` round numbers that cover low to high (`whole`: that lie between them, whole numbers only)."""
    rough = (high - low) / count
    scale = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * scale for factor in (1.0, 2.0, 5.0, 10.0) if factor * scale >= rough * 0.999)
    if whole:
        step = max(1.0, step)
        first, last = math.ceil(low / step), math.floor(high / step)
    else:
        first, last = math.floor(low / step), math.ceil(high / step)
    return [index * step for index in range(first, last + 1)]
