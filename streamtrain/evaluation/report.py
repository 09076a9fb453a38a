"""A self-contained HTML report of a run: numbers, curves, pictures and settings in one file.

The run directory is untrusted: all text is escaped, and a file that cannot be read is left out with a
warning.
"""

from __future__ import annotations

import base64
import html
import io
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from shards.errors import printable, printable_lines
from shards.format.files import read_json
from streamtrain.config.load import RESOLVED_NAME, read_resolved
from streamtrain.errors import StreamtrainError
from streamtrain.evaluation.figures import draw_charts
from streamtrain.planning.flops import step_flops
from streamtrain.planning.images import configured_images
from streamtrain.planning.memory import plan
from streamtrain.planning.plan_text import gigabytes
from streamtrain.run.directory import CHECKPOINTS, METRICS_NAME, saved_steps
from streamtrain.run.provenance import ENVIRONMENT_NAME

logger = logging.getLogger(__name__)
Records = Sequence[Mapping[str, Any]]
_MAX_RANKS, _MAX_SECONDS = 1 << 20, 1e12
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


# charts on a page, in all and of one group: each takes about 60 ms to draw
MAX_CHARTS, MAX_CHARTS_OF_GROUP = 120, 60
MAX_PICTURES, MAX_ROWS = 100, 100
_MAX_TEXT_BYTES = 1 << 20
# kinds of pictures that cannot contain scripts, by their first bytes
_PICTURE_KINDS = {b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpeg"}


@dataclass(frozen=True)
class Picture:
    """An image on the page, with a caption below it."""

    content: bytes
    caption: str

    @property
    def kind(self) -> str | None:
        """``png``, ``jpeg``, or None for any other content, which is never shown."""
        return next((kind for start, kind in _PICTURE_KINDS.items() if self.content.startswith(start)), None)


def report_page(run: Path, records: Records, images: Mapping[str, tuple[int, bytes]]) -> str:
    """Return the report of a run directory as HTML.

    Args:
        records: of its ``metrics.jsonl``.
        images: step and PNG or JPEG of the latest image by TensorBoard tag; other images are left out.

    Raises:
        StreamtrainError: if ``run`` is not a run directory, or has no completed step.
    """
    if not (run / RESOLVED_NAME).is_file():
        raise StreamtrainError(f"{run} is not a run directory: it has no {RESOLVED_NAME}")
    if not records:
        raise StreamtrainError(f"{run} has nothing to report yet: its {METRICS_NAME} has no step")
    tags = sorted({tag for record in records for tag in record} - {"step", "slot"}, key=_tag_order)
    shown = _select_tags(tags)
    # one run per chart, so its name would add nothing
    charts = (draw_charts({"": records}, [tag]) for tag in shown)
    curves = [Picture(_to_png(chart), tag) for chart, tag in zip(charts, shown, strict=True) if chart is not None]
    pictures = [Picture(content, f"{tag}, step {step}") for tag, (step, content) in images.items()]
    usable = [picture for picture in pictures if picture.kind][:MAX_PICTURES]
    if len(usable) < len(pictures):
        logger.warning("%d pictures are left out: more than %d, or neither PNG nor JPEG", len(pictures) - len(usable),
                       MAX_PICTURES)  # fmt: skip
    texts = {name: _read_text(run / name) for name in (RESOLVED_NAME, ENVIRONMENT_NAME) if (run / name).is_file()}
    steps = saved_steps(run)
    saved = f"checkpoints at steps {', '.join(map(str, steps))}" if steps else "no checkpoint yet"
    notes = {"Curves": f"and {len(tags) - len(shown):,} more tags in {METRICS_NAME}" if len(shown) < len(tags) else ""}
    tables = {}
    if (run / ENVIRONMENT_NAME).is_file():
        try:
            tables["Plan and measurement"] = _plan_table(run, records)
        # planning with settings of an untrusted run can raise any exception
        except Exception as error:
            logger.warning("the plan is left out: %s", printable(str(error) or type(error).__name__)[:300])
    if len(evaluated := _evaluation_table(records)) > 1:
        tables["Evaluation while training"] = evaluated
    return _render(f"Run {run.resolve().name}", saved, _summary(records), curves, usable, texts, tables, notes)


def _select_tags(tags: Sequence[str]) -> list[str]:
    """Return the tags to draw: at most ``MAX_CHARTS``, of one group at most ``MAX_CHARTS_OF_GROUP``."""
    counts: Counter[str] = Counter()
    selected = []
    for tag in tags:
        group = tag.partition("/")[0]
        counts[group] += 1
        if counts[group] <= MAX_CHARTS_OF_GROUP:
            selected.append(tag)
    return selected[:MAX_CHARTS]


def _read_text(path: Path) -> str:
    """Return the beginning of a text file, with everything but its lines escaped."""
    try:
        with open(path, "rb") as file:
            content = file.read(_MAX_TEXT_BYTES)
    except OSError as error:
        return f"({error.strerror})"
    return printable_lines(content.decode(errors="backslashreplace"))


@np.errstate(all="ignore")
def _summary(records: Records) -> dict[str, str]:
    last = records[-1]
    numbers = {"steps": f"{last['step']:,}", "images seen": f"{last.get('slot', 0):,}"}

    def rows(*tags: str) -> np.ndarray:
        """Return the values of records that have all ``tags``: float64 [tags, records]."""
        found = [[record.get(tag) for tag in tags] for record in records]
        return np.array([row for row in found if None not in row], np.float64).reshape(-1, len(tags)).T

    (seconds,), (speed,) = rows("speed/step_seconds"), rows("speed/images_per_second")
    if len(seconds):
        numbers["total time of steps"] = _duration(float(min(seconds.sum(), _MAX_SECONDS)))
        middle, slow = np.quantile(seconds, [0.5, 0.99])
        numbers["step, median and 99th percentile"] = f"{middle:.2f} s, {slow:.2f} s"
    if len(speed):
        numbers["images per second, median"] = f"{np.median(speed):.1f}"
    timed, wait = rows("speed/step_seconds", "data/wait_share")
    if timed.sum() > 0:
        numbers["share of time waiting for data"] = f"{wait @ timed / timed.sum():.1%}"
    for tag, name in (("loss/total", "loss, first to last"), ("eval/knn_20", "kNN (k = 20), first to last")):
        (values,) = rows(tag)
        if len(values):
            numbers[name] = f"{values[0]:.3f} → {values[-1]:.3f}"
    for tag, name in (("memory/gpu_bytes", "peak GPU memory"), ("memory/peak_rss_bytes", "peak host memory")):
        (values,) = rows(tag)
        if len(values):
            numbers[name] = f"{values.max() / 2**30:.2f} GiB"
    return numbers


def _plan_table(run: Path, records: Records) -> list[list[str]]:
    """Return planned and measured memory, FLOPs and disk space.

    Raises:
        ValueError: if the run's files do not describe it.
    """
    try:
        environment = read_json(run / ENVIRONMENT_NAME)
    except ValueError as error:
        raise ValueError(f"{ENVIRONMENT_NAME} cannot be read: {error}") from None
    if not isinstance(environment, dict) or type(world_size := environment.get("world_size")) is not int:
        raise ValueError(f"{ENVIRONMENT_NAME} is damaged")
    if not 0 < world_size <= _MAX_RANKS:
        raise ValueError(f"{ENVIRONMENT_NAME} states {world_size} ranks")
    config = read_resolved(run)
    device = str(environment.get("device", "cpu"))
    on_gpu = device != "cpu"
    bf16 = environment.get("dtype") == "bf16"
    planned = plan(config, world_size, on_gpu=on_gpu, bf16=bf16, images=configured_images(config))
    tag = "memory/gpu_bytes" if on_gpu else "memory/peak_rss_bytes"
    peak = max((record[tag] for record in records if record.get(tag) is not None), default=math.nan)
    times = [record["speed/step_seconds"] for record in records if record.get("speed/step_seconds") is not None]
    seconds = float(np.median(times)) if times else math.nan
    rate = step_flops(config, world_size).executed / seconds if seconds else math.nan
    disk_bytes = sum(path.stat().st_size for path in (run / CHECKPOINTS).rglob("*") if path.is_file())
    expected = gigabytes(planned.step_bytes)
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
    tags = dict.fromkeys(tag for record in records for tag in record if tag.startswith("eval/"))
    for tag in list(tags)[:MAX_ROWS]:
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
    notes: Mapping[str, str],
) -> str:
    """Return the page as HTML; the first row of each table holds the column headers."""
    cards = "".join(
        f"<div><b>{_escape(value)}</b><span>{_escape(name)}</span></div>" for name, value in numbers.items()
    )
    parts = [f"<h1>{_escape(title)}</h1>", f'<p class="soft">{_escape(subtitle)}</p>']
    parts.append(f'<div class="numbers">{cards}</div>')
    if charts:
        images = "".join(_image_tag(chart) for chart in charts)
        parts.append(f'<h2>Curves</h2><div class="charts">{images}</div>')
        parts += [f'<p class="soft">{_escape(note)}</p>'] if (note := notes.get("Curves")) else []
    for name, (headers, *rows) in tables.items():
        head = "".join(f"<th>{_escape(cell)}</th>" for cell in headers)
        body = "".join(f"<tr>{''.join(f'<td>{_escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
        parts.append(f"<h2>{_escape(name)}</h2><table><tr>{head}</tr>{body}</table>")
    if pictures:
        figures = (f"<figure>{_image_tag(p)}<figcaption>{_escape(p.caption)}</figcaption></figure>" for p in pictures)
        parts.append(f"<h2>Pictures</h2>{''.join(figures)}")
    if texts:
        parts.append("<h2>Details</h2>")
    for name, text in texts.items():
        parts.append(f"<details><summary>{_escape(name)}</summary><pre>{html.escape(text)}</pre></details>")
    body = "\n".join(parts)
    # the empty icon keeps browsers from requesting one
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _image_tag(picture: Picture) -> str:
    data = base64.b64encode(picture.content).decode()
    return f'<img alt="{_escape(picture.caption)}" src="data:image/{picture.kind};base64,{data}">'


def _escape(text: str) -> str:
    """Return one line of text for HTML."""
    return html.escape(printable(text))


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
