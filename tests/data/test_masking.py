"""Masks: exact counts, static shapes, stratification, independence of the batch, block structure."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from host_syncs import cuda_syncs_raise
from hypothesis import given, settings
from hypothesis import strategies as st

from streamtrain.config.masks import MasksConfig, group_counts, max_rows
from streamtrain.data.masking import draw_masks, rasterise

configs = st.builds(
    MasksConfig,
    probability=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    ratio=st.sampled_from([(0.1, 0.5), (0.0, 1.0), (0.3, 0.3), (1.0, 1.0)]),
    group=st.sampled_from([1, 3, 4, 16]),
)
grids = st.tuples(st.integers(1, 16), st.integers(1, 16))


@given(masks=configs, grid=grids, batch=st.integers(1, 9), batches=st.integers(0, 5), views=st.integers(1, 3))
@settings(max_examples=60)
def test_counts_are_exact_and_shapes_static(
    masks: MasksConfig, grid: tuple[int, int], batch: int, batches: int, views: int
) -> None:
    num_patches = grid[0] * grid[1]
    rows = max_rows(masks, batch, views, num_patches, alignment=batch)
    slots = np.arange(batches * batch, (batches + 1) * batch)
    parameters = draw_masks(masks, 3, slots, views, grid)
    result = rasterise(parameters, grid, rows, "cpu")
    assert result.grid_mask.shape == (views * batch, num_patches)
    assert result.index.shape == result.weight.shape == (rows,)
    assert np.array_equal(result.grid_mask.sum(1).numpy(), parameters.counts)
    real = int(parameters.counts.sum())
    assert torch.equal(result.index[:real], result.grid_mask.flatten().nonzero()[:, 0])
    assert not result.index[real:].any() and not result.weight[real:].any()
    for mask, count, rectangles in zip(result.grid_mask, parameters.counts, parameters.rectangles, strict=True):
        top, left, height, width = rectangles[0]
        assert top + height <= grid[0] and left + width <= grid[1]
        # the first rectangle is filled first
        assert mask.view(grid)[top : top + height, left : left + width].sum() == min(count, height * width)
    counts = torch.from_numpy(parameters.counts)[result.index[:real] // num_patches]
    assert torch.equal(result.weight[:real], 1 / counts.float())


@given(masks=configs, views=st.integers(1, 3), group=st.integers(0, 2**40), seed=st.integers(0, 2**62))
@settings(max_examples=30)
def test_each_group_permutes_the_same_counts(masks: MasksConfig, views: int, group: int, seed: int) -> None:
    slots = np.arange(group * masks.group, (group + 1) * masks.group)
    counts = draw_masks(masks, seed, slots, views, (14, 14)).counts
    expected = group_counts(masks, views, 196)
    assert sorted(counts)[len(counts) - len(expected) :] == expected
    assert sum(expected) == counts.sum() <= max_rows(masks, masks.group, views, 196, masks.group)


def test_half_the_crops_are_masked_with_evenly_spread_ratios() -> None:
    counts = np.array(group_counts(MasksConfig(), 2, 196))
    assert len(counts) == 16
    assert abs(counts.mean() / 196 - 0.3) < 0.005
    assert np.ptp(np.diff(counts)) <= 1 and counts[0] / 196 > 0.1 and counts[-1] / 196 < 0.5
    assert max_rows(MasksConfig(), 16, 2, 196, 16) == counts.sum()
    assert max_rows(MasksConfig(), 48, 2, 196, 16) == 3 * counts.sum()


@given(first=st.integers(0, 2**40), count=st.integers(2, 20), data=st.data())
@settings(max_examples=25)
def test_a_slot_has_the_same_masks_in_any_batch(first: int, count: int, data: st.DataObject) -> None:
    masks, slots = MasksConfig(), np.arange(first, first + count)
    cut = data.draw(st.integers(1, count - 1))

    def grid_masks(slots: np.ndarray) -> torch.Tensor:
        parameters = draw_masks(masks, 9, slots, 2, (7, 9))
        return rasterise(parameters, (7, 9), 10_000, "cpu").grid_mask.view(2, len(slots), 63)

    parts = torch.cat([grid_masks(slots[:cut]), grid_masks(slots[cut:])], dim=1)
    assert torch.equal(grid_masks(slots), parts)


def test_masks_are_blocks_not_noise() -> None:
    slots = np.arange(160)
    parameters = draw_masks(MasksConfig(), 0, slots, 2, (14, 14))
    grid_mask = rasterise(parameters, (14, 14), 10_000, "cpu").grid_mask.view(-1, 14, 14)[parameters.counts > 0]
    agreement = (grid_mask[:, 1:] == grid_mask[:, :-1]).float().mean()
    agreement += (grid_mask[..., 1:] == grid_mask[..., :-1]).float().mean()
    # at these ratios, neighbouring patches of independent draws agree in 0.56 of all cases
    assert agreement / 2 > 0.85
    # every patch of the grid can be masked; corners are rare, as for any uniformly placed rectangles
    share = grid_mask.float().mean(0)
    assert share.min() > 0.02 and share.max() < 0.65


def test_a_row_bound_that_is_too_small_raises() -> None:
    parameters = draw_masks(MasksConfig(), 0, np.arange(16), 2, (14, 14))
    with pytest.raises(AssertionError):
        rasterise(parameters, (14, 14), 10, "cpu")


@pytest.mark.gpu
def test_gpu_matches_cpu_without_host_sync() -> None:
    parameters = draw_masks(MasksConfig(), 0, np.arange(16), 2, (14, 14))
    rows = max_rows(MasksConfig(), 16, 2, 196, 16)
    rasterise(parameters, (14, 14), rows, "cuda")
    with cuda_syncs_raise():
        on_gpu = rasterise(parameters, (14, 14), rows, "cuda")
    on_cpu = rasterise(parameters, (14, 14), rows, "cpu")
    for name in ("grid_mask", "index", "weight"):
        assert torch.equal(getattr(on_gpu, name).cpu(), getattr(on_cpu, name))
