"""PCK of frozen patch features: the share of points of one image that are found in another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from shards.errors import printable
from shards.format.decode import Color
from shards.format.pixels import PixelFormat
from streamtrain.data.still_images import decode_image, still_size
from streamtrain.evaluation.maps import fit_to_patches
from streamtrain.evaluation.matching import PointFinder
from streamtrain.evaluation.pairs import ImagePair, Points, check_inside
from streamtrain.evaluation.patches import PatchNetwork
from streamtrain.run.progress import progress_bar

# a found point is correct up to this share of the longer side of the box, or of the image
THRESHOLDS = (0.1, 0.05)
# of features of recent images, which are often in several pairs
_MAX_KEPT_BYTES = 2**28

Size = tuple[int, int]


class _Images:
    """Features of images; the most recently used are kept."""

    def __init__(self, network: PatchNetwork, pixels: PixelFormat, background: Color | None) -> None:
        self.network, self.pixels, self.background = network, pixels, background
        self._kept: dict[Path, tuple[PointFinder, Size]] = {}
        self._num_bytes = 0

    def open(self, path: Path) -> tuple[PointFinder, Size]:
        """Return the features of an image, and its (width, height) in the file; raises StreamtrainError."""
        found = self._kept.pop(path, None)
        if found is None:
            found = self._read(path)
            self._num_bytes += found[0].num_bytes
        # the last key is the most recently used one
        self._kept[path] = found
        while self._num_bytes > _MAX_KEPT_BYTES and len(self._kept) > 1:
            self._num_bytes -= self._kept.pop(next(iter(self._kept)))[0].num_bytes
        return found

    def _read(self, path: Path) -> tuple[PointFinder, Size]:
        patch = self.network.patch_size
        image = decode_image(path, printable(path), self.background, self.pixels)
        resized = fit_to_patches(image, self.network.size, patch)
        width, height = still_size(resized)
        features = self.network.features(torch.from_numpy(np.array(resized))[None])[0]
        grid = (height // patch, width // patch)
        return PointFinder(F.normalize(features, dim=-1).unflatten(0, grid), patch), still_size(image)


def find_points(finder_a: PointFinder, finder_b: PointFinder, points: Points, size_a: Size, size_b: Size) -> Points:
    """Return where points of image A are in image B: float64 [P, 2] in pixels (x, y), as the points.

    Args:
        size_a, size_b: (width, height) of the images in pixels.
    """
    shares = torch.from_numpy(points / size_a).to(finder_a.features)
    return finder_b.find(finder_a.at(shares)).double().cpu().numpy() * size_b


def count_correct(
    network: PatchNetwork, pairs: Sequence[ImagePair], pixels: PixelFormat, background: Color | None
) -> np.ndarray:
    """Return for each pair the points found within each of ``THRESHOLDS``, and all points: int64 [N, 3].

    Images are resized such that the shorter side has about ``network.size`` pixels, and are not cropped.

    Raises:
        StreamtrainError: an image cannot be decoded, or a point is outside its image.
    """
    images = _Images(network, pixels, background)
    counts = []
    with progress_bar("comparing", len(pairs), "pairs") as bar:
        for pair in pairs:
            finder_a, size_a = images.open(pair.image_a)
            finder_b, size_b = images.open(pair.image_b)
            check_inside(pair, size_a, size_b)
            found = find_points(finder_a, finder_b, pair.points_a, size_a, size_b)
            distances = np.linalg.norm(found - pair.points_b, axis=1)
            side = max(size_b) if pair.box_b is None else (pair.box_b[2:] - pair.box_b[:2]).max()
            counts.append([*((distances <= share * side).sum() for share in THRESHOLDS), len(distances)])
            bar.update(1)
    return np.array(counts, np.int64)
