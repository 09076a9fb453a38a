"""The maps of one kind in a shard set: class ids or depth of its images."""

from __future__ import annotations

import threading

import numpy as np

from shards.errors import ShardError
from shards.format.records import Index
from shards.reading.shard_set import ShardSet


class SetMaps:
    """Random access to the maps of a set. Thread-safe.

    Args:
        kind: name of the kind, a key of ``SetManifest.maps``.
    """

    def __init__(self, shard_set: ShardSet, kind: str) -> None:
        self._set, self._kind = shard_set, kind
        self._indexes: dict[int, Index | None] = {}
        self._lock = threading.Lock()

    def exist(self, shard: int, samples: np.ndarray) -> np.ndarray:
        """Return which samples of a shard have a map, bool [num_samples].

        Raises:
            ShardError: the index of the maps is missing or damaged.
        """
        index = self._index(shard)
        if index is None:
            return np.zeros(len(samples), bool)
        return np.asarray(index.records()["length"][samples] > 0)

    def read(self, shard: int, sample: int) -> bytes:
        """Return the bytes of a sample's map, verified against its CRC-32.

        Raises:
            SampleError: the map differs from the packed one.
            ShardError: the sample has no map, or the index or the shard is missing or unreachable.
        """
        index = self._index(shard)
        record = None if index is None else index.record(sample)
        if record is None or not record["length"]:
            raise ShardError(f"sample {sample} of {self._set.name(shard)} has no {self._kind} map")
        return self._set.read_map(shard, sample, record)

    def _index(self, shard: int) -> Index | None:
        with self._lock:
            if shard not in self._indexes:
                self._indexes[shard] = self._set.map_index(shard, self._kind)
            return self._indexes[shard]
