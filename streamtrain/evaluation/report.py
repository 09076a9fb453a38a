"""A self-contained HTML report of a run: numbers, curves, pictures and settings in one file."""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from streamtrain.config.load import RESOLVED_NAME, read_resolved
from streamtrain.errors import StreamtrainError
from streamtrain.evaluation.figures import draw_charts
from streamtrain.planning.flops import step_flops
from streamtrain.planning.memory import plan
from streamtrain.planning.plan_text import gigabytes, rank_peak_bytes
from streamtrain.run.directory import CHECKPOINTS, METRICS_NAME, saved_steps
from streamtrain.run.provenance import ENVIRONMENT_NAME

Records = Sequence[Mapping[str, Any]]
# order of the charts: losses and evaluations first, the machine last
_TAG_GROUPS = ("loss", "eval", "features", "teacher", "optim", "speed", "data", "memory")

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
.charts img { width: 100%; box-sizing: border-box; border: 1px solid var(--line); border-radius: 8px; }
figure { margin: 0 0 24px; } figure img { max-width: 100%; border-radius: 4px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { text-align: right; padding: 6px 16px; border-bottom: 1px solid var(--line); font-weight: 400; }
td:first-child, th:first-child { text-align: left; padding-left: 0; } th { color: var(--soft); font-size: 13px; }
details { border-top: 1px solid var(--line); padding: 12px 0; } summary { cursor: pointer; font-weight: 600; }
pre { overflow-x: auto; background: var(--card); border-radius: 8px; padding: 16px; font-size: 13px; }
"""


@dataclass(frozen=True)
class Picture:
    """A PNG image on the page, with a caption below it."""

    png: bytes
    caption: str


def report_page(run: Path, records: Records, images: Mapping[str, tuple[int, bytes]]) -> str:
    """Return the report of a run directory as HTML.

    Args:
        records: of its ``metrics.jsonl``.
        images: step and PNG of the latest image by TensorBoard tag.

    Raises:
        StreamtrainError: if ``run`` is not a run directory, or has no completed step.
    """
    if not (run / RESOLVED_NAME).is_file():
        raise StreamtrainError(f"{run} is not a run directory: it has no {RESOLVED_NAME}")
    if not records:
        raise StreamtrainError(f"{run} has nothing to report yet: its {METRICS_NAME} has no step")
    tags = sorted({tag for record in records for tag in record} - {"step", "slot"}, key=_tag_order)
    # one run per chart, so its name would add nothing
    charts = (draw_charts({"": records}, [tag]) for tag in tags)
    curves = [Picture(_to_png(chart), tag) for chart, tag in zip(charts, tags, strict=True) if chart is not None]
    pictures = [Picture(png, f"{tag}, step {step}") for tag, (step, png) in images.items()]
    texts = {name: (run / name).read_text() for name in (RESOLVED_NAME, ENVIRONMENT_NAME) if (run / name).is_file()}
    steps = saved_steps(run)
    saved = f"checkpoints at steps {', '.join(map(str, steps))}" if steps else "no checkpoint yet"
    tables = {}
    if (run / ENVIRONMENT_NAME).is_file():
        tables["Plan and measurement"] = _plan_table(run, records)
    if len(evaluated := _evaluation_table(records)) > 1:
        tables["Evaluation while training"] = evaluated
    return _render(f"Run {run.resolve().name}", saved, _summary(records), curves, pictures, texts, tables)


def _summary(records: Records) -> dict[str, str]:
    last = records[-1]
    numbers = {"steps": f"{last['step']:,}", "images seen": f"{last['slot']:,}"}

    def column(tag: str) -> np.ndarray:
        return np.array([record[tag] for record in records if record.get(tag) is not None], np.float64)

    seconds, speed = column("speed/step_seconds"), column("speed/images_per_second")
    if len(seconds):
        numbers["total time of steps"] = _duration(float(seconds.sum()))
        numbers["images per second, median"] = f"{np.median(speed):.1f}"
        middle, slow = np.quantile(seconds, [0.5, 0.99])
        numbers["step, median and 99th percentile"] = f"{middle:.2f} s, {slow:.2f} s"
        wait = column("data/wait_share")
        share = f"{wait @ seconds[-len(wait) :] / seconds.sum():.1%}" if len(wait) else "–"
        numbers["share of time waiting for data"] = share
    for tag, name in (("loss/total", "loss, first to last"), ("eval/knn_20", "kNN (k = 20), first to last")):
        values = column(tag)
        if len(values):
            numbers[name] = f"{values[0]:.3f} → {values[-1]:.3f}"
    for tag, name in (("memory/gpu_bytes", "peak GPU memory"), ("memory/peak_rss_bytes", "peak host memory")):
        values = column(tag)
        if len(values):
            numbers[name] = f"{values.max() / 2**30:.2f} GiB"
    return numbers


def _plan_table(run: Path, records: Records) -> list[list[str]]:
    """Return planned and measured memory, FLOPs and disk space."""
    environment = json.loads((run / ENVIRONMENT_NAME).read_text())
    config, world_size = read_resolved(run), int(environment["world_size"])
    device = environment.get("device", "cpu")
    on_gpu = device != "cpu"
    planned = plan(config, world_size, on_gpu=on_gpu, bf16=environment.get("dtype") == "bf16")
    tag = "memory/gpu_bytes" if on_gpu else "memory/peak_rss_bytes"
    peak = max((record[tag] for record in records if record.get(tag) is not None), default=math.nan)
    seconds = float(np.median([record.get("speed/step_seconds", math.nan) for record in records]))
    rate = step_flops(config, world_size).executed / seconds
    disk_bytes = sum(path.stat().st_size for path in (run / CHECKPOINTS).rglob("*") if path.is_file())
    expected = gigabytes(rank_peak_bytes(planned, on_gpu))
    return [
        ["", "planned", "measured"],
        [f"peak memory per rank, {device}", f"{expected} GB", f"{gigabytes(peak)} GB"],
        ["parameters", f"{planned.num_parameters / 1e6:,.1f} M", ""],
        ["FLOPs of a step, all ranks", f"{planned.flops_per_step / 1e12:,.3g} TFLOP", f"{rate / 1e12:,.3g} TFLOP/s"],
        ["step time, median", "", f"{seconds:.3g} s"],
        ["disk space of all checkpoints", f"{gigabytes(planned.disk_bytes)} GB", f"{gigabytes(disk_bytes)} GB"],
    ]


def _evaluation_table(records: Records) -> list[list[str]]:
    """Return each metric at its first, best and latest evaluation; only the header row if there are none."""
    rows = [["", "first", "highest", "last"]]
    for tag in dict.fromkeys(tag for record in records for tag in record if tag.startswith("eval/")):
        values = [(record[tag], record["step"]) for record in records if record.get(tag) is not None]
        if values and tag not in ("eval/seconds", "eval/time_share"):
            shown = (values[0], max(values), values[-1])
            rows.append([tag.removeprefix("eval/"), *(f"{value:.1%} (step {step})" for value, step in shown)])
    return rows


def _render(
    title: str,
    subtitle: str,
    numbers: Mapping[str, str],
    charts: Sequence[Picture],
    pictures: Sequence[Picture],
    texts: Mapping[str, str],
    tables: Mapping[str, list[list[str]]],
) -> str:
    """Return the page as HTML; the first row of each table holds the column headers."""
    cards = "".join(
        f"<div><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>" for name, value in numbers.items()
    )
    parts = [f"<h1>{html.escape(title)}</h1>", f'<p class="soft">{html.escape(subtitle)}</p>']
    parts.append(f'<div class="numbers">{cards}</div>')
    if charts:
        images = "".join(_image_tag(chart) for chart in charts)
        parts.append(f'<h2>Curves</h2><div class="charts">{images}</div>')
    for name, (headers, *rows) in tables.items():
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in headers)
        body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
        parts.append(f"<h2>{html.escape(name)}</h2><table><tr>{head}</tr>{body}</table>")
    if pictures:
        figures = (
            f"<figure>{_image_tag(p)}<figcaption>{html.escape(p.caption)}</figcaption></figure>" for p in pictures
        )
        parts.append(f"<h2>Pictures</h2>{''.join(figures)}")
    if texts:
        parts.append("<h2>Details</h2>")
    for name, text in texts.items():
        parts.append(f"<details><summary>{html.escape(name)}</summary><pre>{html.escape(text)}</pre></details>")
    body = "\n".join(parts)
    # the empty icon keeps browsers from requesting one
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _image_tag(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode()
    return f'<img alt="{html.escape(picture.caption)}" src="data:image/png;base64,{data}">'


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _tag_order(tag: str) -> tuple[int, str]:
    group = tag.partition("/")[0]
    return (_TAG_GROUPS.index(group) if group in _TAG_GROUPS else len(_TAG_GROUPS), tag)


def _to_png(chart: Image.Image) -> bytes:
    buffer = io.BytesIO()
    # for lines and text a palette is enough, at a third of the bytes
    chart.quantize(128).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
