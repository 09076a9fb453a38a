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

from streamtrain.errors import StreamtrainError
from streamtrain.evaluation.report import report_page
from streamtrain.reporting.metrics import read_metrics
from streamtrain.run.directory import METRICS_NAME, TENSORBOARD_NAME


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
    metrics = run / METRICS_NAME
    records = list(read_metrics(metrics)) if metrics.is_file() else []
    if not records:
        return report_page(run, [], {})
    from streamtrain.reporting.tensorboard import latest_images  # TensorBoard takes a second to load

    return report_page(run, records, latest_images(run / TENSORBOARD_NAME))


if __name__ == "__main__":
    sys.exit(main())
