"""Pages for ``visualize``: cosine similarity, principal components, CLS attention, and augmented crops."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from streamtrain.evaluation.figures import Link, Tile, draw_page, photo
from streamtrain.evaluation.matching import Matches

HEADS_SHOWN = 6


def pca_page(
    images: Sequence[Image.Image],
    names: Sequence[str],
    components: Sequence[np.ndarray],
    subtitle: str,
    smooth: bool = False,
    foreground: bool = False,
) -> Image.Image:
    """Draw images above their first three principal components, or beside them if there is one image.

    Args:
        components: float [h, w, 3] in 0..1 for each image.
        smooth: interpolate between patches.
        foreground: ``components`` are of the foreground patches only.
    """
    maps = [
        Tile(np.rint(values * 255).astype(np.uint8), image.size, smooth=smooth)
        for image, values in zip(images, components, strict=True)
    ]
    photos = [photo(image, name) for image, name in zip(images, names, strict=True)]
    patches = "foreground patches" if foreground else "patch features"
    rows = [[photos[0], maps[0]]] if len(images) == 1 else [photos, maps]
    return draw_page(f"First three principal components of the {patches} as red, green and blue", subtitle, rows)


def attention_page(
    images: Sequence[Image.Image],
    names: Sequence[str],
    maps: Sequence[np.ndarray],
    subtitle: str,
    smooth: bool = False,
) -> Image.Image:
    """Draw a row per image: the image, the mean attention over the heads, and at most six heads.

    Args:
        maps: float [heads, h, w] for each image; each map is drawn from 0 to its own maximum.
    """
    rows = []
    for image, heads, name in zip(images, maps, names, strict=True):
        small = image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)
        tiles = [photo(small, name)]
        named = [("mean of heads", heads.mean(0)), *((f"head {i}", head) for i, head in enumerate(heads[:HEADS_SHOWN]))]
        for label, values in named:
            caption = f"{label}: {values.sum():.0%} on patches"
            relative = values / max(float(values.max()), 1e-12)
            tiles.append(Tile(relative, small.size, caption, smooth=smooth))
        rows.append(tiles)
    label = "attention weight, as a share of the map's maximum"
    return draw_page("Attention of the CLS token in the last block", subtitle, rows, label)


def similarity_page(
    images: Sequence[Image.Image],
    names: Sequence[str],
    maps: Sequence[Sequence[np.ndarray]],
    patches: Sequence[tuple[int, int]],
    subtitle: str,
    smooth: bool = False,
) -> Image.Image:
    """Draw the similarity of marked patches of the first image to all patches of all images, on one colour scale.

    One image with several patches is drawn as a grid of maps; otherwise each patch has a row of images and maps.

    Args:
        maps: for each of ``patches``, float [h, w] in -1..1 for each image.
        patches: (row, column) in the first image.
    """
    grid = (maps[0][0].shape[0], maps[0][0].shape[1])
    lowest = min(float(values.min()) for of_patch in maps for values in of_patch)
    limits = (min(lowest, 1.0 - 1e-6), 1.0)

    def map_tile(values: np.ndarray, image: Image.Image, patch: tuple[int, int] | None, caption: str = "") -> Tile:
        marks = [patch] if patch is not None else []
        return Tile(values, image.size, caption, limits, smooth, marks, grid)

    title = f"Cosine similarity to the marked patch{'es' if len(patches) > 1 else ''}"
    if len(patches) > 1 and len(images) == 1:
        tiles = [photo(images[0], names[0], patches, grid)]
        for (values,), patch in zip(maps, patches, strict=True):
            tiles.append(map_tile(values, images[0], patch, f"patch {patch[0]},{patch[1]}"))
        columns = math.ceil(math.sqrt(len(tiles)))
        rows = [tiles[start : start + columns] for start in range(0, len(tiles), columns)]
    else:
        rows = []
        for of_patch, patch in zip(maps, patches, strict=True):
            first, *others = zip(images, names, of_patch, strict=True)
            image, name, values = first
            tiles = [photo(image, f"{name}, patch {patch[0]},{patch[1]}", [patch], grid)]
            tiles.append(map_tile(values, image, patch))
            for image, name, values in others:
                tiles += [photo(image, name), map_tile(values, image, None)]
            rows.append(tiles)
    return draw_page(title, subtitle, rows, "cosine similarity")


def matches_page(
    images: Sequence[Image.Image],
    names: Sequence[str],
    grids: Sequence[tuple[int, int]],
    matches: Matches,
    subtitle: str,
) -> Image.Image:
    """Draw two images side by side, and a line between the centres of each pair of matching patches.

    Args:
        grids: (rows, columns) of patches of each image.
    """
    colours = position_colours(matches.first, grids[0])
    ends = [
        (cells[:, ::-1] + 0.5) / grid[::-1] for cells, grid in zip((matches.first, matches.second), grids, strict=True)
    ]
    links = [
        Link((0, *first.tolist()), (1, *second.tolist()), colour)
        # the best match is drawn last, over the others
        for first, second, colour in reversed(list(zip(*ends, colours, strict=True)))
    ]
    photos = [photo(image, name) for image, name in zip(images, names, strict=True)]
    return draw_page("Mutual nearest patches", subtitle, [photos], links=links)


def position_colours(cells: np.ndarray, grid: tuple[int, int]) -> list[tuple[float, float, float]]:
    """Return a colour, RGB in 0..1, for each (row, column) [M, 2]: the hue by column, paler towards the top."""
    places = (cells + 0.5) / grid
    return [colorsys.hsv_to_rgb(0.85 * x, 0.45 + 0.55 * y, 1.0) for y, x in places.tolist()]


def crops_page(
    images: Sequence[Image.Image], names: Sequence[str], panels: Sequence[np.ndarray], subtitle: str
) -> Image.Image:
    """Draw a row per image: the image, and a panel uint8 [h, w, 3] with one draw of its training crops per row."""
    rows = [
        [photo(image, name), photo(Image.fromarray(panel), "one draw of the training crops per row")]
        for image, name, panel in zip(images, names, panels, strict=True)
    ]
    return draw_page("Training crops and masks", subtitle, rows)
