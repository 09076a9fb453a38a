#!/usr/bin/env python3
"""A page for a run: curves, pictures, numbers, configuration; one HTML file that opens without a network.

python tools/report.py --run RUN [--out report.html]
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from outputs import writing

from streamtrain.config.load import RESOLVED_NAME, read_resolved
from streamtrain.errors import StreamtrainError
from streamtrain.evaluation.chart import charts_of
from streamtrain.evaluation.report import Picture, numbers_of, png_of, render
from streamtrain.planning.flops import step_flops
from streamtrain.planning.memory import plan
from streamtrain.planning.plan_text import gigabytes, rank_peak_bytes
from streamtrain.reporting.metrics import read_metrics
from streamtrain.run.directory import CHECKPOINTS, METRICS_NAME, TENSORBOARD_NAME, saved_steps
from streamtrain.run.provenance import ENVIRONMENT_NAME


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="run folder")
    parser.add_argument("--out", type=Path, help="file to write (default: RUN/report.html)")
    arguments = parser.parse_args()
    out: Path = arguments.out or arguments.run / "report.html"
    try:
        page = page_of(arguments.run)
        with writing(out):
            out.write_text(page, encoding="utf-8")
    except StreamtrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {out} ({len(page.encode()) / 2**20:.1f} MiB)")
    return 0


def page_of(run: Path) -> str:
    """The page of the run folder ``run``."""
    if not (run / RESOLVED_NAME).is_file():
        raise StreamtrainError(f"{run} is not a run directory: it has no {RESOLVED_NAME}")
    metrics = run / METRICS_NAME
    records = list(read_metrics(metrics)) if metrics.is_file() else []
    if not records:
        raise StreamtrainError(f"{run} has nothing to report yet: no step stands in its {METRICS_NAME}")
    from streamtrain.reporting.tensorboard import latest_images  # TensorBoard takes a second to load

    tags = sorted({tag for record in records for tag in record} - {"step", "slot"}, key=order)
    # A run is on every chart alone, so a name for it would say nothing.
    charts = [Picture(png_of(chart), "") for chart in charts_of({"": records}, tags)]
    pictures = [
        Picture(png, f"{tag}, step {step}") for tag, (step, png) in latest_images(run / TENSORBOARD_NAME).items()
    ]
    texts = {name: (run / name).read_text() for name in (RESOLVED_NAME, ENVIRONMENT_NAME) if (run / name).is_file()}
    steps = saved_steps(run)
    saved = f"checkpoints of steps {', '.join(map(str, steps))}" if steps else "no checkpoint yet"
    tables = {}
    if (run / ENVIRONMENT_NAME).is_file():
        tables["Plan and measurement"] = planned_and_measured(run, records)
    if evaluated := evaluations(records):
        tables["Evaluation while training"] = evaluated
    return render(f"Run {run.resolve().name}", saved, numbers_of(records), charts, pictures, texts, tables)


def planned_and_measured(run: Path, records: list[dict[str, Any]]) -> list[list[str]]:
    """What the plan said of a rank, beside what the run has taken."""
    environment = json.loads((run / ENVIRONMENT_NAME).read_text())
    config, world_size = read_resolved(run), int(environment["world_size"])
    on_gpu = environment.get("device", "cpu") != "cpu"
    found = plan(config, world_size, on_gpu=on_gpu, bf16=environment.get("dtype") == "bf16")
    tag = "memory/gpu_bytes" if on_gpu else "memory/peak_rss_bytes"
    peak = max((record[tag] for record in records if record.get(tag) is not None), default=math.nan)
    seconds = float(np.median([record.get("speed/step_seconds", math.nan) for record in records]))
    rate = step_flops(config, world_size).executed / seconds
    return [
        ["", "planned", "measured"],
        [f"peak memory of a rank, {environment.get('device', 'cpu')}", _gb(rank_peak_bytes(found, on_gpu)), _gb(peak)],
        ["parameters", f"{found.num_parameters / 1e6:,.1f} M", ""],
        ["arithmetic of a step, all ranks", f"{found.flops_per_step / 1e12:,.3g} TFLOP", f"{rate / 1e12:,.3g} TFLOP/s"],
        ["step (median)", "", f"{seconds:.3g} s"],
        ["disk of all checkpoints", _gb(found.disk_bytes), _gb(disk_bytes(run / CHECKPOINTS))],
    ]


def evaluations(records: list[dict[str, Any]]) -> list[list[str]]:
    """Each figure at the first evaluation, at its highest and at the last; empty where there were none."""
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
    """Of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _gb(num_bytes: float) -> str:
    return f"{gigabytes(num_bytes)} GB"


def order(tag: str) -> tuple[int, str]:
    """Losses and evaluations first, the machine last."""
    groups = ("loss", "eval", "features", "teacher", "optim", "speed", "data", "memory")
    group = tag.partition("/")[0]
    return (groups.index(group) if group in groups else len(groups), tag)


if __name__ == "__main__":
    sys.exit(main())
