#!/usr/bin/env python3
"""A page for a run: curves, pictures, numbers, configuration; one HTML file that opens without a network.

python tools/report.py --run RUN [--out report.html]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from outputs import writing

from streamtrain.config.load import RESOLVED_NAME
from streamtrain.errors import StreamtrainError
from streamtrain.evaluation.chart import charts_of
from streamtrain.evaluation.report import Picture, numbers_of, png_of, render
from streamtrain.monitor.metrics import read_metrics
from streamtrain.run_folder import ENVIRONMENT_NAME, METRICS_NAME, TENSORBOARD_NAME, saved_steps


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
        raise StreamtrainError(f"{run} is not a run folder: it has no {RESOLVED_NAME}")
    metrics = run / METRICS_NAME
    records = list(read_metrics(metrics)) if metrics.is_file() else []
    if not records:
        raise StreamtrainError(f"{run} has nothing to report yet: no step stands in its {METRICS_NAME}")
    from streamtrain.monitor.events import latest_images  # TensorBoard takes a second to load

    tags = sorted({tag for record in records for tag in record} - {"step", "slot"}, key=order)
    # A run is on every chart alone, so a name for it would say nothing.
    charts = [Picture(png_of(chart), "") for chart in charts_of({"": records}, tags)]
    pictures = [
        Picture(png, f"{tag}, step {step}") for tag, (step, png) in latest_images(run / TENSORBOARD_NAME).items()
    ]
    texts = {name: (run / name).read_text() for name in (RESOLVED_NAME, ENVIRONMENT_NAME) if (run / name).is_file()}
    steps = saved_steps(run)
    saved = f"checkpoints of steps {', '.join(map(str, steps))}" if steps else "no checkpoint yet"
    return render(f"Run {run.resolve().name}", saved, numbers_of(records), charts, pictures, texts)


def order(tag: str) -> tuple[int, str]:
    """Losses and evaluations first, the machine last."""
    groups = ("loss", "eval", "features", "teacher", "optim", "speed", "data", "memory")
    group = tag.partition("/")[0]
    return (groups.index(group) if group in groups else len(groups), tag)


if __name__ == "__main__":
    sys.exit(main())
