#!/usr/bin/env python3
"""See what a network sees in an image, and how a run went.

python tools/visualize.py similarity --run RUN --image X [X ...] [--patch ROW,COL ...] --out P.png
python tools/visualize.py pca --weights W --image X [X ...] --out P.png
python tools/visualize.py attention --run RUN --image X [X ...] --out P.png
python tools/visualize.py crops --config C --image X [X ...] --out P.png [a.b=value ...]
python tools/visualize.py curves --run RUN [RUN ...] --out P.png

similarity: cosine similarity of the patch under the red cross to every other patch, also of further images.
pca: the first three principal components of the patch features, of all images together, as red, green and blue;
     with --foreground, of those patches alone that the first component tells from the ground.
attention: what the CLS token attends to in the last block, a map a head, each on its own scale.
crops: what augmentation and masks make of an image: look at it before a long run.
curves: losses, evaluations and speed of one or several runs, from their metrics.jsonl.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from backbone_arguments import add_backbone_arguments
from outputs import writing
from PIL import Image

from shards.errors import ShardError
from streamtrain.errors import StreamtrainError
from streamtrain.evaluation.canvas import Tile, compose
from streamtrain.evaluation.chart import charts_of
from streamtrain.reporting.metrics import read_metrics
from streamtrain.run.directory import METRICS_NAME

CURVES = (
    "loss/total", "loss/global", "loss/patch", "loss/koleo", "eval/knn_20", "eval/linear", "features/rank",
    "teacher/entropy", "optim/gradient_norm", "speed/images_per_second",
)  # fmt: skip


def main() -> int:
    arguments = parse_arguments()
    try:
        if arguments.kind == "curves":
            page = draw_curves(arguments)
        elif arguments.kind == "crops":
            from crop_pages import draw_crops  # torch and DALI take seconds to load

            page = draw_crops(arguments)
        else:
            from map_pages import draw_maps  # torch takes seconds to load

            page = draw_maps(arguments)
        with writing(arguments.out):
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            page.save(arguments.out)
    except (StreamtrainError, ShardError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {arguments.out} ({page.width} x {page.height})")
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    for kind in ("similarity", "pca", "attention"):
        of_kind = kinds.add_parser(kind)
        add_backbone_arguments(of_kind)
        of_kind.add_argument("--image", type=Path, nargs="+", required=True, metavar="X")
        of_kind.add_argument("--size", type=int, help="shorter side of the input (default: as large as is legible)")
        of_kind.add_argument("--smooth", action="store_true", help="interpolate the maps between patches")
        of_kind.add_argument("--device", default="auto", help="auto, cpu or cuda")
    kinds.choices["similarity"].add_argument(
        "--patch", type=patch, nargs="+", metavar="ROW,COL",
        help="patches of the first image: a row each, or a grid where there is one image (default: the middle one)",
    )  # fmt: skip
    kinds.choices["pca"].add_argument("--foreground", action="store_true", help="leave the ground black")
    crops = kinds.add_parser("crops")
    crops.add_argument("--run", type=Path, help="run folder, whose recipe it is")
    crops.add_argument("--config", help="a recipe, as for training")
    crops.add_argument("--image", type=Path, nargs="+", required=True, metavar="X")
    crops.add_argument("--draws", type=int, default=4, help="how often each image is drawn (default 4)")
    crops.add_argument("overrides", nargs="*", metavar="a.b=value", help="with --config: settings, as for training")
    curves = kinds.add_parser("curves")
    curves.add_argument("--run", type=Path, nargs="+", required=True, help="run folders, one line each")
    curves.add_argument("--tags", nargs="+", default=CURVES, help=f"what to draw (default: {' '.join(CURVES)})")
    for of_kind in kinds.choices.values():
        of_kind.add_argument("--out", type=Path, required=True, metavar="P.png")
    arguments = parser.parse_args()
    if arguments.out.suffix.lower() not in Image.registered_extensions():
        parser.error(f"--out {arguments.out} has no suffix of an image, such as .png")
    return arguments


def patch(text: str) -> tuple[int, int]:
    """``ROW,COL``."""
    row, separator, column = text.partition(",")
    if not (separator and row.isdecimal() and column.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a patch as ROW,COL, such as 7,7; both count from 0")
    return int(row), int(column)


def draw_curves(arguments: argparse.Namespace) -> Image.Image:
    """A page of charts, two in a row."""
    runs = {}
    for run in arguments.run:
        path = run / METRICS_NAME
        if not path.is_file():
            raise StreamtrainError(f"{run} is not a run directory with results: it has no {METRICS_NAME}")
        runs[str(run)] = list(read_metrics(path))
    charts = [Tile(chart) for chart in charts_of(runs, arguments.tags)]
    if not charts:
        raise StreamtrainError(f"none of the runs has logged any of {', '.join(arguments.tags)}")
    steps = max((record["step"] for records in runs.values() for record in records), default=0)
    rows = [charts[index : index + 2] for index in range(0, len(charts), 2)]
    return compose("Curves", f"{', '.join(run.name for run in arguments.run)} · {steps} steps", rows)


if __name__ == "__main__":
    sys.exit(main())
