#!/usr/bin/env python3
"""See what a network sees in an image, and how a run went.

python tools/visualize.py similarity --run RUN --image X [X ...] [--patch ROW,COL ...] --out P.png
python tools/visualize.py pca --weights W --image X [X ...] --out P.png
python tools/visualize.py attention --run RUN --image X [X ...] --out P.png
python tools/visualize.py curves --run RUN [RUN ...] --out P.png

similarity: cosine similarity of the patch under the red cross to every other patch, also of further images.
pca: the first three principal components of the patch features, of all images together, as red, green and blue.
attention: what the CLS token attends to in the last block, a map a head, each on its own scale.
curves: losses, evaluations and speed of one or several runs, from their metrics.jsonl.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from backbone_arguments import add_backbone_arguments, load_backbone
from PIL import Image

from streamtrain.errors import StreamtrainError
from streamtrain.evaluation.canvas import Tile, colour_bar, compose, enlarge, mark, viridis
from streamtrain.evaluation.chart import charts_of
from streamtrain.evaluation.maps import (
    cls_attention,
    fit_to_patches,
    patch_features,
    principal_components,
    read_image,
    similarity_maps,
)
from streamtrain.export.folder import BackboneConfig
from streamtrain.monitor.metrics import read_metrics
from streamtrain.monitor.monitor import METRICS_NAME

CURVES = (
    "loss/total", "loss/global", "loss/patch", "loss/koleo", "eval/knn_20", "eval/linear", "features/rank",
    "teacher/entropy", "optim/gradient_norm", "speed/images_per_second",
)  # fmt: skip
SHOWN_SIDE = 400  # shorter side in pixels of an image on the page


def main() -> int:
    arguments = parse_arguments()
    try:
        page = draw_curves(arguments) if arguments.kind == "curves" else draw_maps(arguments)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        page.save(arguments.out)
    except (StreamtrainError, OSError) as error:
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
        of_kind.add_argument("--size", type=int, help="shorter side of the input (default: twice the training's)")
        of_kind.add_argument("--smooth", action="store_true", help="interpolate the maps between patches")
        of_kind.add_argument("--device", default="auto", help="auto, cpu or cuda")
    kinds.choices["similarity"].add_argument(
        "--patch", type=patch, nargs="+", metavar="ROW,COL",
        help="patches of the first image, a row of the page each (default: the middle one)",
    )  # fmt: skip
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
    row, column = text.split(",")
    return int(row), int(column)


def draw_curves(arguments: argparse.Namespace) -> Image.Image:
    """A page of charts, two in a row."""
    runs = {}
    for run in arguments.run:
        path = run / METRICS_NAME
        if not path.is_file():
            raise StreamtrainError(f"{run} is not a run folder with results: it has no {METRICS_NAME}")
        runs[str(run)] = list(read_metrics(path))
    charts = [Tile(chart) for chart in charts_of(runs, arguments.tags)]
    if not charts:
        raise StreamtrainError(f"none of the runs has logged any of {', '.join(arguments.tags)}")
    steps = max((record["step"] for records in runs.values() for record in records), default=0)
    rows = [charts[index : index + 2] for index in range(0, len(charts), 2)]
    return compose("Curves", f"{', '.join(run.name for run in arguments.run)} · {steps} steps", rows)


def draw_maps(arguments: argparse.Namespace) -> Image.Image:
    """The page of a network's maps."""
    originals = [read_image(path) for path in arguments.image]
    backbone = load_backbone(arguments)
    config = backbone.config
    size = arguments.size or 2 * config.image_size
    if size < config.model.patch_size:
        raise StreamtrainError(f"--size {size} is less than one patch of {config.model.patch_size} pixels")
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model = backbone.model.to(device)
    inputs = [fit_to_patches(image, size, config.model.patch_size) for image in originals]
    # From the originals, which have all their detail where the page is larger than the network's input.
    shown = [
        original.resize(shown_size(image), Image.Resampling.LANCZOS)
        for original, image in zip(originals, inputs, strict=True)
    ]
    patch_size = config.model.patch_size
    grids = [(image.height // patch_size, image.width // patch_size) for image in inputs]
    subtitle = describe(arguments, config, grids)
    if arguments.kind == "attention":
        maps = [cls_attention(model, image, config.mean, config.std) for image in inputs]
        return compose("Attention of the CLS token in the last block", subtitle, attention_rows(arguments, shown, maps))
    features = [patch_features(model, image, config.mean, config.std) for image in inputs]
    if arguments.kind == "pca":
        rows = pca_rows(arguments, shown, principal_components(features))
        return compose("First three principal components of the patch features", subtitle, rows)
    patches = arguments.patch or [(features[0].shape[0] // 2, features[0].shape[1] // 2)]
    rows = [row for one in patches for row in similarity_rows(arguments, shown, similarity_maps(features, one), one)]
    return compose("Cosine similarity to the marked patch", subtitle, rows)


def pca_rows(arguments: argparse.Namespace, shown: list[Image.Image], components: list[np.ndarray]) -> list[list[Tile]]:
    """Images above their components, or beside them where there is one."""
    maps = [
        Tile(enlarge(np.rint(values * 255).astype(np.uint8), image.size, arguments.smooth))
        for image, values in zip(shown, components, strict=True)
    ]
    images = [Tile(image, path.name) for image, path in zip(shown, arguments.image, strict=True)]
    return [[images[0], maps[0]]] if len(images) == 1 else [images, maps]


def attention_rows(arguments: argparse.Namespace, shown: list[Image.Image], maps: list[np.ndarray]) -> list[list[Tile]]:
    """A row an image: the image, the mean over heads, and at most six heads, all small."""
    rows = []
    for image, heads, path in zip(shown, maps, arguments.image, strict=True):
        small = image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)
        tiles = [Tile(small, path.name)]
        for name, values in (("mean", heads.mean(0)), *((f"head {i}", head) for i, head in enumerate(heads[:6]))):
            high = float(values.max())
            share = f"{name}: {values.sum():.0%} on patches"
            tiles.append(Tile(enlarge(viridis(values / max(high, 1e-12)), small.size, arguments.smooth), share))
        rows.append(tiles)
    return rows


def similarity_rows(
    arguments: argparse.Namespace, shown: list[Image.Image], maps: list[np.ndarray], chosen: tuple[int, int]
) -> list[list[Tile]]:
    """One row: the marked image, its map, and each further image with its map; below, the scale."""
    # The patch itself is always 1; the scale spans what the others have.
    low, high = min(float(values.min()) for values in maps), 1.0
    scaled = [(values - low) / max(high - low, 1e-6) for values in maps]
    tiles = []
    for index, (image, values, path) in enumerate(zip(shown, scaled, arguments.image, strict=True)):
        coloured = enlarge(viridis(values), image.size, arguments.smooth)
        if index == 0:
            grid = (values.shape[0], values.shape[1])
            caption = f"{path.name}, patch {chosen[0]},{chosen[1]}"
            tiles += [Tile(mark(image, chosen, grid), caption), Tile(mark(coloured, chosen, grid))]
        else:
            tiles += [Tile(image, path.name), Tile(coloured)]
    bar = colour_bar(low, high, tiles[1].image.width, "cosine similarity")
    indent = Image.new("RGB", (tiles[0].image.width, 1), "white")
    return [tiles, [Tile(indent), Tile(bar)]]


def shown_size(image: Image.Image) -> tuple[int, int]:
    scale = SHOWN_SIDE / min(image.size)
    return round(image.width * scale), round(image.height * scale)


def describe(arguments: argparse.Namespace, config: BackboneConfig, grids: list[tuple[int, int]]) -> str:
    """What network looked, and how finely."""
    if arguments.untrained:
        network = "untrained network"
    elif isinstance(config.origin.get("step"), int):
        network = f"{config.origin.get('source')}, step {config.origin['step']}"
    else:
        network = (arguments.weights or arguments.run).name
    grid = f"{grids[0][0]} x {grids[0][1]} patches of {config.model.patch_size} px"
    return f"{network} · {grid}"


if __name__ == "__main__":
    sys.exit(main())
