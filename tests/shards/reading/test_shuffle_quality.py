"""The shuffle is close to a full permutation, with the defaults and for sets of any size."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from shards.reading.order import Order


@dataclass(frozen=True)
class ShuffleQuality:
    """Measured over one epoch; a full permutation has correlation 0 and 1 for all others.

    Attributes:
        displacement: mean distance between a sample's positions on disk and in the epoch, relative to a full
            permutation.
        neighbour_correlation: correlation between the positions on disk of consecutive samples.
        distinct_shards: mean number of shards in a batch, relative to a batch of a full permutation.
        epoch_change: mean distance between a sample's positions in this epoch and the next, relative to two independent
            full permutations.
    """

    displacement: float
    neighbour_correlation: float
    distinct_shards: float
    epoch_change: float


def measure(order: Order, batch: int = 256) -> ShuffleQuality:
    """Measure an order over its first two epochs; ``batch`` is the batch size of ``distinct_shards``."""
    count = order.num_samples
    on_disk, shards = disk_positions(order, 0)
    in_next, _ = disk_positions(order, 1)
    # two independent uniform positions are a third of the range apart on average
    displacement = np.abs(on_disk - np.arange(count)).mean() / (count / 3)
    correlation = float(np.corrcoef(on_disk[:-1], on_disk[1:])[0, 1])
    batch = min(batch, count)
    whole = count // batch * batch
    distinct = np.mean([len(np.unique(part)) for part in shards[:whole].reshape(-1, batch)])
    expected = float(np.sum(1 - (1 - order.sizes / count) ** batch))
    change = np.abs(np.argsort(on_disk) - np.argsort(in_next)).mean() / (count / 3)
    return ShuffleQuality(float(displacement), correlation, float(distinct / expected), float(change))


def disk_positions(order: Order, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the sample's position on disk (through all shards) and its shard, for each slot of an epoch."""
    starts = np.concatenate([[0], np.cumsum(order.sizes)])
    shards, samples = order.locate(np.arange(epoch * order.num_samples, (epoch + 1) * order.num_samples))
    return starts[shards] + samples, shards


@pytest.mark.parametrize("num_shards", [1, 16, 100, 1000])
def test_default_parameters_shuffle_well(num_shards: int) -> None:
    quality = measure(Order([100] * num_shards, seed=1, lane_block=4))
    assert 0.85 < quality.displacement < 1.15
    assert abs(quality.neighbour_correlation) < 0.12
    assert quality.distinct_shards > 0.5
    assert 0.85 < quality.epoch_change < 1.15


def test_wider_window_mixes_neighbours_better() -> None:
    narrow, wide = (measure(Order([100] * 1000, seed=1, window=window, lanes=1)) for window in (1, 64))
    assert narrow.neighbour_correlation > 0.9
    assert wide.neighbour_correlation < 0.1
    assert wide.distinct_shards > 10 * narrow.distinct_shards
