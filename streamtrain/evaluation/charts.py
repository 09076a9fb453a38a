"""Line charts as SVG inside an HTML page: they scale with the page and follow its colours in light and dark mode.

Sizes of text are in pixels at every width: positions are percentages of the plot, and only the curves are stretched.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shards.errors import printable
from streamtrain.evaluation.figures import (
    Line,
    display_unit,
    is_log_scale,
    read_lines,
    running_mean,
    short_number,
    value_range,
)
from streamtrain.run.tags import Tag, describe_tag

# points of a curve on the page, and the units of the plot that they are rounded to
MAX_POINTS, UNITS = 400, 1000
# up to this number of values, each is marked
MAX_MARKED = 12
# values closer than this share of the plot would have overlapping labels
_LABEL_SHARE = 0.09

CHART_STYLE = """
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 16px; }
.chart { margin: 0; min-width: 0; background: var(--card); border-radius: 8px; padding: 14px 16px 8px; }
.chart.wide { grid-column: 1 / -1; }
.chart figcaption { display: flex; flex-wrap: wrap; gap: 0 12px; align-items: baseline; margin: 0; color: var(--ink); }
.chart figcaption b { font-weight: 600; overflow-wrap: anywhere; }
.chart figcaption span { margin-left: auto; font-variant-numeric: tabular-nums; }
.chart figcaption code { flex-basis: 100%; color: var(--soft); font-size: 12px; overflow-wrap: anywhere; }
.plot { display: block; overflow: visible; height: 170px; width: calc(100% - 66px); margin: 14px 14px 32px 52px; }
.wide .plot { height: 240px; }
.plot text { font-size: 12px; fill: var(--soft); font-variant-numeric: tabular-nums; }
.plot .grid { stroke: var(--line); }
.plot polyline { fill: none; stroke: var(--curve); stroke-width: 2; stroke-linejoin: round; }
.plot .reference { stroke: var(--soft); stroke-width: 3; opacity: .4; }
.plot .raw { stroke-width: 1; opacity: .35; }
.plot polyline, .plot polygon { vector-effect: non-scaling-stroke; }
.plot .band { fill: var(--curve); opacity: .14; }
.plot circle { fill: var(--curve); }
.plot .base { stroke: var(--ink); stroke-dasharray: 5 4; opacity: .6; }
.plot .named { fill: var(--ink); paint-order: stroke; stroke: var(--card); stroke-width: 4; }
"""


@dataclass(frozen=True)
class Baseline:
    """A horizontal line with a name."""

    name: str
    value: float


def svg_chart(
    tag: str,
    records: Sequence[Mapping[str, Any]],
    baselines: Sequence[Baseline] = (),
    start: tuple[int, float] | None = None,
    half_widths: Mapping[int, float] | None = None,
    is_wide: bool = False,
    reference: Line | None = None,
) -> str:
    """Return a ``<figure>`` with the curve of a tag; text is escaped, and bytes are bounded.

    Args:
        records: of ``metrics.jsonl``; at least one has the tag.
        baselines: drawn as labelled horizontal lines.
        start: step and value where the curve begins.
        half_widths: half of the interval of confidence at each step, drawn as a band.
        reference: a curve for comparison, drawn faintly as far as the steps of the records go.
    """
    info = describe_tag(tag)
    (line,) = read_lines({"": records}, tag) or [Line("", np.zeros(0), np.zeros(0))]
    if start is not None:
        line = Line("", np.append(float(start[0]), line.steps), np.append(start[1], line.values))
    factor, unit = display_unit(tag, line.values)
    unit = f" {unit}" if unit.isalpha() or "/" in unit or " " in unit else unit
    if not len(line.steps):
        return _figure(info, tag, "", '<text x="50%" y="50%" text-anchor="middle">no finite values</text>', is_wide)
    values = line.values * factor
    # evaluations are few and exact
    mean = values if tag.startswith("eval/") else running_mean(values)
    fixed = [Baseline(each.name, each.value * factor) for each in baselines]
    spans = [mean, np.quantile(values, [0.01, 0.99]), np.array([each.value for each in fixed] or [mean[-1]])]
    if half_widths:
        half = np.array([half_widths.get(int(step), 0.0) for step in line.steps]) * factor
        spans += [values - half, values + half]
    first, last = line.steps[0], line.steps[-1] if line.steps[-1] > line.steps[0] else line.steps[0] + 1
    other = None if reference is None else _between(reference, first, last)
    if other is not None:
        other = Line("", other.steps, other.values * factor)
        spans.append(other.values)
    is_log = is_log_scale(tag, [mean, *spans[2:]])
    spans = [mean, *spans[2:]] if is_log else spans
    low, high = value_range(spans, is_log)

    def height(at: Any) -> Any:
        """Return the distance from the top as a share of the plot."""
        if is_log:
            at, bottom, top = np.log(np.maximum(at, low / 10)), math.log(low), math.log(high)
        else:
            bottom, top = low, high
        return np.clip((top - at) / (top - bottom), -1.0, 2.0)

    across = (line.steps - first) / (last - first)
    parts = [_y_axis(low, high, is_log, height, "%" if unit == "%" else ""), _x_axis(first, last)]
    curves = ""
    if other is not None:
        points = _points((other.steps - first) / (last - first), height(other.values))
        curves += f'<polyline class="reference" points="{points}"/>'
    if half_widths:
        outline = [_points(across, height(values + half)), _points(across[::-1], height(values - half)[::-1])]
        curves += f'<polygon class="band" points="{" ".join(outline)}"/>'
    if not np.array_equal(values, mean):
        curves += f'<polyline class="raw" points="{_points(*_thin(across, height(values)))}"/>'
    curves += f'<polyline points="{_points(*_thin(across, height(mean)))}"/>'
    parts.append(f'<svg viewBox="0 0 {UNITS} {UNITS}" preserveAspectRatio="none">{curves}</svg>')
    shown = range(len(values)) if len(values) <= MAX_MARKED else [len(values) - 1]
    parts += [f'<circle cx="{across[i]:.1%}" cy="{height(mean[i]):.1%}" r="3.5"/>' for i in shown]
    parts += _labelled(fixed, height, unit)
    now = f"{_number(mean[-1])}{unit} at step {int(line.steps[-1]):,}"
    return _figure(info, tag, now, "".join(parts), is_wide)


def _between(line: Line, first: float, last: float) -> Line | None:
    """Return the part of a curve at steps from ``first`` to ``last``, with its ends interpolated; None if empty."""
    if not len(line.steps) or line.steps[-1] < first or line.steps[0] > last:
        return None
    ends = np.clip([first, last], line.steps[0], line.steps[-1])
    steps = np.unique([*ends, *line.steps[(line.steps > first) & (line.steps < last)]])
    return Line(line.name, steps, np.interp(steps, line.steps, line.values))


def _figure(info: Tag, tag: str, now: str, drawing: str, is_wide: bool) -> str:
    title = html.escape(printable(info.title))
    code = "" if info.title == tag else f"<code>{html.escape(printable(tag))}</code>"
    alternative = html.escape(printable(f"{info.title}: {now or 'no finite values'}"))
    return (
        f'<figure class="chart{" wide" if is_wide else ""}"><figcaption><b>{title}</b><span>{html.escape(now)}</span>'
        f'{code}</figcaption><svg class="plot" role="img" aria-label="{alternative}">{drawing}</svg></figure>'
    )


def _y_axis(low: float, high: float, is_log: bool, height: Any, suffix: str) -> str:
    ticks = _log_ticks(low, high) if is_log else _ticks(low, high, 4)
    lines = []
    for tick in ticks:
        y = f"{height(tick):.2%}"
        lines.append(f'<line class="grid" x2="100%" y1="{y}" y2="{y}"/>')
        lines.append(f'<text x="-8" y="{y}" dy=".32em" text-anchor="end">{short_number(tick)}{suffix}</text>')
    return "".join(lines)


def _x_axis(first: float, last: float) -> str:
    ticks = [tick for tick in _ticks(first, last, 5) if tick == int(tick)]
    return "".join(
        f'<text x="{(tick - first) / (last - first):.2%}" y="100%" dy="1.6em" text-anchor="middle">'
        f"{short_number(tick)}</text>"
        for tick in ticks
    )


def _ticks(low: float, high: float, count: int) -> list[float]:
    from matplotlib.ticker import MaxNLocator

    values = MaxNLocator(count, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    # rounding makes 0.30000000000000004 of 0.3
    return [float(f"{value:.10g}") for value in values if low <= value <= high]


def _log_ticks(low: float, high: float) -> list[float]:
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    stride = max(1, len(exponents) // 5)
    return [10.0**exponent for exponent in exponents[::stride] if low <= 10.0**exponent <= high]


def _labelled(baselines: Sequence[Baseline], height: Any, unit: str) -> list[str]:
    """Return a dashed line for each baseline, with its name above it, or below it if another one is just above."""
    parts, above = [], -1.0
    for each in sorted(baselines, key=lambda baseline: -baseline.value):
        share = float(height(each.value))
        y, is_close = f"{share:.2%}", share - above < _LABEL_SHARE
        above = share
        parts.append(f'<line class="base" x2="100%" y1="{y}" y2="{y}"/>')
        text = html.escape(printable(f"{each.name} {_number(each.value)}{unit}"))
        shift = "1.25em" if is_close else "-.45em"
        parts.append(f'<text class="named" x="100%" y="{y}" dx="-6" dy="{shift}" text-anchor="end">{text}</text>')
    return parts


def _number(value: float) -> str:
    if abs(value) >= 1e5 or 0 < abs(value) < 1e-2:
        return short_number(float(f"{value:.3g}"))
    return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.3g}"


def _thin(across: np.ndarray, heights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return at most about ``MAX_POINTS`` points: the highest and the lowest of each piece, in order."""
    if len(across) <= MAX_POINTS:
        return across, heights
    pieces = np.array_split(np.arange(len(across)), MAX_POINTS // 2)
    extremes = ({piece[heights[piece].argmin()], piece[heights[piece].argmax()]} for piece in pieces)
    kept = np.unique([0, *(index for pair in extremes for index in pair), len(across) - 1])
    return across[kept], heights[kept]


def _points(across: np.ndarray, heights: np.ndarray) -> str:
    return " ".join(f"{x},{y}" for x, y in np.rint(np.stack([across, heights], 1) * UNITS).astype(int).tolist())
