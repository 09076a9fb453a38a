"""The pages of ``streamtrain visualize`` that need a network: similarity, principal components, attention."""

from __future__ import annotations

import argparse
import math

import numpy as np
import torch
from PIL import Image

from streamtrain.cli.backbone import load_selected_backbone
from streamtrain.errors import StreamtrainError
from streamtrain.evaluation.canvas import Tile, colour_bar, compose, enlarge, mark, viridis
from streamtrain.evaluation.maps import (
    cls_attention,
    fit_to_patches,
    foreground_components,
    map_size,
    patch_features,
    principal_components,
    read_image,
    similarity_maps,
)
from streamtrain.interop.folder import BackboneConfig

SHOWN_SIDE = 400  # shorter side in pixels of an image on the page


def draw_maps(arguments: argparse.Namespace) -> Image.Image:
    """The page of a network's maps."""
    originals = [read_image(path) for path in arguments.image]
    backbone = load_selected_backbone(arguments)
    config = backbone.config
    size = arguments.size or map_size(config.image_size, config.model.patch_size)
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
        components = foreground_components(features) if arguments.foreground else principal_components(features)
        what = "of the foreground's patches" if arguments.foreground else "of the patch features"
        return compose(f"First three principal components {what}", subtitle, pca_rows(arguments, shown, components))
    patches = arguments.patch or [(features[0].shape[0] // 2, features[0].shape[1] // 2)]
    if len(patches) > 1 and len(shown) == 1:
        rows = similarity_grid(arguments, shown[0], [similarity_maps(features, one)[0] for one in patches], patches)
        return compose("Cosine similarity to the marked patches", subtitle, rows)
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


def similarity_grid(
    arguments: argparse.Namespace, image: Image.Image, maps: list[np.ndarray], patches: list[tuple[int, int]]
) -> list[list[Tile]]:
    """The image with all marks, and a map a patch, in rows about as wide as high; one scale for all."""
    low = min(float(values.min()) for values in maps)
    grid = (maps[0].shape[0], maps[0].shape[1])
    marked = image
    for patch in patches:
        marked = mark(marked, patch, grid)
    tiles = [Tile(marked, arguments.image[0].name)]
    for patch, values in zip(patches, maps, strict=True):
        coloured = enlarge(viridis((values - low) / max(1.0 - low, 1e-6)), image.size, arguments.smooth)
        tiles.append(Tile(mark(coloured, patch, grid), f"patch {patch[0]},{patch[1]}"))
    columns = math.ceil(math.sqrt(len(tiles)))
    rows = [tiles[start : start + columns] for start in range(0, len(tiles), columns)]
    return [*rows, [Tile(colour_bar(low, 1.0, image.width, "cosine similarity"))]]


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
