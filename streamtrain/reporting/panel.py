"""A picture of the training crops: global views with their masks, and local views, one row per sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from shards.format.pixels import to_rgb8
from streamtrain.config.tree import Config
from streamtrain.data.batch import Batch

GAP = 6  # pixels between crops; rows and margins have twice that
BACKGROUND = 245  # grey
MASK_COLOUR = np.array([28, 30, 46], np.float32)
MASK_OPACITY = 0.82
INK, SOFT_INK = (28, 30, 38), (100, 104, 116)
LABEL_HEIGHT, LINE, TEXT_SIZE = 40, 16, 12  # pixels, of the labels above the first row
MIN_SIDE = 128  # smaller global crops are magnified by an integer factor, up to this side


def batch_panel(batch: Batch, config: Config) -> np.ndarray:
    """Draw ``crops_panel`` of a micro-batch."""
    show = partial(shown_crops, config=config)
    samples, size = config.monitor.panel_samples, len(batch.slots)
    return crops_panel(batch.global_crops, batch.local_crops, batch.masks.grid_mask, size, samples, show)


def shown_crops(crops: np.ndarray, config: Config) -> np.ndarray:
    """Return crops [..., channels] as uint8 [..., 3] to be shown."""
    return to_rgb8(crops, config.crops.value_range, config.monitor.panel_channels)


def crops_panel(
    global_crops: Tensor,
    local_crops: Tensor,
    grid_mask: Tensor,
    batch_size: int,
    samples: int,
    show: Callable[[np.ndarray], np.ndarray] = lambda crops: crops,
) -> np.ndarray:
    """Draw the first ``samples`` samples of a micro-batch, one per row, under a row of labels.

    Args:
        global_crops: [V * B, H, W, channels], view-major.
        local_crops: [L * B, h, w, channels], view-major; L may be 0.
        grid_mask: bool [V * B, T], the masked patches of each global crop, row by row.
        batch_size: B.
        samples: rows to draw, at most B.
        show: converts crops [..., channels] to uint8 [..., 3].

    Returns:
        uint8 [height, width, 3].
    """
    rows = min(samples, batch_size)
    zoom = max(MIN_SIDE // max(global_crops.shape[1:3]), 1)
    masks = _first(grid_mask, batch_size, rows)
    global_views = [
        [_magnify(draw_mask(crop, mask), zoom) for crop, mask in zip(crops, masks[row], strict=True)]
        for row, crops in enumerate(show(_first(global_crops, batch_size, rows)))
    ]
    local = [[_magnify(crop, zoom) for crop in crops] for crops in show(_first(local_crops, batch_size, rows))]
    (high, wide), (small, narrow) = ([side * zoom for side in each.shape[1:3]] for each in (global_crops, local_crops))
    # stack local views in columns about as high as a global view
    column = max(round(high / small), 1)
    columns = -(-len(local[0]) // column)
    width = len(global_views[0]) * (wide + GAP) + columns * (narrow + GAP) + 3 * GAP
    row_height = max(high, column * (small + GAP) - GAP if columns else 0)
    panel = np.full((LABEL_HEIGHT + rows * (row_height + 2 * GAP), width, 3), BACKGROUND, np.uint8)
    for row in range(rows):
        top, left = LABEL_HEIGHT + row * (row_height + 2 * GAP), 2 * GAP
        for crop in global_views[row]:
            panel[top : top + high, left : left + wide] = crop
            left += wide + GAP
        for index, crop in enumerate(local[row]):
            y, x = top + (index % column) * (small + GAP), left + (index // column) * (narrow + GAP)
            panel[y : y + small, x : x + narrow] = crop
    labels = [(f"global view {view + 1}", "masked: dark") for view in range(len(global_views[0]))]
    starts = [2 * GAP + view * (wide + GAP) for view in range(len(labels) + bool(columns))]
    if columns:
        labels.append((f"{len(local[0])} local views", "never masked"))
    _draw_labels(panel, labels, starts)
    return panel


def _draw_labels(panel: np.ndarray, labels: Sequence[tuple[str, str]], starts: Sequence[int]) -> None:
    """Write the two lines of each label at its start in pixels, without lines that would reach the next label."""
    picture = Image.fromarray(panel[:LABEL_HEIGHT])
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(TEXT_SIZE)
    for label, left, right in zip(labels, starts, [*starts[1:], panel.shape[1]], strict=True):
        for index, (line, colour) in enumerate(zip(label, (INK, SOFT_INK), strict=True)):
            if left + draw.textlength(line, font) <= right:
                draw.text((left, GAP + index * LINE), line, colour, font)
    panel[:LABEL_HEIGHT] = np.asarray(picture)


def _magnify(crop: np.ndarray, zoom: int) -> np.ndarray:
    return crop.repeat(zoom, axis=0).repeat(zoom, axis=1)


def draw_mask(crop: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Darken the masked patches of a crop uint8 [H, W, 3]; ``mask``: bool [T], row by row."""
    height, width = crop.shape[:2]
    patch = math.isqrt(height * width // len(mask))
    assert patch**2 * len(mask) == height * width and height % patch == 0, (crop.shape, len(mask))
    covered = np.kron(mask.reshape(height // patch, width // patch), np.ones((patch, patch), bool))[..., None]
    return np.where(covered, crop * (1 - MASK_OPACITY) + MASK_COLOUR * MASK_OPACITY, crop).astype(np.uint8)


def _first(crops: Tensor, batch_size: int, rows: int) -> np.ndarray:
    """Return the first ``rows`` samples of a view-major tensor as [rows, views, ...]."""
    views = len(crops) // batch_size
    by_view = crops.reshape(views, batch_size, *crops.shape[1:])[:, :rows]
    return torch.movedim(by_view, 1, 0).cpu().numpy()
