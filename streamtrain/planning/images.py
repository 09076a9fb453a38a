"""The size of the images of a set, which the memory of decoded images depends on."""

from __future__ import annotations

import numpy as np

from shards.errors import ShardError
from shards.reading.mixture import AnySet, JoinedSet
from shards.storage.store import is_url
from streamtrain.config.load import open_shard_set
from streamtrain.config.tree import Config

# shards whose index is read, at most, and the quantile of their images that counts as large
_SHARDS, _QUANTILE = 8, 0.99


def large_image_pixels(shard_set: AnySet) -> int | None:
    """Return the pixels that only 1 % of the images exceed, from the index of some shards.

    A decoder's buffers grow with each larger image and stay. None: the set is remote, or its index cannot be read.
    """
    if shard_set.is_remote:
        return None
    pixels: list[np.ndarray] = []
    for member in shard_set.members if isinstance(shard_set, JoinedSet) else (shard_set,):
        chosen = np.unique(np.linspace(0, member.num_shards - 1, min(_SHARDS, member.num_shards)).astype(int))
        for shard in chosen.tolist():
            try:
                records = member.records(shard)
            except ShardError:
                continue
            pixels.append(records["width"].astype(np.int64) * records["height"].astype(np.int64))
    counts = np.concatenate(pixels) if pixels else np.zeros(0, np.int64)
    counts = counts[counts > 0]
    return int(np.quantile(counts, _QUANTILE)) if len(counts) else None


def configured_image_pixels(config: Config) -> int | None:
    """Return ``large_image_pixels`` of ``data.shards``; None if it is not set, not on this machine or damaged."""
    if not config.data.shares or any(is_url(share.shards) for share in config.data.shares):
        return None
    try:
        return large_image_pixels(open_shard_set(config))
    except ShardError:
        return None
