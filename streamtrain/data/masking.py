"""Block masks: drawn in numpy from the slots, rasterised on the device, with shapes that never change.

Masking is stratified over the crops of ``masks.group`` consecutive slots (all global views together): an exact share
of these crops is masked, with ratios spread evenly over ``masks.ratio`` and assigned by a permutation keyed by the
group. Each crop is then filled with rectangles (Bao et al. 2022, arXiv:2106.08254; Zhou et al. 2022,
arXiv:2111.07832) to an exact number of patches: the last rectangle is cut, and if all rectangles together are too
small, the patches nearest to them are added.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shards.randomness import MASK_GROUPS, MASKS, permutation, uniforms
from streamtrain.config.masks import MasksConfig, group_counts
from streamtrain.data.batch import Masks

# rectangles drawn per crop; the first few fill most of the mask
RECTANGLES = 12
# area of the smallest rectangle in patches
SMALLEST_AREA = 4


@dataclass(frozen=True)
class MaskParameters:
    """Masks of N = V*B crops before rasterising.

    Attributes:
        counts: int32 [N], number of patches to mask in each crop; 0 masks none.
        rectangles: int32 [N, R, 4], (top, left, height, width) in patches.
    """

    counts: npt.NDArray[np.int32]
    rectangles: npt.NDArray[np.int32]


def draw_masks(
    masks: MasksConfig, seed: int, slots: npt.NDArray[np.int64], num_views: int, grid: tuple[int, int]
) -> MaskParameters:
    """Draw the masks of the global crops of ``slots`` [B]; rows are view-major, ``view * B + sample``.

    A slot's masks depend on the seed and the slot only, not on the other slots of the batch. ``grid`` is the number of
    patches (down, across).
    """
    counts = _mask_counts(masks, seed, slots, num_views, grid[0] * grid[1])
    draws = uniforms(seed, MASKS, slots, num_views * RECTANGLES * 4)
    draws = draws.reshape(len(slots), num_views, RECTANGLES, 4)
    rectangles = _draw_rectangles(masks, draws, counts, grid)
    return MaskParameters(
        counts=np.ascontiguousarray(counts.T).reshape(-1),
        rectangles=np.ascontiguousarray(rectangles.swapaxes(0, 1)).reshape(-1, RECTANGLES, 4),
    )


def select_every_patch(num_crops: int, num_patches: int, device: torch.device | str) -> Masks:
    """Return masks that hide no patch from the student and select all patches for the loss."""
    rows = num_crops * num_patches
    return Masks(
        torch.zeros(num_crops, num_patches, dtype=torch.bool, device=device),
        torch.arange(rows, device=device),
        torch.full((rows,), 1.0 / num_patches, device=device),
    )


def rasterise(parameters: MaskParameters, grid: tuple[int, int], rows: int, device: torch.device | str) -> Masks:
    """Turn rectangles into masks on ``device`` without a host sync; ``rows`` is ``max_rows`` of the batch.

    Patches are ranked within their crop: first the patches of the first rectangle, then those added by each later
    rectangle, then the others by their distance to the nearest rectangle. The ``count`` lowest ranks are masked.
    """
    num_patches = grid[0] * grid[1]
    num_crops = len(parameters.counts)
    assert int(parameters.counts.sum()) <= rows, "more masked patches than the static bound"
    counts = _to_device(parameters.counts, device)
    rectangles = _to_device(parameters.rectangles, device)
    order = _fill_order(rectangles, grid)
    rank = torch.empty_like(order).scatter_(
        1, order.argsort(1), torch.arange(num_patches, device=device).expand(num_crops, -1)
    )
    grid_mask = rank < counts[:, None]

    # compact to a static size: masked patches are written in order, all others to one spare entry at the end
    flat = grid_mask.reshape(-1)
    target = torch.where(flat, flat.cumsum(0) - 1, rows)
    share = counts.clamp(min=1).float().reciprocal()[:, None].expand(-1, num_patches).reshape(-1)
    index = torch.zeros(rows + 1, dtype=torch.int64, device=device)
    index.scatter_(0, target, torch.arange(num_crops * num_patches, device=device))
    weight = torch.zeros(rows + 1, dtype=torch.float32, device=device)
    weight.scatter_(0, target, share)
    return Masks(grid_mask=grid_mask, index=index[:rows], weight=weight[:rows])


def _mask_counts(
    masks: MasksConfig, seed: int, slots: npt.NDArray[np.int64], num_views: int, num_patches: int
) -> npt.NDArray[np.int32]:
    """Return the numbers of masked patches [B, V]: the group's counts and zeros in the group's permuted order."""
    counts = np.zeros(masks.group * num_views, np.int32)
    nonzero = group_counts(masks, num_views, num_patches)
    counts[: len(nonzero)] = nonzero
    groups, group_index = np.unique(slots // masks.group, return_inverse=True)
    permuted = [counts[permutation(seed, MASK_GROUPS, len(counts), int(group))] for group in groups]
    return np.stack(permuted).reshape(len(groups), masks.group, num_views)[group_index, slots % masks.group]


def _draw_rectangles(
    masks: MasksConfig,
    draws: npt.NDArray[np.float64],
    counts: npt.NDArray[np.int32],
    grid: tuple[int, int],
) -> npt.NDArray[np.int32]:
    """Draw rectangles [B, V, R, 4]: area uniform up to the number of patches still to mask, aspect log-uniform."""
    height, width = grid
    log_low, log_high = np.log(masks.aspect)
    root = np.exp(0.5 * (log_low + (log_high - log_low) * draws[..., 1]))
    tall, wide = np.empty_like(root), np.empty_like(root)
    remaining = np.maximum(counts, SMALLEST_AREA).astype(np.float64)
    # rectangles overlap, so a late one may still cover a tenth of the mask
    least = np.maximum(counts / 10, SMALLEST_AREA)
    for k in range(RECTANGLES):
        side = np.sqrt(SMALLEST_AREA + (remaining - SMALLEST_AREA) * draws[:, :, k, 0])
        tall[:, :, k] = np.clip(np.rint(side * root[:, :, k]), 1, height)
        wide[:, :, k] = np.clip(np.rint(side / root[:, :, k]), 1, width)
        remaining = np.maximum(remaining - tall[:, :, k] * wide[:, :, k], least)
    top = np.floor(draws[..., 2] * (height - tall + 1))
    start = np.floor(draws[..., 3] * (width - wide + 1))
    return np.stack([top, start, tall, wide], -1).astype(np.int32)


def _fill_order(rectangles: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return int64 [N, T], distinct within a crop: patches with smaller values are masked first."""
    height, width = grid
    # int32: a CPU reduces it a hundred times faster than int64
    top, start, tall, wide = (part[:, :, None] for part in rectangles.int().unbind(-1))
    y = torch.arange(height, dtype=torch.int32, device=rectangles.device)
    x = torch.arange(width, dtype=torch.int32, device=rectangles.device)
    beyond_y = torch.maximum(top - y, y - (top + tall - 1)).clamp(min=0)
    beyond_x = torch.maximum(start - x, x - (start + wide - 1)).clamp(min=0)
    distance = (beyond_y[..., :, None] + beyond_x[..., None, :]).flatten(2)
    count = rectangles.shape[1]
    number = torch.arange(count, dtype=torch.int32, device=rectangles.device)[:, None]
    stage = torch.where(distance == 0, number, count + distance).amin(1)
    return stage * (height * width) + torch.arange(height * width, device=rectangles.device)


def _to_device(array: npt.NDArray[np.int32], device: torch.device | str) -> Tensor:
    """Copy to ``device`` as int64, from pinned memory so that the copy is asynchronous."""
    tensor = torch.from_numpy(array.astype(np.int64))
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor
