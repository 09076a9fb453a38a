"""Block masks: drawn in numpy from the slots, rasterised on the device, with shapes that never change.

Crops of ``masks.group`` consecutive slots (all global views together) share the ratios: an exact share of
them is masked, with ratios spread evenly over ``masks.ratio`` and dealt out by a permutation keyed by the
group. Each crop is then filled with rectangles (Bao et al. 2022, arXiv:2106.08254; Zhou et al. 2022,
arXiv:2111.07832) to an exact count of patches: the last rectangle is cut, and what they leave is taken from
their rims.
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

# rectangles drawn for a crop; the first few fill most of it
RECTANGLES = 12
# patches of the smallest rectangle
SMALLEST_AREA = 4


@dataclass(frozen=True)
class MaskParameters:
    """The masks of N = V*B crops before they are rasterised.

    Attributes:
        counts: int32 [N], patches to mask in each crop; 0 leaves it whole.
        rectangles: int32 [N, R, 4], (top, left, height, width) in patches.
    """

    counts: npt.NDArray[np.int32]
    rectangles: npt.NDArray[np.int32]


def draw_masks(
    masks: MasksConfig, seed: int, slots: npt.NDArray[np.int64], num_views: int, grid: tuple[int, int]
) -> MaskParameters:
    """Draw the masks of the global crops of ``slots`` [B]: rows are view-major, ``view * B + sample``.

    A pure function of each slot: what else is in ``slots`` changes nothing. ``grid``: patches (down, across).
    """
    counts = _counts_of_slots(masks, seed, slots, num_views, grid[0] * grid[1])
    draws = uniforms(seed, MASKS, slots, num_views * RECTANGLES * 4)
    draws = draws.reshape(len(slots), num_views, RECTANGLES, 4)
    rectangles = _rectangles(masks, draws, counts, grid)
    return MaskParameters(
        counts=np.ascontiguousarray(counts.T).reshape(-1),
        rectangles=np.ascontiguousarray(rectangles.swapaxes(0, 1)).reshape(-1, RECTANGLES, 4),
    )


def every_patch(num_crops: int, num_patches: int, device: torch.device | str) -> Masks:
    """The masks of a student that sees whole crops and is asked about all their patches."""
    rows = num_crops * num_patches
    return Masks(
        torch.zeros(num_crops, num_patches, dtype=torch.bool, device=device),
        torch.arange(rows, device=device),
        torch.full((rows,), 1.0 / num_patches, device=device),
    )


def rasterise(
    parameters: MaskParameters, grid: tuple[int, int], rows: int, device: torch.device | str
) -> Masks:
    """Turn rectangles into masks on ``device`` without waiting for it; ``rows`` is ``max_rows`` of the batch.

    Each patch gets a rank within its crop: patches of the first rectangle, then what later ones add, then the
    others by their distance to the nearest rectangle; the ``count`` lowest ranks are masked.
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

    # compaction at a static size: a masked patch goes to its place in line, all others to a last, spare place
    flat = grid_mask.reshape(-1)
    place = torch.where(flat, flat.cumsum(0) - 1, rows)
    share = counts.clamp(min=1).float().reciprocal()[:, None].expand(-1, num_patches).reshape(-1)
    index = torch.zeros(rows + 1, dtype=torch.int64, device=device)
    index.scatter_(0, place, torch.arange(num_crops * num_patches, device=device))
    weight = torch.zeros(rows + 1, dtype=torch.float32, device=device)
    weight.scatter_(0, place, share)
    return Masks(grid_mask=grid_mask, index=index[:rows], weight=weight[:rows])


def _counts_of_slots(
    masks: MasksConfig, seed: int, slots: npt.NDArray[np.int64], num_views: int, num_patches: int
) -> npt.NDArray[np.int32]:
    """Masked patches [B, V] of each slot's views: the group's counts and zeros, dealt by its permutation."""
    counts = np.zeros(masks.group * num_views, np.int32)
    dealt = group_counts(masks, num_views, num_patches)
    counts[: len(dealt)] = dealt
    groups, which = np.unique(slots // masks.group, return_inverse=True)
    deals = [counts[permutation(seed, MASK_GROUPS, len(counts), int(group))] for group in groups]
    return np.stack(deals).reshape(len(groups), masks.group, num_views)[which, slots % masks.group]


def _rectangles(
    masks: MasksConfig,
    draws: npt.NDArray[np.float64],
    counts: npt.NDArray[np.int32],
    grid: tuple[int, int],
) -> npt.NDArray[np.int32]:
    """Rectangles [B, V, R, 4]: area uniform up to what is left to mask, aspect log-uniform."""
    height, width = grid
    log_low, log_high = np.log(masks.aspect)
    root = np.exp(0.5 * (log_low + (log_high - log_low) * draws[..., 1]))
    tall, wide = np.empty_like(root), np.empty_like(root)
    left = np.maximum(counts, SMALLEST_AREA).astype(np.float64)
    # rectangles overlap, so one that comes late still gets a tenth of the mask
    least = np.maximum(counts / 10, SMALLEST_AREA)
    for k in range(RECTANGLES):
        side = np.sqrt(SMALLEST_AREA + (left - SMALLEST_AREA) * draws[:, :, k, 0])
        tall[:, :, k] = np.clip(np.rint(side * root[:, :, k]), 1, height)
        wide[:, :, k] = np.clip(np.rint(side / root[:, :, k]), 1, width)
        left = np.maximum(left - tall[:, :, k] * wide[:, :, k], least)
    top = np.floor(draws[..., 2] * (height - tall + 1))
    start = np.floor(draws[..., 3] * (width - wide + 1))
    return np.stack([top, start, tall, wide], -1).astype(np.int32)


def _fill_order(rectangles: Tensor, grid: tuple[int, int]) -> Tensor:
    """Int64 [N, T], distinct within a crop: the smaller, the earlier a patch is masked."""
    height, width = grid
    # a CPU reduces numbers of 32 bits a hundred times as fast as those of 64
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
    """Int64 copy on ``device``; from pinned memory, so that the copy does not wait for the device."""
    tensor = torch.from_numpy(array.astype(np.int64))
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor
