"""Line charts with Pillow: a title, few grid lines, lines named where they end, colours for colour-blind readers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from streamtrain.evaluation.canvas import INK, PAPER, SOFT_INK, shorten, typeface

# Okabe and Ito 2008: told apart with every kind of colour vision.
PALETTE = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233), (90, 90, 90))
GRID = (228, 230, 234)
SCALE = 2  # pixels a unit of the layout below: lines and letters are drawn at twice their size


@dataclass(frozen=True)
class Line:
    """One curve: values [N] at steps [N]; NaN where there is none."""

    name: str
    steps: np.ndarray
    values: np.ndarray


def line_chart(title: str, lines: Sequence[Line], width: int = 420, height: int = 240) -> Image.Image:
    """A chart of ``width`` x ``height`` units, twice that in pixels. The raw values are faint, a running mean is bold.

    The value axis spans the running means and the middle 98 % of the values, so that one spike does not flatten
    the rest.
    """
    image = Image.new("RGB", (width * SCALE, height * SCALE), PAPER)
    draw, small = ImageDraw.Draw(image), typeface(11 * SCALE)
    draw.text((10 * SCALE, 6 * SCALE), title, INK, typeface(14 * SCALE))
    lines = [clean for line in lines if len((clean := _finite(line)).steps)]
    if not lines:
        draw.text((width * SCALE // 2, height * SCALE // 2), "no values", SOFT_INK, small, anchor="mm")
        return image
    means = [smooth(line.values) for line in lines]
    low, high = _span([*means, *(np.quantile(line.values, [0.01, 0.99]) for line in lines)])
    first, last = min(line.steps[0] for line in lines), max(line.steps[-1] for line in lines)
    left, top, right, bottom = 58 * SCALE, 34 * SCALE, (width - 14) * SCALE, (height - 26) * SCALE
    if len(lines) > 1:
        top += 16 * SCALE
        _legend(draw, lines, left, 27 * SCALE, right)

    def place(steps: np.ndarray, values: np.ndarray) -> list[tuple[float, float]]:
        x = left + (steps - first) / max(last - first, 1) * (right - left)
        y = bottom - (np.clip(values, low, high) - low) / (high - low) * (bottom - top)
        return list(zip(x.tolist(), y.tolist(), strict=True))

    for value in ticks(low, high, 4):
        y = place(np.array([first]), np.array([value]))[0][1]
        draw.line((left, y, right, y), fill=GRID, width=SCALE)
        draw.text((left - 6 * SCALE, y), label(value), SOFT_INK, small, anchor="rm")
    for step in ticks(float(first), float(last), 4):
        x = place(np.array([step]), np.array([low]))[0][0]
        draw.text((x, bottom + 5 * SCALE), label(step), SOFT_INK, small, anchor="mt")
    inks = [PALETTE[index % len(PALETTE)] for index in range(len(lines))]
    for line, colour in zip(lines, inks, strict=True):
        faint = tuple(round(channel * 0.25 + 255 * 0.75) for channel in colour)
        _curve(draw, place(line.steps, line.values), faint, SCALE)
    for line, mean, colour in zip(lines, means, inks, strict=True):
        points = place(line.steps, mean)
        _curve(draw, points, colour, 2 * SCALE)
        x, y = points[-1]
        draw.ellipse((x - 3 * SCALE, y - 3 * SCALE, x + 3 * SCALE, y + 3 * SCALE), fill=colour)
    return image


def charts_of(runs: Mapping[str, Sequence[Mapping[str, Any]]], tags: Sequence[str]) -> list[Image.Image]:
    """One chart a tag, one line a run; tags that no run has are left out.

    Args:
        runs: by name, the records of ``metrics.jsonl``.
        tags: in the order of the charts.
    """
    charts = []
    for tag in tags:
        lines = []
        for name, records in runs.items():
            rows = [(record["step"], record[tag]) for record in records if tag in record]
            steps = np.array([step for step, _ in rows], np.int64)
            values = np.array([math.nan if value is None else value for _, value in rows], np.float64)
            lines.append(Line(name, steps, values))
        if any(len(line.steps) for line in lines):
            charts.append(line_chart(tag, lines))
    return charts


def smooth(values: np.ndarray) -> np.ndarray:
    """Mean over a window of about a twentieth of the points; narrower, so as to stay centred, towards the ends."""
    count = len(values)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(count)
    half = np.minimum(np.minimum(index, count - 1 - index), count // 40)
    return (sums[index + half + 1] - sums[index - half]) / (2 * half + 1)


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers within [low, high], about ``count`` of them."""
    if high <= low:
        return [low]
    rough = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(rough))
    step = unit * next(factor for factor in (1, 2, 2.5, 5, 10) if factor * unit >= rough * 0.999)
    return [index * step for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def label(value: float) -> str:
    """A short number: 12k, 0.25, 3e-05."""
    if value == 0:
        return "0"
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.4g}{letter}"
    return f"{value:.4g}" if abs(value) >= 1e-3 else f"{value:.1e}"


def _span(values: Sequence[np.ndarray]) -> tuple[float, float]:
    """A little more than the values reach; never empty."""
    low, high = min(float(part.min()) for part in values), max(float(part.max()) for part in values)
    # a constant, whatever the rounding of its running mean
    constant = high - low <= 1e-9 * max(abs(high), abs(low))
    margin = max(abs(high) * 0.05, 1e-6) if constant else (high - low) * 0.06
    return low - margin, high + margin


def _curve(draw: ImageDraw.ImageDraw, points: list[tuple[float, float]], ink: tuple[int, ...], width: int) -> None:
    """A line through the points; a long run's are thinned out to what the width can show."""
    stride = max(len(points) // 2000, 1)
    if len(points) > 1:
        draw.line([*points[:-1:stride], points[-1]], fill=ink, width=width, joint="curve")


def _finite(line: Line) -> Line:
    there = np.isfinite(line.values)
    return Line(line.name, line.steps[there], line.values[there])


def _legend(draw: ImageDraw.ImageDraw, lines: Sequence[Line], left: float, top: float, right: float) -> None:
    """Names in their colours, side by side in equal parts of the width."""
    part = (right - left) / len(lines)
    for index, line in enumerate(lines):
        x, letters = left + index * part, typeface(11 * SCALE)
        draw.rectangle((x, top + 5 * SCALE, x + 10 * SCALE, top + 9 * SCALE), fill=PALETTE[index % len(PALETTE)])
        name = shorten(line.name, round(part - 22 * SCALE), letters)
        draw.text((x + 14 * SCALE, top), name, INK, letters)
