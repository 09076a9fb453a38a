from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from streamtrain.config.section import ImageSize
from streamtrain.reporting.panel import GAP, LABEL_HEIGHT, crops_panel, draw_mask


@pytest.mark.parametrize(("width", "masked"), [(8, [0, 6]), (12, [0, 8])])
def test_mask_covers_its_patches_and_no_others(width: int, masked: list[int]) -> None:
    crop = np.full((8, width, 3), 200, np.uint8)
    mask = np.zeros(2 * width, bool)
    mask[masked] = True
    drawn = draw_mask(crop, mask)
    changed = (drawn != crop).any(-1)
    expected = np.zeros((8, width), bool)
    expected[0:2, 0:2] = expected[2:4, 4:6] = True
    assert np.array_equal(changed, expected)
    assert (crop == 200).all()


@pytest.mark.parametrize(
    ("size", "local", "views"),
    [(160, 96, 8), (224, 96, 8), (32, 16, 4), (64, 32, 0), ([32, 64], [16, 48], 5), ([160, 64], [96, 32], 3)],
)
def test_panel_holds_every_view_of_the_samples_it_shows(size: Any, local: Any, views: int) -> None:
    size, local = ImageSize.of(size), ImageSize.of(local)
    batch, rows = 3, 2
    # Each crop is one flat colour, so that its presence and its area can be read off the panel.
    grey = torch.arange(2 * batch, dtype=torch.uint8)
    crops = grey.reshape(-1, 1, 1, 1).expand(-1, *size, 3).contiguous()
    small = (100 + torch.arange(views * batch, dtype=torch.uint8)).reshape(-1, 1, 1, 1)
    panel = crops_panel(
        crops, small.expand(-1, *local, 3), torch.zeros(2 * batch, size.patches(16), dtype=torch.bool), batch, rows
    )
    assert panel.dtype == np.uint8 and panel.ndim == 3 and panel.shape[2] == 3
    zoom = max(128 // max(size), 1)
    # without the row of labels
    values, counts = np.unique(panel[LABEL_HEIGHT:, :, 0], return_counts=True)
    area = dict(zip(values.tolist(), counts.tolist(), strict=True))
    shown = {view * batch + row for view in range(2) for row in range(rows)}
    assert {value for value in area if value < 100} == shown
    assert all(area[value] == size.pixels * zoom**2 for value in shown)
    locals_shown = {100 + view * batch + row for view in range(views) for row in range(rows)}
    assert {value for value in area if 100 <= value < 240} == locals_shown
    assert all(area[value] == local.pixels * zoom**2 for value in locals_shown)


@pytest.mark.parametrize("size", [16, 128, 224])
def test_each_column_has_a_label(size: int) -> None:
    crops, masks = torch.zeros(2, size, size, 3, dtype=torch.uint8), torch.zeros(2, 16, dtype=torch.bool)
    local = torch.zeros(4, size // 2, size // 2, 3, dtype=torch.uint8)
    plain = crops_panel(crops, local, masks, 1, 1)[:LABEL_HEIGHT]
    columns = np.flatnonzero((plain < 128).any((0, 2)))
    side = size * max(128 // size, 1)
    for start in (2 * GAP, 2 * GAP + side + GAP, 2 * GAP + 2 * (side + GAP)):
        # each label begins at the left edge of its column
        assert ((start <= columns) & (columns < start + 8)).any() and start <= columns.max()


def test_more_rows_than_samples_shows_all() -> None:
    crops, masks = torch.zeros(2, 32, 32, 3, dtype=torch.uint8), torch.zeros(2, 4, dtype=torch.bool)
    no_local = torch.zeros(0, 16, 16, 3, dtype=torch.uint8)
    one = crops_panel(crops, no_local, masks, 1, 1)
    assert np.array_equal(crops_panel(crops, no_local, masks, 1, 9), one)
