"""Correspondence of patch features: mutual nearest patches of two images, and where a point of one is in the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# values of a block of similarities or of squared features, which bounds the memory
_BLOCK = 2**24


@dataclass(frozen=True)
class Matches:
    """M pairs of patches, each the nearest of the other by cosine similarity, the most similar pair first.

    Attributes:
        first, second: (row, column) in the two images, int64 [M, 2].
        similarity: float32 [M], in -1..1.
    """

    first: np.ndarray
    second: np.ndarray
    similarity: np.ndarray

    def __len__(self) -> int:
        return len(self.similarity)


def mutual_matches(
    first: Tensor, second: Tensor, count: int | None = None, masks: Sequence[np.ndarray] | None = None
) -> Matches:
    """Return the ``count`` most similar mutual nearest patches of two images; None: all.

    Of equally near patches the first in reading order is the nearest.

    Args:
        first, second: normalised patch features fp32 [h_i, w_i, D].
        masks: bool [h_i, w_i] of each image: keep only matches between patches that are True.
    """
    rows, columns = first.flatten(0, 1), second.flatten(0, 1)
    forward, similarity = _nearest(rows, columns)
    backward, _ = _nearest(columns, rows)
    is_kept = backward[forward] == torch.arange(len(rows))
    if masks is not None:
        from_mask, to_mask = (torch.from_numpy(mask).flatten() for mask in masks)
        is_kept &= from_mask & to_mask[forward]
    mutual = torch.nonzero(is_kept)[:, 0]
    order = similarity[mutual].argsort(descending=True, stable=True)[:count]
    chosen = mutual[order]
    return Matches(
        _cells(chosen, first.shape[1]), _cells(forward[chosen], second.shape[1]), similarity[chosen].float().numpy()
    )


def _nearest(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return the index of the most similar key of each query, and the similarity: int64 [N], fp32 [N]."""
    parts = [(part @ keys.T).max(1) for part in queries.split(max(_BLOCK // len(keys), 1))]
    return torch.cat([part.indices for part in parts]), torch.cat([part.values for part in parts])


def _cells(indices: Tensor, columns: int) -> np.ndarray:
    return np.stack(np.divmod(indices.numpy(), columns), -1)


class PointFinder:
    """Find points in an image by its patch features, which are interpolated bilinearly between patch centres.

    Every pixel of the input has a feature, and the pixel with the highest cosine similarity is found. Features outside
    the outermost patch centres are constant, so points there are known to half a patch.

    Args:
        features: patch features fp32 [h, w, D].
        patch_size: side of a patch in pixels of the input.
    """

    def __init__(self, features: Tensor, patch_size: int) -> None:
        self.features = features
        self.size = (features.shape[0] * patch_size, features.shape[1] * patch_size)

    @property
    def num_bytes(self) -> int:
        return 4 * (self.features.numel() + self.size[0] * self.size[1])

    @cached_property
    def _norms(self) -> Tensor:
        """The norms of the interpolated features, fp32 [height, width]."""
        squares = torch.zeros(self.size, device=self.features.device)
        for part in self.features.permute(2, 0, 1).split(max(_BLOCK // squares.numel(), 1)):
            squares += self._to_pixels(part).square().sum(0)
        return squares.sqrt_().clamp_min_(1e-12)

    def _to_pixels(self, maps: Tensor) -> Tensor:
        """Interpolate maps [N, h, w] to the pixels of the input [N, height, width]."""
        return F.interpolate(maps[None], size=self.size, mode="bilinear", align_corners=False)[0]

    def at(self, points: Tensor) -> Tensor:
        """Return the features at points (x, y), fp32 [P, 2] as shares of the image's width and height: [P, D]."""
        grid = (2 * points - 1)[None, :, None]
        planes = self.features.permute(2, 0, 1)[None]
        return F.grid_sample(planes, grid, mode="bilinear", padding_mode="border", align_corners=False)[0, :, :, 0].T

    def find(self, queries: Tensor) -> Tensor:
        """Return the centres of the most similar pixels of features [P, D]: (x, y) as shares, fp32 [P, 2]."""
        height, width = self.size
        found = []
        for part in queries.split(max(_BLOCK // (height * width), 1)):
            similarity = self._to_pixels(torch.einsum("hwd,pd->phw", self.features, part)) / self._norms
            best = similarity.flatten(1).argmax(1)
            found.append(torch.stack([(best % width + 0.5) / width, (best // width + 0.5) / height], -1))
        return torch.cat(found)
