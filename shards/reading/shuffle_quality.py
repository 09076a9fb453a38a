"""How well an order shuffles, against a full permutation of the samples.

1000 shards of 1000 samples, 64 lanes, batches of 256 (``measure(Order([1000] * 1000, 1, window, 64, 4))``):

    window   displacement   neighbour correlation   distinct shards   epoch change
         1           0.98                    0.75              0.28           1.03
         4           0.98                    0.21              0.76           1.03
        16           1.00                    0.07              0.91           1.00
        64           1.00                    0.01              0.89           1.01

Sets of at most ``window`` shards are permuted in full.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shards.reading.order import Order


@dataclass(frozen=True)
class ShuffleQuality:
    """Measured over one epoch; a full permutation has 1 for both shares and 0 for the correlation.

    Attributes:
        displacement: mean distance between a sample's places on disk and in the epoch, over that of a full permutation.
        neighbour_correlation: correlation between the places on disk of two samples that follow each other.
        distinct_shards: mean number of shards in a batch, over that in a batch of a full permutation.
        epoch_change: mean distance between a sample's places in this epoch and the next, over that of two full
            permutations.
    """

    displacement: float
    neighbour_correlation: float
    distinct_shards: float
    epoch_change: float


def measure(order: Order, batch: int = 256) -> ShuffleQuality:
    """Measure an order over its first two epochs; takes a few numbers a sample.

    Args:
        batch: samples in a batch, for ``distinct_shards``.
    """
    count = order.num_samples
    on_disk, shards = _places(order, 0)
    in_next, _ = _places(order, 1)
    # Two independent uniform places are a third of the whole apart.
    displacement = np.abs(on_disk - np.arange(count)).mean() / (count / 3)
    correlation = float(np.corrcoef(on_disk[:-1], on_disk[1:])[0, 1])
    batch = min(batch, count)
    whole = count // batch * batch
    distinct = np.mean([len(np.unique(part)) for part in shards[:whole].reshape(-1, batch)])
    shares = order.sizes / count
    expected = float(np.sum(1 - (1 - shares) ** batch))
    slot_now, slot_next = np.argsort(on_disk), np.argsort(in_next)
    change = np.abs(slot_now - slot_next).mean() / (count / 3)
    return ShuffleQuality(float(displacement), correlation, float(distinct / expected), float(change))


def _places(order: Order, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """For each slot of an epoch, the sample's place on disk (through all shards) and its shard."""
    starts = np.concatenate([[0], np.cumsum(order.sizes)])
    _, shards, samples = order.locate(np.arange(epoch * order.num_samples, (epoch + 1) * order.num_samples))
    return starts[shards] + samples, shards
