"""The size of the images of a set, which the loader's memory depends on."""

from __future__ import annotations

import numpy as np

from shards.errors import ShardError
from shards.reading.mixture import AnySet, JoinedSet
from shards.storage.store import is_url
from streamtrain.config.load import open_shard_set
from streamtrain.config.tree import Config
from streamtrain.planning.sizes import StoredImages

# shards of a set whose index is read, at most
_SHARDS = 8


def stored_images(shard_set: AnySet) -> StoredImages | None:
    """Return the mean sizes of a set's images, from the index of some shards.

    None: the set is remote, or its index cannot be read.
    """
    if shard_set.is_remote:
        return None
    found: list[np.ndarray] = []
    for member in shard_set.members if isinstance(shard_set, JoinedSet) else (shard_set,):
        chosen = np.unique(np.linspace(0, member.num_shards - 1, min(_SHARDS, member.num_shards)).astype(int))
        for shard in chosen.tolist():
            try:
                records = member.records(shard)
            except ShardError:
                continue
            # 0 pixels: the packed image could not be read
            found.append(records[records["width"] > 0])
    if not any(map(len, found)):
        return None
    joined = np.concatenate(found)
    pixels = joined["width"].astype(np.int64) * joined["height"]
    return StoredImages(int(pixels.mean()), int(joined["length"].mean()))


def configured_images(config: Config) -> StoredImages | None:
    """Return ``stored_images`` of ``data.shards``; None if it is not set, not on this machine or damaged."""
    if not config.data.shares or any(is_url(share.shards) for share in config.data.shares):
        return None
    try:
        return stored_images(open_shard_set(config))
    except ShardError:
        return None
