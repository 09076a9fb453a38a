"""Pages of images and maps, and line charts, drawn with matplotlib on the Agg canvas.

matplotlib is imported where it is used, so that training starts without it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from shards.errors import printable
from streamtrain.run.tags import describe_tag

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# distinguishable with every kind of colour vision (Okabe and Ito 2008)
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5a5a5a")
INK, SOFT_INK, GRID, RED = "#1c1e26", "#6e727e", "#e3e5ea", "#e61e28"
COLOURS = "viridis"
# sizes on image pages in pixels; at this DPI a point is a pixel
DPI = 72
MARGIN, GAP, CAPTION, TITLE_SIZE, TEXT_SIZE = 24, 14, 26, 24, 14
# pixels per point in charts, and the size of one chart in points
CHART_SCALE = 2
CHART_WIDTH, CHART_HEIGHT = 420, 240
_MAX_SHOWN = 1e100
# up to this number of runs, raw values are drawn below their running mean
_MAX_RAW = 3
# the smallest span of a value axis, as a share of the largest value
_MIN_RELATIVE_SPAN = 0.02
# from this ratio of the highest to the lowest value, a logarithmic axis shows more
_LOG_RATIO = 50.0


@dataclass(frozen=True)
class Tile:
    """An image or a map on a page, with a caption below it.

    Attributes:
        values: uint8 [h, w, 3], or a float map [h, w] that is drawn in viridis.
        size: drawn width and height in pixels.
        caption: one line, cut to the width of the tile.
        limits: values of a map's darkest and lightest colour.
        smooth: interpolate between values (bicubic); otherwise each value is a flat rectangle.
        marks: (row, column) of patches in ``grid`` to mark with a red cross.
        grid: (rows, columns) of patches in the image.
    """

    values: np.ndarray
    size: tuple[int, int]
    caption: str = ""
    limits: tuple[float, float] = (0.0, 1.0)
    smooth: bool = False
    marks: Sequence[tuple[int, int]] = ()
    grid: tuple[int, int] = (1, 1)


@dataclass(frozen=True)
class Link:
    """A line between points of two tiles of the first row.

    Attributes:
        start, end: (tile, x, y); x and y are shares of the tile's width and height.
        colour: RGB in 0..1.
    """

    start: tuple[int, float, float]
    end: tuple[int, float, float]
    colour: tuple[float, float, float]


def photo(image: Image.Image, caption: str = "", marks: Sequence[tuple[int, int]] = (),
          grid: tuple[int, int] = (1, 1)) -> Tile:  # fmt: skip
    return Tile(np.asarray(image), image.size, caption, marks=marks, grid=grid)


def draw_page(
    title: str, subtitle: str, rows: Sequence[Sequence[Tile]], colour_label: str | None = None,
    links: Sequence[Link] = (),
) -> Image.Image:  # fmt: skip
    """Draw a titled page of rows of tiles; with ``colour_label``, a colour bar is below the first map."""
    heights = [max(tile.size[1] + (CAPTION if tile.caption else 0) for tile in row) for row in rows]
    widths = [sum(tile.size[0] for tile in row) + GAP * (len(row) - 1) for row in rows]
    inner = math.ceil(max(*widths, _text_width(title, TITLE_SIZE), _text_width(subtitle, TEXT_SIZE)))
    header = 74 if subtitle else 50
    bar_height = 62 if colour_label is not None else 0
    width = inner + 2 * MARGIN
    height = header + sum(heights) + GAP * (len(rows) - 1) + bar_height + 2 * MARGIN
    figure = _new_figure(width / DPI, height / DPI, DPI)
    # one set of axes in pixels, with y pointing down
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    _write(axes, MARGIN, MARGIN + 18, title, INK, TITLE_SIZE)
    _write(axes, MARGIN, MARGIN + 46, subtitle, SOFT_INK, TEXT_SIZE)
    bar: tuple[int, Tile] | None = None
    corners: list[tuple[int, int]] = []
    top = MARGIN + header
    for row, row_height in zip(rows, heights, strict=True):
        left = MARGIN
        for tile in row:
            right, bottom = left + tile.size[0], top + tile.size[1]
            corners.append((left, top))
            axes.imshow(
                tile.values, COLOURS, aspect="auto", extent=(left, right, bottom, top),
                vmin=tile.limits[0], vmax=tile.limits[1], interpolation="bicubic" if tile.smooth else "nearest",
            )  # fmt: skip
            arm = max(min(tile.size) * 0.03, 6)
            for patch in tile.marks:
                x, y = (
                    start + (index + 0.5) * length / count
                    for start, index, length, count in zip(
                        (left, top), patch[::-1], tile.size, tile.grid[::-1], strict=True
                    )
                )
                for colour, rim in (("white", 2), (RED, 0)):
                    size, line = 2 * (arm + rim), round(arm * 0.45) + 2 * rim
                    axes.plot([x], [y], "+", color=colour, markersize=size, markeredgewidth=line)
            _write(axes, left, bottom + 17, shorten(tile.caption, tile.size[0], TEXT_SIZE), INK, TEXT_SIZE)
            if bar is None and tile.values.ndim == 2:
                bar = (left, tile)
            left = right + GAP
        top += row_height + GAP
    for link in links:
        xs, ys = zip(
            *(
                (corners[tile][0] + x * rows[0][tile].size[0], corners[tile][1] + y * rows[0][tile].size[1])
                for tile, x, y in (link.start, link.end)
            ),
            strict=True,
        )
        # a dark rim separates the line from any image
        axes.plot(xs, ys, "-o", color="black", linewidth=2.6, markersize=7, alpha=0.45)
        axes.plot(xs, ys, "-o", color=link.colour, linewidth=1.4, markersize=5)
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    if colour_label is not None and bar is not None:
        _draw_colour_bar(figure, (bar[0], height - MARGIN - 46), bar[1], colour_label, (width, height))
    return _render(figure)


def _draw_colour_bar(figure: Figure, corner: tuple[int, int], tile: Tile, label: str, page: tuple[int, int]) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    left, top = corner[0] / page[0], 1 - corner[1] / page[1]
    width = max(min(tile.size[0], 480), _text_width(label, TEXT_SIZE)) / page[0]
    axes = figure.add_axes((left, top - 10 / page[1], width, 10 / page[1]))
    bar = figure.colorbar(ScalarMappable(Normalize(*tile.limits), COLOURS), cax=axes, orientation="horizontal")
    bar.outline.set_visible(False)
    bar.set_label(label, color=SOFT_INK, fontsize=TEXT_SIZE - 1, labelpad=4)
    low, high = tile.limits
    bar.set_ticks([low, (low + high) / 2, high])
    bar.ax.tick_params(length=0, pad=6, labelsize=TEXT_SIZE - 2, labelcolor=INK)
    bar.ax.xaxis.set_major_formatter(lambda value, _: f"{value:.2f}")
    first, _, last = bar.ax.get_xticklabels()
    first.set_horizontalalignment("left")
    last.set_horizontalalignment("right")


@dataclass(frozen=True)
class Line:
    """One curve: the finite ``values`` [N] at ``steps`` [N]."""

    name: str
    steps: np.ndarray
    values: np.ndarray


def read_lines(runs: Mapping[str, Sequence[Mapping[str, Any]]], tag: str) -> list[Line]:
    """Return one line per run that logged ``tag``; ``runs``: records of ``metrics.jsonl`` by run name."""
    lines = []
    for name, records in runs.items():
        rows = [(record["step"], record[tag]) for record in records if tag in record]
        if rows:
            steps = np.array([step for step, _ in rows], np.float64)
            values = np.array([math.nan if value is None else value for _, value in rows], np.float64)
            # sums of larger values overflow
            finite = np.abs(values) < _MAX_SHOWN
            lines.append(Line(name, steps[finite], values[finite]))
    return lines


def draw_charts(
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    tags: Sequence[str],
    title: str = "",
    subtitle: str = "",
) -> Image.Image | None:
    """Draw one chart per tag with one line per run, two charts in a row; None if no run logged any of the tags.

    Args:
        runs: records of ``metrics.jsonl`` by run name; several runs get a legend.
        tags: in the order of the charts; tags without records are left out.
    """
    from matplotlib.lines import Line2D

    charts = [(tag, lines) for tag in tags if (lines := read_lines(runs, tag))]
    if not charts:
        return None
    columns = min(2, len(charts))
    width = columns * CHART_WIDTH
    # beyond the palette, colours repeat with another dash
    dashes = ("-", "--", ":", "-.")
    styles: dict[str, dict[str, Any]] = {
        name: {"color": PALETTE[index % len(PALETTE)], "linestyle": dashes[index // len(PALETTE) % len(dashes)]}
        for index, name in enumerate(runs)
    }
    names = [shorten_middle(name, width - 80, 11) for name in runs] if len(runs) > 1 else []
    legend_columns = max(1, int((width - 40) / (max((_text_width(name, 11) for name in names), default=1) + 44)))
    legend_height = 8 + 16.8 * math.ceil(len(names) / legend_columns) if names else 0
    header = (64 if title else 0) + legend_height
    height = header + CHART_HEIGHT * math.ceil(len(charts) / columns) + (8 if title else 0)
    figure = _new_figure(width / 72, height / 72, 72 * CHART_SCALE)
    if title:
        figure.text(18 / width, 1 - 30 / height, printable(title), color=INK, fontsize=18, parse_math=False)
        line = shorten(subtitle, width - 36, 11)
        figure.text(18 / width, 1 - 50 / height, line, color=SOFT_INK, fontsize=11, parse_math=False)
    if names:
        legend = figure.legend(
            [Line2D([], [], linewidth=2.5, **style) for style in styles.values()], names, ncols=legend_columns,
            loc="upper left", bbox_to_anchor=(14 / width, 1 - (header - legend_height - 2) / height),
            fontsize=11, frameon=False, borderaxespad=0, borderpad=0.4, handlelength=1.6, labelcolor=INK,
        )  # fmt: skip
        for text in legend.get_texts():
            text.set_parse_math(False)
    for index, (tag, lines) in enumerate(charts):
        left, top = index % columns * CHART_WIDTH, header + index // columns * CHART_HEIGHT
        inner = (CHART_WIDTH - 78, CHART_HEIGHT - 74)
        axes = figure.add_axes(
            ((left + 60) / width, 1 - (top + 34 + inner[1]) / height, inner[0] / width, inner[1] / height)
        )
        _draw_chart(axes, tag, lines, styles)
        if index + columns >= len(charts):
            axes.set_xlabel("step", color=SOFT_INK, fontsize=10, labelpad=2)
    return _render(figure)


def _draw_chart(axes: Axes, tag: str, lines: Sequence[Line], styles: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw the raw values faintly and their running mean on top, with a dot at its end.

    The value axis spans the running means and the middle 98 % of the values, so that a spike does not flatten the rest.
    It is logarithmic where the running means span decades.
    """
    from matplotlib.colors import to_rgb
    from matplotlib.ticker import MaxNLocator, NullLocator

    factor, unit = display_unit(tag, np.concatenate([line.values for line in lines]))
    lines = [replace(line, values=line.values * factor) for line in lines]
    axes.set_title(
        shorten(f"{tag} ({unit})" if unit else tag, CHART_WIDTH - 40, 12.5),
        loc="left",
        color=INK,
        fontsize=12.5,
        pad=9,
        parse_math=False,
        x=-42 / (CHART_WIDTH - 78),
    )
    axes.spines[:].set_visible(False)
    axes.grid(axis="y", color=GRID, linewidth=1)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=10, labelcolor=SOFT_INK, pad=5)
    for axis, count in ((axes.xaxis, 5), (axes.yaxis, 4)):
        axis.set_major_locator(MaxNLocator(count, steps=[1, 2, 2.5, 5, 10], integer=axis is axes.xaxis))
        axis.set_major_formatter(lambda value, _: short_number(value))
    lines = [line for line in lines if len(line.steps)]
    if not lines:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.text(
            0.5, 0.5, "no finite values", color=SOFT_INK, fontsize=11, ha="center", va="center",
            transform=axes.transAxes,
        )  # fmt: skip
        return
    is_log = is_log_scale(tag, [running_mean(line.values) for line in lines])
    if is_log:
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(lambda value, _: short_number(value))
    means = [running_mean(line.values) for line in lines]
    # the raw values of many runs would hide each other
    for line in lines if len(lines) <= _MAX_RAW else ():
        # an opaque tint, because transparent lines of several runs would blend
        tint = tuple(0.72 + 0.28 * channel for channel in to_rgb(styles[line.name]["color"]))
        axes.plot(line.steps, line.values, color=tint, linewidth=1)
    for line, mean in zip(lines, means, strict=True):
        axes.plot(line.steps, mean, **styles[line.name], linewidth=2, solid_capstyle="round")
        axes.plot(line.steps[-1:], mean[-1:], "o", color=styles[line.name]["color"], markersize=5, clip_on=False)
    spans = means if is_log else [*means, *(np.quantile(line.values, [0.01, 0.99]) for line in lines)]
    low, high = value_range(spans, is_log)
    axes.set_ylim(low, high)
    first, last = min(line.steps[0] for line in lines), max(line.steps[-1] for line in lines)
    axes.set_xlim(first, last if last > first else first + 1)


def running_mean(values: np.ndarray) -> np.ndarray:
    """Return the mean over a centred window of about a twentieth of the points, truncated at both ends."""
    half, index = len(values) // 40, np.arange(len(values))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    start, stop = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (sums[stop] - sums[start]) / (stop - start)


def short_number(value: float) -> str:
    """Return a short form such as ``12k``, ``0.25`` or ``3e-05``."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.4g}{letter}"
    return f"{value:.4g}"


def shorten(text: str, width: float, size: float) -> str:
    """Return ``text``, escaped and cut with an ellipsis to at most ``width`` points at font size ``size``."""
    text = printable(text)[: int(width)]
    if _text_width(text, size) <= width:
        return text
    while text and _text_width(text + "…", size) > width:
        text = text[:-1]
    return text.rstrip() + "…"


def value_range(values: Sequence[np.ndarray], is_log: bool = False) -> tuple[float, float]:
    """Return limits a little wider than the values, and wide enough that a nearly constant curve looks flat."""
    low, high = min(float(part.min()) for part in values), max(float(part.max()) for part in values)
    if is_log:
        margin = (high / low) ** 0.06
        return low / margin, high * margin
    missing = _MIN_RELATIVE_SPAN * max(abs(low), abs(high)) - (high - low)
    if low == high == 0:
        return -0.05, 1.0
    margin = max((high - low) * 0.06, missing / 2)
    return low - margin, high + margin


def is_log_scale(tag: str, values: Sequence[np.ndarray]) -> bool:
    """Return whether a tag whose values may span decades does so here; all values must be positive."""
    low, high = min(float(part.min()) for part in values), max(float(part.max()) for part in values)
    return describe_tag(tag).is_logarithmic and low > 0 and high / low >= _LOG_RATIO


def display_unit(tag: str, values: np.ndarray) -> tuple[float, str]:
    """Return the factor from a tag's values to the numbers that are shown, and their unit or an empty string."""
    unit, highest = describe_tag(tag).unit, values.max(initial=0.0)
    if unit == "share":
        return 100.0, "%"
    if unit == "bytes":
        return (1e-9, "GB") if highest >= 1e9 else (1e-6, "MB")
    if unit == "seconds":
        return (1e3, "ms") if highest < 0.5 else (1.0, "s")
    return 1.0, unit


def _new_figure(width: float, height: float, dpi: int) -> Figure:
    """Return an empty white figure of ``width`` x ``height`` inches with an Agg canvas."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((width, height), dpi, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _render(figure: Figure) -> Image.Image:
    with warnings.catch_warnings():
        # a character that no font has is drawn as a box
        warnings.filterwarnings("ignore", message="Glyph")
        figure.canvas.draw()
    image = Image.fromarray(np.array(figure.canvas.buffer_rgba())).convert("RGB")  # type: ignore[attr-defined]
    # a figure is in reference cycles, which a training process collects rarely; release its pixels and images now
    figure.clear()
    figure.canvas.renderer = None  # type: ignore[attr-defined]
    return image


def shorten_middle(text: str, width: float, size: float) -> str:
    """Return ``text`` like ``shorten``, but cut in the middle: names of runs often differ at the end."""
    text = printable(text)
    if len(text) > width:
        text = f"{text[: int(width / 2)]}…{text[-int(width / 2) :]}"
    kept = len(text) // 2
    shown = text
    while kept and _text_width(shown, size) > width:
        kept -= 1
        shown = f"{text[:kept]}…{text[-kept:]}"
    return shown


def _write(axes: Axes, x: float, y: float, text: str, colour: str, size: float) -> None:
    axes.text(x, y, printable(text), color=colour, fontsize=size, va="baseline", parse_math=False)


@cache
def _renderer() -> Any:
    from matplotlib.backends.backend_agg import RendererAgg

    return RendererAgg(1, 1, DPI)


def _text_width(text: str, size: float) -> float:
    """Return the width of ``text`` in points."""
    from matplotlib.font_manager import FontProperties

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        size_of = _renderer().get_text_width_height_descent(printable(text), FontProperties(size=size), ismath=False)
    return float(size_of[0])
