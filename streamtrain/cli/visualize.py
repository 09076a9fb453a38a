"""``streamtrain visualize``: draw the features of images, the training crops, and the curves of runs."""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import Any

from PIL import Image

from shards.format.files import write_whole
from streamtrain.cli.arguments import positive_int, writing
from streamtrain.cli.backbone import add_backbone_arguments, add_device_argument
from streamtrain.errors import StreamtrainError
from streamtrain.evaluation.figures import draw_charts
from streamtrain.reporting.metrics import read_metrics
from streamtrain.run.command_line import local_path
from streamtrain.run.directory import METRICS_NAME

CURVES = (
    "loss/total", "loss/global", "loss/patch", "loss/koleo", "eval/knn_20", "eval/linear", "features/rank",
    "teacher/entropy", "optim/gradient_norm", "speed/images_per_second",
)  # fmt: skip

_SUMMARIES = {
    "similarity": "Cosine similarity of a patch to all patches of one or more images. In P.html, click on a patch.",
    "matches": "The most similar mutual nearest patches of two images, joined by lines. In P.html, click on a patch.",
    "pca": "The first three principal components of the patch features of all images, as red, green and blue.",
    "attention": "Attention of the CLS token in the last block: one map per head, each with its own scale.",
    "crops": "Training crops and masks of an image, to check before a long run.",
    "curves": "Losses, evaluations and speed of one or several runs, from their metrics.jsonl.",
}
_EXAMPLES = """\
examples:
  streamtrain visualize similarity --run runs/photos --image cat.jpg dog.jpg --patch 7,7 --out similarity.png
  streamtrain visualize similarity --run runs/photos --image cat.jpg dog.jpg --out similarity.html
  streamtrain visualize matches --run runs/photos --image cat.jpg dog.jpg --count 30 --out matches.png
  streamtrain visualize pca --weights exported --image cat.jpg --out pca.png
  streamtrain visualize attention --run runs/photos --image cat.jpg --out attention.png
  streamtrain visualize crops --config vits16.yaml --image cat.jpg --out crops.png crops.local_count=4
  streamtrain visualize curves --run runs/photos runs/other --out curves.png
"""


def add_parser(subparsers: Any) -> None:
    kinds = "\n".join(f"  {kind:<11} {summary}" for kind, summary in _SUMMARIES.items())
    parser = subparsers.add_parser(
        "visualize",
        help="draw the features of images, the training crops, and the curves of runs",
        description=f"Draw the features of images, the training crops, and the curves of runs.\n\n{kinds}",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    pictures = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    of_kind = {kind: pictures.add_parser(kind, description=summary) for kind, summary in _SUMMARIES.items()}
    for kind in ("similarity", "matches", "pca", "attention"):
        add = of_kind[kind].add_argument
        add_backbone_arguments(of_kind[kind])
        if kind == "matches":
            add("--image", type=local_path, nargs=2, required=True, metavar=("A", "B"), help="two image files")
            add("--count", type=positive_int, default=40, metavar="N", help="maximum number of matches (default: 40)")
        else:
            add("--image", type=local_path, nargs="+", required=True, metavar="X", help="image files")
        add(
            "--size",
            type=positive_int,
            help="shorter side of the input in pixels (default: at least twice the training size)",
        )
        if kind != "matches":
            add("--smooth", action="store_true", help="interpolate the maps between patches")
        add_device_argument(of_kind[kind])
    of_kind["similarity"].add_argument(
        "--patch", type=parse_patch, nargs="+", metavar="ROW,COL",
        help="patches of the first image to compare; each gets a row of maps, or all share a grid if there is one "
        "image (default: the middle patch)",
    )  # fmt: skip
    of_kind["matches"].add_argument("--foreground", action="store_true", help="match patches of the foreground only")
    of_kind["pca"].add_argument("--foreground", action="store_true", help="leave the background black")
    add = of_kind["crops"].add_argument
    add("--run", type=local_path, help="run directory whose recipe is used")
    add("--config", help="a recipe, as for training")
    add("--image", type=local_path, nargs="+", required=True, metavar="X", help="image files")
    add("--draws", type=positive_int, default=4, help="random draws per image (default: 4)")
    add("overrides", nargs="*", metavar="a.b=value", help="settings, as for training")
    add = of_kind["curves"].add_argument
    add("--run", type=local_path, nargs="+", required=True, help="run directories; one line in the plots for each")
    add("--tags", nargs="+", default=CURVES, help=f"tags to draw (default: {' '.join(CURVES)})")
    for kind, kind_parser in of_kind.items():
        has_html = kind in ("similarity", "matches")
        parse = parse_page_path if has_html else parse_image_path
        shown = "picture, or P.html for a page in a browser" if has_html else "file to write"
        kind_parser.add_argument("--out", type=parse, required=True, metavar="P.png", help=shown)


def run(arguments: argparse.Namespace) -> int:
    page: Image.Image | bytes
    if arguments.kind == "curves":
        page = draw_curves(arguments)
    elif arguments.kind == "crops":
        # torch and DALI take seconds to load
        from streamtrain.cli.crop_pages import draw_crops

        page = draw_crops(arguments)
    else:
        # torch takes seconds to load
        from streamtrain.cli.map_pages import draw_maps

        page = draw_maps(arguments)
    with writing(arguments.out):
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(arguments.out, page if isinstance(page, bytes) else encode_page(page, arguments.out))
    size = f"{len(page) / 1e6:.1f} MB" if isinstance(page, bytes) else f"{page.width} x {page.height}"
    print(f"wrote {arguments.out} ({size})")
    return 0


def encode_page(page: Image.Image, out: Path) -> bytes:
    """Return a page in the format of the suffix of ``out``; raises StreamtrainError if that cannot hold it."""
    buffer = io.BytesIO()
    try:
        page.save(buffer, Image.registered_extensions()[out.suffix.lower()])
    except (ValueError, KeyError, OSError) as error:
        size = f"{page.width} x {page.height} pixels"
        raise StreamtrainError(f"{out}: this format cannot hold the page of {size} ({error}); use .png") from None
    return buffer.getvalue()


def parse_image_path(text: str) -> Path:
    path = local_path(text)
    # Pillow reads more formats than it writes
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise argparse.ArgumentTypeError(f"{text} has no image suffix, such as .png")
    return path


def is_html(path: Path) -> bool:
    return path.suffix.lower() in (".html", ".htm")


def parse_page_path(text: str) -> Path:
    path = local_path(text)
    return path if is_html(path) else parse_image_path(text)


def parse_patch(text: str) -> tuple[int, int]:
    row, separator, column = text.partition(",")
    if not (separator and row.isdecimal() and column.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a patch as ROW,COL, such as 7,7; both count from 0")
    return int(row), int(column)


def draw_curves(arguments: argparse.Namespace) -> Image.Image:
    runs = {}
    # a run given twice is one run
    folders = {run_dir.resolve(): run_dir for run_dir in arguments.run}
    is_ambiguous = len({folder.name for folder in folders}) < len(folders)
    for folder, run_dir in folders.items():
        path = run_dir / METRICS_NAME
        if not path.is_file():
            raise StreamtrainError(f"{run_dir} is not a run directory with results: {METRICS_NAME} is missing")
        runs[str(run_dir) if is_ambiguous else folder.name] = list(read_metrics(path))
    steps = max((record["step"] for records in runs.values() for record in records), default=0)
    subtitle = f"{next(iter(runs)) if len(runs) == 1 else f'{len(runs)} runs'} · {steps:,} steps"
    page = draw_charts(runs, arguments.tags, "Curves", subtitle)
    if page is None:
        raise StreamtrainError(f"none of the runs has logged any of {', '.join(arguments.tags)}"[:500])
    return page
