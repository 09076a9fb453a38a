"""Pictures with titles: maps in colours that colour-blind readers can tell apart, tiles, captions. Pillow only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PAPER, INK, SOFT_INK, RED = (255, 255, 255), (28, 30, 38), (110, 114, 126), (230, 30, 40)
MARGIN, GAP, CAPTION = 24, 14, 26  # pixels

# Twenty evenly spaced colours of viridis (van der Walt and Smith, 2015; CC0), straight lines between them.
_VIRIDIS = [
    "440154", "481567", "482677", "453781", "404788", "39568c", "33638d", "2d708e", "287d8e", "238a8d",
    "1f968b", "20a387", "29af7f", "3cbb75", "55c667", "73d055", "95d840", "b8de29", "dce319", "fde725",
]  # fmt: skip


def viridis(values: np.ndarray) -> np.ndarray:
    """Values in 0..1, [...], as colours uint8 [..., 3]: dark violet to yellow, lighter is more."""
    anchors = np.array([[int(code[i : i + 2], 16) for i in (0, 2, 4)] for code in _VIRIDIS], np.float64)
    place = np.clip(values, 0, 1) * (len(anchors) - 1)
    low = np.minimum(place.astype(np.int64), len(anchors) - 2)
    share = (place - low)[..., None]
    return np.rint(anchors[low] * (1 - share) + anchors[low + 1] * share).astype(np.uint8)


@dataclass(frozen=True)
class Tile:
    """An image with a line below it."""

    image: Image.Image
    caption: str = ""


def enlarge(pixels: np.ndarray, size: tuple[int, int], smooth: bool) -> Image.Image:
    """uint8 [h, w, 3] at (width, height): smooth (bicubic), or each cell a flat square."""
    method = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    return Image.fromarray(pixels).resize(size, method)


def mark(image: Image.Image, patch: tuple[int, int], grid: tuple[int, int]) -> Image.Image:
    """A red cross, rimmed in white, at the middle of a patch (row, column) of a grid (rows, columns)."""
    marked = image.copy()
    x, y = (patch[1] + 0.5) * image.width / grid[1], (patch[0] + 0.5) * image.height / grid[0]
    arm = max(min(image.size) * 0.03, 6)
    draw = ImageDraw.Draw(marked)
    for colour, rim in (((255, 255, 255), 2), (RED, 0)):
        width = round(arm * 0.45) + 2 * rim
        draw.line((x - arm - rim, y, x + arm + rim, y), fill=colour, width=width)
        draw.line((x, y - arm - rim, x, y + arm + rim), fill=colour, width=width)
    return marked


def colour_bar(low: float, high: float, width: int, label: str) -> Image.Image:
    """A viridis bar with its ends and its meaning written below."""
    bar = Image.new("RGB", (width, 40), PAPER)
    ramp = viridis(np.linspace(0, 1, width))[None].repeat(12, axis=0)
    bar.paste(Image.fromarray(ramp), (0, 0))
    draw, font = ImageDraw.Draw(bar), typeface(14)
    draw.text((0, 18), f"{low:.2f}", INK, font)
    draw.text((width, 18), f"{high:.2f}", INK, font, anchor="ra")
    draw.text((width / 2, 18), label, SOFT_INK, font, anchor="ma")
    return bar


def compose(title: str, subtitle: str, rows: Sequence[Sequence[Tile]]) -> Image.Image:
    """A titled page of rows of tiles."""
    heights = [max(tile.image.height + (CAPTION if tile.caption else 0) for tile in row) for row in rows]
    widths = [sum(tile.image.width for tile in row) + GAP * (len(row) - 1) for row in rows]
    title_font, small_font = typeface(24), typeface(15)
    inner = max(*widths, round(title_font.getlength(title)), round(small_font.getlength(subtitle)))
    header = 38 + (24 if subtitle else 0) + 12
    page = Image.new("RGB", (inner + 2 * MARGIN, sum(heights) + GAP * (len(rows) - 1) + header + 2 * MARGIN), PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((MARGIN, MARGIN - 6), title, INK, title_font)
    draw.text((MARGIN, MARGIN + 30), subtitle, SOFT_INK, small_font)
    top = MARGIN + header
    for row, height in zip(rows, heights, strict=True):
        left = MARGIN
        for tile in row:
            page.paste(tile.image, (left, top))
            caption = shorten(tile.caption, tile.image.width, small_font)
            draw.text((left, top + tile.image.height + 5), caption, INK, small_font)
            left += tile.image.width + GAP
        top += height + GAP
    return page


def typeface(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The typeface that Pillow carries, so that pictures look alike on every machine."""
    return ImageFont.load_default(size)


def shorten(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """``text``, cut with an ellipsis to at most ``width`` pixels."""
    while text and font.getlength(text) > width:
        text = text[:-2].rstrip("…") + "…" if len(text) > 2 else ""
    return text
