"""The same few images as the network sees them, step after step: principal components and similarity of patches."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from PIL import Image
from torch import Tensor

from streamtrain.evaluation.canvas import Tile, compose, enlarge, mark, viridis
from streamtrain.evaluation.maps import principal_components, similarity_maps
from streamtrain.run.atomic_io import replace_file

# moments that are shown, and the side in pixels of a map on the page
COLUMNS, SIDE = 6, 128


@dataclass(frozen=True)
class Moment:
    """Maps of all images at a step."""

    step: int
    # uint8 [images, h, w, 3]
    components: np.ndarray
    # float32 [images, h, w], cosine similarity to the middle patch of each image
    similarity: np.ndarray


class MapsOverTime:
    """Keeps maps of some moments, the first and the latest among them, in a small file of the run folder."""

    def __init__(self, images: Sequence[np.ndarray], path: Path, start_step: int) -> None:
        """
        Args:
            images: uint8 [side, side, 3], a row of the pages each.
            path: of the file; what it holds of later steps than ``start_step`` is forgotten.
        """
        self._images, self._path = images, path
        self._moments = [moment for moment in _load(path, len(images)) if moment.step <= start_step]

    def add(self, step: int, features: Sequence[Tensor]) -> None:
        """Take note of the normalised patch features [h, w, D] of all images."""
        components = np.stack([np.rint(each * 255).astype(np.uint8) for each in principal_components(features)])
        middle = (features[0].shape[0] // 2, features[0].shape[1] // 2)
        similarity = np.stack([similarity_maps([each], middle)[0] for each in features])
        # what is left of other settings cannot stand beside it
        size = components.shape
        self._moments = [each for each in self._moments if each.step != step and each.components.shape == size]
        self._moments.append(Moment(step, components, similarity))
        if len(self._moments) > COLUMNS:
            del self._moments[_superfluous([moment.step for moment in self._moments])]
        kept = io.BytesIO()
        np.savez_compressed(
            kept,
            steps=[moment.step for moment in self._moments],
            components=[moment.components for moment in self._moments],
            similarity=[moment.similarity for moment in self._moments],
        )
        # a full disk takes the pictures of earlier starts, and nothing else
        with suppress(OSError):
            replace_file(self._path, kept.getvalue())

    def components_page(self) -> np.ndarray:
        """The first three principal components as red, green and blue: uint8 [height, width, 3]."""
        maps = [[enlarge(one, (SIDE, SIDE), False) for one in moment.components] for moment in self._moments]
        return self._page("First three principal components of the patch features", maps, None)

    def similarity_page(self) -> np.ndarray:
        """Similarity to the marked patch, each map on a scale of its own: uint8 [height, width, 3]."""
        maps = []
        for moment in self._moments:
            low = moment.similarity.min(axis=(1, 2), keepdims=True)
            scaled = (moment.similarity - low) / np.maximum(1.0 - low, 1e-6)
            maps.append([enlarge(viridis(one), (SIDE, SIDE), False) for one in scaled])
        grid = self._moments[-1].similarity.shape[1:3]
        return self._page("Cosine similarity to the marked patch", maps, (int(grid[0]), int(grid[1])))

    def _page(
        self, title: str, maps: Sequence[Sequence[Image.Image]], grid: tuple[int, int] | None
    ) -> np.ndarray:
        rows = []
        for index, image in enumerate(self._images):
            shown = Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            if grid is not None:
                shown = mark(shown, (grid[0] // 2, grid[1] // 2), grid)
            last = index == len(self._images) - 1
            tiles = [Tile(shown, "image" if last else "")]
            for moment, of_moment in zip(self._moments, maps, strict=True):
                tiles.append(Tile(of_moment[index], f"step {moment.step:,}" if last else ""))
            rows.append(tiles)
        return np.asarray(compose(title, "held-out images, the network as it was after so many steps", rows))


def _superfluous(steps: Sequence[int]) -> int:
    """Which of ascending steps leaves the smallest gap if it goes; never the first or the last."""
    gaps = [steps[index + 1] - steps[index - 1] for index in range(1, len(steps) - 1)]
    return 1 + int(np.argmin(gaps))


def _load(path: Path, num_images: int) -> list[Moment]:
    """What an earlier start has kept; nothing where it is of other images, or torn."""
    try:
        with np.load(path, allow_pickle=False) as file:
            steps, components, similarity = (file[name] for name in ("steps", "components", "similarity"))
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return []
    if components.ndim != 5 or components.shape[1] != num_images:
        return []
    return [Moment(int(step), *each) for step, *each in zip(steps, components, similarity, strict=True)]
