"""The size of the images of a set, which the loader's memory depends on."""

from __future__ import annotations

import numpy as np

from shards.errors import ShardError
from shards.format.image_header import MAX_SIDE
from shards.format.windows import open_tiff
from shards.reading.mixture import AnySet, JoinedSet
from shards.reading.shard_set import ShardSet
from shards.storage.store import is_url
from streamtrain.config.load import open_shard_set
from streamtrain.config.tree import Config
from streamtrain.planning.sizes import StoredImages

# shards of a set whose index is read, at most
_SHARDS = 8


def stored_images(shard_set: AnySet, window: int | None = None) -> StoredImages | None:
    """Return the mean sizes of a set's images, from the index of some shards.

    None: the set is remote, or its index cannot be read.

    Args:
        window: side of the windows that are read of larger TIFFs (``crops.window``).
    """
    if shard_set.is_remote:
        return None
    pixels: list[np.ndarray] = []
    lengths: list[np.ndarray] = []
    for member in shard_set.members if isinstance(shard_set, JoinedSet) else (shard_set,):
        chosen = np.unique(np.linspace(0, member.num_shards - 1, min(_SHARDS, member.num_shards)).astype(int))
        for shard in chosen.tolist():
            try:
                records = member.records(shard)
                decoded = _decoded_pixels(member, shard, records, window)
            except ShardError:
                continue
            # 0 pixels: the packed image could not be read
            pixels.append(decoded[decoded > 0])
            lengths.append(records["length"][decoded > 0])
    if not any(map(len, pixels)):
        return None
    return StoredImages(int(np.concatenate(pixels).mean()), int(np.concatenate(lengths).mean()))


def _decoded_pixels(shard_set: ShardSet, shard: int, records: np.ndarray, window: int | None) -> np.ndarray:
    """Return the pixels that are decoded of each image of a shard, int64 [num_samples].

    Raises:
        ShardError: the first image that is larger than a window is damaged.
    """
    width, height = (records[name].astype(np.int64) for name in ("width", "height"))
    side = window or MAX_SIDE
    is_large = np.maximum(width, height) > side
    if not is_large.any():
        return width * height
    # the index has no formats; most shards have one
    first = int(is_large.argmax())
    image = open_tiff(int(records[first]["length"]), shard_set.part_reader(shard, first), shard_set.pixels)
    return width * height if image is None else np.minimum(width, side) * np.minimum(height, side)


def configured_images(config: Config) -> StoredImages | None:
    """Return ``stored_images`` of ``data.shards``; None if it is not set, not on this machine or damaged."""
    if not config.data.shares or any(is_url(share.shards) for share in config.data.shares):
        return None
    try:
        return stored_images(open_shard_set(config), config.crops.window)
    except ShardError:
        return None
