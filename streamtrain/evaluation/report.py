"""A page for a run: one HTML file with everything inside it, which opens without a network."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e26; --soft: #6e727e; --paper: #fff; --line: #e3e5ea; --card: #f6f7f9; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8ee; --soft: #9aa0ae; --paper: #14161b; --line: #2b2f38; --card: #1c1f26; }
}
body { margin: 0 auto; max-width: 1240px; padding: 32px 24px 64px; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 28px; margin: 0; } h2 { font-size: 20px; margin: 40px 0 12px; }
p.soft, figcaption { color: var(--soft); margin: 4px 0 0; font-size: 14px; }
.numbers { display: grid; grid-template-columns: repeat(auto-fill, minmax(180px, 1fr)); gap: 12px; margin-top: 24px; }
.numbers div { background: var(--card); border-radius: 8px; padding: 12px 16px; }
.numbers b { display: block; font-size: 22px; font-variant-numeric: tabular-nums; }
.numbers span { color: var(--soft); font-size: 13px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(360px, 1fr)); gap: 16px; }
.charts img { width: 100%; border: 1px solid var(--line); border-radius: 8px; background: #fff; }
figure { margin: 0 0 24px; } figure img { max-width: 100%; border-radius: 4px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { text-align: right; padding: 6px 16px; border-bottom: 1px solid var(--line); font-weight: 400; }
td:first-child, th:first-child { text-align: left; padding-left: 0; } th { color: var(--soft); font-size: 13px; }
details { border-top: 1px solid var(--line); padding: 12px 0; } summary { cursor: pointer; font-weight: 600; }
pre { overflow-x: auto; background: var(--card); border-radius: 8px; padding: 16px; font-size: 13px; }
"""


@dataclass(frozen=True)
class Picture:
    """An image on the page: the bytes of a PNG, and a line below it."""

    png: bytes
    caption: str


def png_of(image: Image.Image) -> bytes:
    """The image as the bytes of a PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def numbers_of(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The run in a few numbers, from the records of its ``metrics.jsonl``."""
    if not records:
        return {"steps": "0"}
    last = records[-1]
    numbers = {"steps": f"{last['step']:,}", "images seen": f"{last['slot']:,}"}

    def column(tag: str) -> np.ndarray:
        return np.array([record[tag] for record in records if record.get(tag) is not None], np.float64)

    seconds, speed = column("speed/step_seconds"), column("speed/images_per_second")
    if len(seconds):
        numbers["time in steps"] = _duration(float(seconds.sum()))
        numbers["images a second (median)"] = f"{np.median(speed):.1f}"
        middle, slow = np.quantile(seconds, [0.5, 0.99])
        numbers["step, median and 99 %"] = f"{middle:.2f} s, {slow:.2f} s"
        wait = column("data/wait_share")
        numbers["waiting for data"] = f"{wait @ seconds[-len(wait) :] / seconds.sum():.1%}" if len(wait) else "–"
    for tag, name in (("loss/total", "loss, first to last"), ("eval/knn_20", "kNN (k = 20), first to last")):
        values = column(tag)
        if len(values):
            numbers[name] = f"{values[0]:.3f} → {values[-1]:.3f}"
    for tag, name in (("memory/gpu_bytes", "peak GPU memory"), ("memory/peak_rss_bytes", "peak host memory")):
        values = column(tag)
        if len(values):
            numbers[name] = f"{values.max() / 2**30:.2f} GiB"
    return numbers


def render(
    title: str,
    subtitle: str,
    numbers: Mapping[str, str],
    charts: Sequence[Picture],
    pictures: Sequence[Picture],
    texts: Mapping[str, str],
    tables: Mapping[str, Sequence[Sequence[str]]],
) -> str:
    """The page as HTML.

    Args:
        numbers: by their names, in order.
        tables: by title, rows of cells, the first row being the heads.
        charts: shown in a grid.
        pictures: shown below each other.
        texts: by title, folded away.
    """
    cards = "".join(
        f"<div><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>" for name, value in numbers.items()
    )
    parts = [f"<h1>{html.escape(title)}</h1>", f'<p class="soft">{html.escape(subtitle)}</p>']
    parts.append(f'<div class="numbers">{cards}</div>')
    if charts:
        images = "".join(_image(chart) for chart in charts)
        parts.append(f'<h2>Curves</h2><div class="charts">{images}</div>')
    for name, (heads, *rows) in tables.items():
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in heads)
        body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
        parts.append(f"<h2>{html.escape(name)}</h2><table><tr>{head}</tr>{body}</table>")
    if pictures:
        figures = (f"<figure>{_image(p)}<figcaption>{html.escape(p.caption)}</figcaption></figure>" for p in pictures)
        parts.append(f"<h2>Pictures</h2>{''.join(figures)}")
    if texts:
        parts.append("<h2>Details</h2>")
    for name, text in texts.items():
        parts.append(f"<details><summary>{html.escape(name)}</summary><pre>{html.escape(text)}</pre></details>")
    body = "\n".join(parts)
    # An empty icon, since a browser would ask the network for one.
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _image(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode()
    return f'<img alt="{html.escape(picture.caption)}" src="data:image/png;base64,{data}">'


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
