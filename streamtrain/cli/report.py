"""``streamtrain report``: write the HTML page of a run."""

from __future__ import annotations

import argparse
import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

from shards.errors import printable
from shards.format.files import write_whole
from streamtrain.cli.arguments import add_command, writing
from streamtrain.errors import StreamtrainError
from streamtrain.evaluation.report import report_page
from streamtrain.reporting.metrics import read_metrics
from streamtrain.run.command_line import local_path
from streamtrain.run.directory import METRICS_NAME, TENSORBOARD_NAME

logger = logging.getLogger(__name__)

# of a file that is looked at to find out whether it is a page
_START_BYTES = 1000

_SUMMARY = "Write a page about a run: curves, pictures, numbers and configuration."
_DETAILS = "The page is one HTML file that needs no network."
_EXAMPLES = """\
  streamtrain report --run runs/photos
  streamtrain report --run runs/photos --out report.html
"""


def add_parser(subparsers: Any) -> None:
    parser = add_command(subparsers, "report", _SUMMARY, _DETAILS, _EXAMPLES)
    parser.add_argument("--run", type=local_path, required=True, help="run directory")
    parser.add_argument("--out", type=local_path, help="file to write (default: RUN/report.html)")


def run(arguments: argparse.Namespace) -> int:
    out: Path = arguments.out or arguments.run / "report.html"
    check_output(out)
    page = render_run(arguments.run).encode(errors="backslashreplace")
    with writing(out):
        # a link of that name in the run directory is replaced, not followed
        write_whole(out, page)
    print(f"wrote {printable(out)} ({len(page) / 2**20:.1f} MiB)")
    return 0


def check_output(out: Path) -> None:
    """Raise StreamtrainError if the page would replace a file that is not an HTML page; a link is only replaced."""
    with suppress(OSError):
        if out.is_symlink() or not out.is_file():
            return
        with open(out, "rb") as file:
            start = file.read(_START_BYTES).lstrip().lower()
        if start and not start.startswith((b"<!doctype html", b"<html")):
            raise StreamtrainError(f"{out} exists and is not an HTML page; choose another --out, or delete it")


def render_run(run_dir: Path) -> str:
    """Return the HTML page of a run directory; errors as in ``report_page``."""
    metrics = run_dir / METRICS_NAME
    records = list(read_metrics(metrics)) if metrics.is_file() else []
    if not records:
        return report_page(run_dir, [], {})
    # TensorBoard takes a second to load
    from streamtrain.reporting.tensorboard import Logged, read_logged

    folder, logged = run_dir / TENSORBOARD_NAME, Logged()
    is_readable = folder.is_dir()
    try:
        logged = read_logged(folder)
    # a damaged event file makes TensorBoard raise almost anything
    except Exception as error:
        is_readable = False
        logger.warning("%s cannot be read (%s); its pictures are left out", TENSORBOARD_NAME, type(error).__name__)
    warnings = logged.warnings if is_readable else None
    return report_page(run_dir, records, logged.images, warnings, (logged.began, logged.ended))
