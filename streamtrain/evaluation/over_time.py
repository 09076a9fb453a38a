"""Feature maps of a few fixed images at several steps of a run: principal components and patch similarity."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from zipfile import ZipFile

import numpy as np
from PIL import Image
from torch import Tensor

from shards.format.files import write_whole
from streamtrain.evaluation.figures import Tile, draw_page, photo
from streamtrain.evaluation.maps import principal_components, similarity_maps

# columns of a page, and width and height of a map in pixels
COLUMNS, SIZE = 6, (128, 128)
# of the maps of all steps, uncompressed
_MAX_BYTES = 1 << 28


@dataclass(frozen=True)
class StepMaps:
    """Maps of all images at one step."""

    step: int
    # uint8 [images, h, w, 3]
    components: np.ndarray
    # float32 [images, h, w], cosine similarity to the middle patch of each image
    similarity: np.ndarray


class MapsOverTime:
    """Keeps the maps of a few steps, always the first and the latest, in a small file of the run directory."""

    def __init__(self, images: Sequence[np.ndarray], path: Path, start_step: int) -> None:
        """Load the file ``path``, without steps after ``start_step``; ``images``: uint8 [side, side, 3]."""
        self._images, self._path = images, path
        self._steps = [maps for maps in _load(path, len(images)) if maps.step <= start_step]

    def add(self, step: int, features: Sequence[Tensor]) -> None:
        """Add the maps of the normalised patch features [h, w, D] of all images, and save the file."""
        components = np.stack([np.rint(each * 255).astype(np.uint8) for each in principal_components(features)])
        middle = (features[0].shape[0] // 2, features[0].shape[1] // 2)
        similarity = np.stack([similarity_maps([each], middle)[0] for each in features])
        # maps of another size come from other settings
        size = components.shape
        self._steps = [each for each in self._steps if each.step != step and each.components.shape == size]
        self._steps.append(StepMaps(step, components, similarity))
        if len(self._steps) > COLUMNS:
            del self._steps[_least_needed([maps.step for maps in self._steps])]
        content = io.BytesIO()
        np.savez_compressed(
            content,
            steps=[maps.step for maps in self._steps],
            components=[maps.components for maps in self._steps],
            similarity=[maps.similarity for maps in self._steps],
        )
        # if this fails, a resumed run only loses earlier maps
        with suppress(OSError):
            write_whole(self._path, content.getvalue())

    def components_page(self) -> np.ndarray:
        """Return the page of the first three principal components as red, green and blue: uint8 [height, width, 3]."""
        columns = [[Tile(values, SIZE) for values in maps.components] for maps in self._steps]
        return self._page("First three principal components of the patch features", columns)

    def similarity_page(self) -> np.ndarray:
        """Return the page of similarity to the marked patch, each map on its own scale: uint8 [height, width, 3]."""
        columns = [
            [Tile(values, SIZE, limits=(min(float(values.min()), 1 - 1e-6), 1.0)) for values in maps.similarity]
            for maps in self._steps
        ]
        rows, width = self._steps[-1].similarity.shape[1:3]
        return self._page("Cosine similarity to the marked patch", columns, (rows, width))

    def _page(self, title: str, columns: list[list[Tile]], grid: tuple[int, int] | None = None) -> np.ndarray:
        """Draw a row per image and a column per step; with ``grid`` the middle patch of the images is marked."""
        rows = []
        for index, image in enumerate(self._images):
            shown = Image.fromarray(image).resize(SIZE, Image.Resampling.LANCZOS)
            marks = [] if grid is None else [(grid[0] // 2, grid[1] // 2)]
            rows.append([photo(shown, "", marks, grid or (1, 1)), *(column[index] for column in columns)])
        captions = ["image", *(f"step {maps.step:,}" for maps in self._steps)]
        rows[-1] = [replace(tile, caption=caption) for tile, caption in zip(rows[-1], captions, strict=True)]
        return np.asarray(draw_page(title, "the same images at several steps of the run", rows))


def _least_needed(steps: Sequence[int]) -> int:
    """Return the index of the step, neither first nor last, whose removal leaves the smallest gap."""
    gaps = [steps[index + 1] - steps[index - 1] for index in range(1, len(steps) - 1)]
    return 1 + int(np.argmin(gaps))


def _load(path: Path, num_images: int) -> list[StepMaps]:
    """Return the maps in the file; none if it is missing, damaged, too large, or has another number of images."""
    try:
        with ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > _MAX_BYTES:
                return []
        with np.load(path, allow_pickle=False) as file:
            steps, components, similarity = (file[name] for name in ("steps", "components", "similarity"))
        count = len(steps)
        is_valid = components.shape[:2] == similarity.shape[:2] == (count, num_images) and (
            components.ndim == 5 and components.shape[2:] == (*similarity.shape[2:], 3)
        )
        if not is_valid or components.dtype != np.uint8 or similarity.dtype.kind != "f" or not components.size:
            return []
        return [StepMaps(int(step), *each) for step, *each in zip(steps, components, similarity, strict=True)]
    # numpy and zipfile raise almost any exception for a damaged file
    except Exception:
        return []
