#!/usr/bin/env python3
"""See what a network sees in an image.

python tools/visualize.py similarity --run RUN --image X [X ...] [--patch ROW,COL ...] --out P.png
python tools/visualize.py pca --weights W --image X [X ...] --out P.png

similarity: cosine similarity of the patch under the red cross to every other patch, also of further images.
pca: the first three principal components of the patch features, of all images together, as red, green and blue.
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
from streamtrain.evaluation.maps import (
    fit_to_patches,
    patch_features,
    principal_components,
    read_image,
    similarity_maps,
)
from streamtrain.export.folder import BackboneConfig

SHOWN_SIDE = 400  # shorter side in pixels of an image on the page


def main() -> int:
    arguments = parse_arguments()
    try:
        page = draw(arguments)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        page.save(arguments.out)
    except (StreamtrainError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {arguments.out} ({page.width} x {page.height})")
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("similarity", "pca"))
    add_backbone_arguments(parser)
    parser.add_argument("--image", type=Path, nargs="+", required=True, metavar="X")
    parser.add_argument("--out", type=Path, required=True, metavar="P.png")
    parser.add_argument(
        "--patch", type=patch, nargs="+", metavar="ROW,COL",
        help="similarity: patches of the first image, a row of the page each (default: the middle one)",
    )  # fmt: skip
    parser.add_argument("--size", type=int, help="shorter side of the input in pixels (default: twice the training's)")
    parser.add_argument("--smooth", action="store_true", help="interpolate the maps between patches")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    arguments = parser.parse_args()
    if arguments.out.suffix.lower() not in Image.registered_extensions():
        parser.error(f"--out {arguments.out} has no suffix of an image, such as .png")
    return arguments


def patch(text: str) -> tuple[int, int]:
    row, column = text.split(",")
    return int(row), int(column)


def draw(arguments: argparse.Namespace) -> Image.Image:
    """The page that the arguments ask for."""
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
    features = [patch_features(model, image, config.mean, config.std) for image in inputs]
    # From the originals, which have all their detail where the page is larger than the network's input.
    shown = [
        original.resize(shown_size(image), Image.Resampling.LANCZOS)
        for original, image in zip(originals, inputs, strict=True)
    ]
    subtitle = describe(arguments, config, [tuple(feature.shape[:2]) for feature in features])
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
