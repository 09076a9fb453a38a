"""The shuffle is close to a full permutation, with the defaults and for sets of any size."""

from __future__ import annotations

import pytest

from shards.reading.order import Order
from shards.reading.shuffle_quality import measure


@pytest.mark.parametrize("num_shards", [1, 16, 100, 1000])
def test_the_defaults_shuffle_well(num_shards: int) -> None:
    quality = measure(Order([100] * num_shards, seed=1, lane_block=4))
    assert 0.85 < quality.displacement < 1.15
    assert abs(quality.neighbour_correlation) < 0.12
    assert quality.distinct_shards > 0.5
    assert 0.85 < quality.epoch_change < 1.15


def test_a_wider_window_mixes_neighbours_better() -> None:
    narrow, wide = (measure(Order([100] * 1000, seed=1, window=window, lanes=1)) for window in (1, 64))
    assert narrow.neighbour_correlation > 0.9
    assert wide.neighbour_correlation < 0.1
    assert wide.distinct_shards > 10 * narrow.distinct_shards
