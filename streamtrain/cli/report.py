"""``streamtrain report``: write the HTML page of a run."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from streamtrain.cli.arguments import add_command, writing
from streamtrain.config.load import RESOLVED_NAME, read_resolved
from streamtrain.errors import StreamtrainError
from streamtrain.evaluation.chart import charts_of
from streamtrain.evaluation.report import Picture, numbers_of, png_of, render
from streamtrain.planning.flops import step_flops
from streamtrain.planning.memory import plan
from streamtrain.planning.plan_text import gigabytes, of_rank
from streamtrain.reporting.metrics import read_metrics
from streamtrain.run.directory import CHECKPOINTS, METRICS_NAME, TENSORBOARD_NAME, saved_steps
from streamtrain.run.provenance import ENVIRONMENT_NAME

_SUMMARY = "Write a page about a run: curves, pictures, numbers and configuration."
_DETAILS = "The page is one HTML file that needs no network."
_EXAMPLES = """\
  streamtrain report --run runs/photos
  streamtrain report --run runs/photos --out report.html
"""


def add_parser(subparsers: Any) -> None:
    """Add the command and its options."""
    parser = add_command(subparsers, "report", _SUMMARY, _DETAILS, _EXAMPLES)
    parser.add_argument("--run", type=Path, required=True, help="run directory")
    parser.add_argument("--out", type=Path, help="file to write (default: RUN/report.html)")


def run(arguments: argparse.Namespace) -> int:
    """Write the page and print its path."""
    out: Path = arguments.out or arguments.run / "report.html"
    page = render_run(arguments.run)
    with writing(out):
        out.write_text(page, encoding="utf-8")
    print(f"wrote {out} ({len(page.encode()) / 2**20:.1f} MiB)")
    return 0


def render_run(run_dir: Path) -> str:
    """Return the HTML page of a run directory.

    Raises:
        StreamtrainError: if ``run_dir`` is not a run directory, or has no completed step.
    """
    if not (run_dir / RESOLVED_NAME).is_file():
        raise StreamtrainError(f"{run_dir} is not a run directory: {RESOLVED_NAME} is missing")
    metrics = run_dir / METRICS_NAME
    records = list(read_metrics(metrics)) if metrics.is_file() else []
    if not records:
        raise StreamtrainError(f"{run_dir} has nothing to report yet: {METRICS_NAME} has no completed step")
    from streamtrain.reporting.events import latest_images  # TensorBoard takes a second to load

    tags = sorted({tag for record in records for tag in record} - {"step", "slot"}, key=tag_order)
    # every chart shows this run alone, so the legend needs no name
    charts = [Picture(png_of(chart), "") for chart in charts_of({"": records}, tags)]
    pictures = [
        Picture(png, f"{tag}, step {step}") for tag, (step, png) in latest_images(run_dir / TENSORBOARD_NAME).items()
    ]
    names = (RESOLVED_NAME, ENVIRONMENT_NAME)
    texts = {name: (run_dir / name).read_text() for name in names if (run_dir / name).is_file()}
    steps = saved_steps(run_dir)
    saved = f"checkpoints of steps {', '.join(map(str, steps))}" if steps else "no checkpoint yet"
    tables = {}
    if (run_dir / ENVIRONMENT_NAME).is_file():
        tables["Plan and measurement"] = plan_table(run_dir, records)
    if evaluations := evaluation_table(records):
        tables["Evaluation while training"] = evaluations
    return render(f"Run {run_dir.resolve().name}", saved, numbers_of(records), charts, pictures, texts, tables)


def plan_table(run_dir: Path, records: list[dict[str, Any]]) -> list[list[str]]:
    """Return the planned values of a rank beside the measured ones."""
    environment = json.loads((run_dir / ENVIRONMENT_NAME).read_text())
    config, world_size = read_resolved(run_dir), int(environment["world_size"])
    on_gpu = environment.get("device", "cpu") != "cpu"
    planned = plan(config, world_size, on_gpu=on_gpu, bf16=environment.get("dtype") == "bf16")
    tag = "memory/gpu_bytes" if on_gpu else "memory/peak_rss_bytes"
    peak = max((record[tag] for record in records if record.get(tag) is not None), default=math.nan)
    seconds = float(np.median([record.get("speed/step_seconds", math.nan) for record in records]))
    rate = step_flops(config, world_size).executed / seconds
    return [
        ["", "planned", "measured"],
        [f"peak memory of a rank, {environment.get('device', 'cpu')}", _gb(of_rank(planned, on_gpu)), _gb(peak)],
        ["parameters", f"{planned.num_parameters / 1e6:,.1f} M", ""],
        ["FLOPs of a step, all ranks", f"{planned.flops_per_step / 1e12:,.3g} TFLOP", f"{rate / 1e12:,.3g} TFLOP/s"],
        ["step (median)", "", f"{seconds:.3g} s"],
        ["disk of all checkpoints", _gb(planned.disk_bytes), _gb(disk_bytes(run_dir / CHECKPOINTS))],
    ]


def evaluation_table(records: list[dict[str, Any]]) -> list[list[str]]:
    """Return each score at the first evaluation, at its maximum and at the last; empty if there are none."""
    tags = [tag for record in records for tag in record if tag.startswith("eval/")]
    rows = [["", "first", "highest", "last"]]
    for tag in dict.fromkeys(tags):
        if tag in ("eval/seconds", "eval/time_share"):
            continue
        values = [(record[tag], record["step"]) for record in records if record.get(tag) is not None]
        if values:
            shown = (values[0], max(values), values[-1])
            rows.append([tag.removeprefix("eval/"), *(f"{value:.1%} (step {step})" for value, step in shown)])
    return rows if len(rows) > 1 else []


def disk_bytes(folder: Path) -> int:
    """Return the size of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def tag_order(tag: str) -> tuple[int, str]:
    """Return the sort key of a tag: losses and evaluations first, the machine last."""
    groups = ("loss", "eval", "features", "teacher", "optim", "speed", "data", "memory")
    group = tag.partition("/")[0]
    return (groups.index(group) if group in groups else len(groups), tag)


def _gb(num_bytes: float) -> str:
    return f"{gigabytes(num_bytes)} GB"
