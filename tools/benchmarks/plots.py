"""Line plots of result files as SVG, readable on a light and on a dark page."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 640, 300, 52, 34, 42
# of the names at the right of the curves
RIGHT = 150
# told apart also without seeing red and green (Okabe and Ito)
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00")
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #444; }
.title { font-weight: 600; font-size: 13px; fill: #222; }
.grid { stroke: #ddd; } .level { stroke: #666; stroke-dasharray: 5 4; }
polyline { fill: none; stroke-width: 2; stroke-linejoin: round; }
@media (prefers-color-scheme: dark) {
  text { fill: #bbb; } .title { fill: #eee; } .grid { stroke: #444; } .level { stroke: #999; }
}
"""


def line_plot(columns: Sequence[Mapping[str, Any]], rows: Sequence[Sequence[Any]], plot: Mapping[str, Any]) -> str:
    """Return an SVG with a curve per series.

    Args:
        columns, rows: of the result; values of None are left out.
        plot: ``title``; ``x``, the name of the column with the places of the points; ``series``, the name of each curve
            and of its column; optionally ``levels``, names and values of horizontal lines.
    """
    index = {column["name"]: number for number, column in enumerate(columns)}
    curves: dict[str, list[tuple[float, float]]] = {}
    for name, column in plot["series"].items():
        pairs = [(row[index[plot["x"]]], row[index[column]]) for row in rows]
        curves[name] = [(float(x), float(y)) for x, y in pairs if x is not None and y is not None]
    levels: Mapping[str, float] = plot.get("levels", {})
    places = [x for points in curves.values() for x, _ in points]
    heights = [y for points in curves.values() for _, y in points] + list(levels.values())
    right = max(places)
    ticks = _ticks(min(heights), max(heights))

    def across(x: float) -> float:
        return LEFT + x / right * (WIDTH - LEFT - RIGHT)

    def down(y: float) -> float:
        return HEIGHT - BOTTOM - (y - ticks[0]) / (ticks[-1] - ticks[0]) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<text class="title" x="{LEFT}" y="18">{html.escape(plot["title"])}</text>']
    for tick in ticks:
        y, label = down(tick), f"{tick:g}"
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for tick in _ticks(0.0, right):
        if tick <= right:
            label = f"{tick:,.0f}".replace(",", " ")
            parts.append(f'<text x="{across(tick):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{label}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{html.escape(plot["x"])}</text>')
    names = []
    for name, value in levels.items():
        y = down(value)
        parts.append(f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        names.append((y, name, ""))
    for colour, (name, points) in zip(COLOURS, curves.items(), strict=False):
        line = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in points)
        parts.append(f'<polyline points="{line}" style="stroke: {colour}"/>')
        parts += [f'<circle cx="{across(x):.1f}" cy="{down(y):.1f}" r="3" fill="{colour}"/>' for x, y in points]
        names.append((down(points[-1][1]), name, colour))
    parts += _labels(names)
    inner = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}">\n'
        f"<style>{STYLE}</style>\n{inner}\n</svg>\n"
    )


def _ticks(low: float, high: float) -> list[float]:
    """Return round values that contain ``low`` and ``high``, about five."""
    raw = max(high - low, 1e-9) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * number, 10) for number in range(first, max(last, first + 1) + 1)]


def _labels(names: Sequence[tuple[float, str, str]]) -> list[str]:
    """Return the names at the ends of the curves, moved apart where they would overlap."""
    parts, previous = [], 0.0
    for y, name, colour in sorted(names):
        y = max(y + 4, previous + 15)
        previous = y
        style = f' style="fill: {colour}"' if colour else ""
        parts.append(f'<text x="{WIDTH - RIGHT + 10}" y="{y:.1f}"{style}>{html.escape(name)}</text>')
    return parts
