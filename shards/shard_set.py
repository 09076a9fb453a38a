"""A shard set on disk: any image by shard and sample, in one read, checked against its checksum."""

from __future__ import annotations

import os
import tarfile
import threading
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Protocol

import numpy as np

from shards.errors import SampleError, ShardError
from shards.index import load_index, split_name
from shards.manifest import Manifest

_OPEN_SHARDS = 200  # each takes two open files; the usual limit is 1024


class _OpenShard:
    """A mapped index and, once it is needed, its open tar; closed when the last reader lets go of it."""

    def __init__(self, tar: Path, index: Path) -> None:
        self.records = load_index(index).view(np.ndarray)
        self._tar = tar
        self._file: int | None = None
        self._lock = threading.Lock()

    def read(self, length: int, offset: int) -> bytes:
        """Bytes of the tar, fewer where it ends; OSError where it cannot be read."""
        with self._lock:
            if self._file is None:
                self._file = os.open(self._tar, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        return os.pread(self._file, length, offset)

    def __del__(self) -> None:
        file = getattr(self, "_file", None)
        if file is not None:
            os.close(file)


class Readable(Protocol):
    """What a source needs to know of a set: ``ShardSet``, or a ``JoinedSet`` of several."""

    def name(self, shard: int) -> str:
        """As ``ShardSet.name``."""

    def record(self, shard: int, sample: int) -> np.void:
        """As ``ShardSet.record``."""

    def read(self, shard: int, sample: int) -> bytes:
        """As ``ShardSet.read``."""

    def key(self, shard: int, sample: int) -> str:
        """As ``ShardSet.key``."""


class ShardSet:
    """A shard set on a local or mounted disk. Safe to share between threads.

    Attributes:
        path: the set's folder.
        manifest: its description.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: Path | str) -> ShardSet:
        """Open a set, and check that every file is there with its full length.

        Raises:
            ShardError: no set, not finished, or a file missing or cut short; one line that says what to do.
        """
        path = Path(path)
        shard_set = cls(path, Manifest.load(path))
        for shard, entry in enumerate(shard_set.manifest.shards):
            tar, index = shard_set.tar_path(shard), shard_set.index_path(shard)
            try:
                tar_bytes, index_bytes = tar.stat().st_size, index.stat().st_size
            except OSError as error:
                raise ShardError(
                    f"{error.filename} is missing ({error.strerror}); copy the set again, or pack it again"
                ) from error
            if tar_bytes != entry.bytes:
                raise ShardError(
                    f"shard {tar} has {tar_bytes} bytes instead of {entry.bytes}; copy the set again, or pack it again"
                )
            if index_bytes < entry.samples:
                raise ShardError(f"index {index} is cut short; copy the set again, or pack it again")
        return shard_set

    @property
    def num_samples(self) -> int:
        """Images in the set."""
        return self.manifest.num_samples

    @property
    def sizes(self) -> np.ndarray:
        """Samples in each shard, int64 [num_shards]: what ``Order`` needs."""
        return np.array([shard.samples for shard in self.manifest.shards], dtype=np.int64)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names by label; empty where the set has no labels."""
        return self.manifest.classes

    @property
    def digest(self) -> str:
        """What a saved stream must agree with."""
        return self.manifest.digest

    def tar_path(self, shard: int) -> Path:
        """The tar of a shard."""
        return self.path / "shards" / self.manifest.shards[shard].name

    def index_path(self, shard: int) -> Path:
        """Our index of a shard."""
        return self.path / "index" / (self.manifest.shards[shard].name.removesuffix(".tar") + ".npy")

    def name(self, shard: int) -> str:
        """What logs call a shard."""
        return self.manifest.shards[shard].name

    def records(self, shard: int) -> np.ndarray:
        """The index records [num_samples of the shard] (``shards.index.RECORD``)."""
        return self._shard(shard).records

    def record(self, shard: int, sample: int) -> np.void:
        """The index record of one sample."""
        return self._shard(shard).records[sample]

    def read(self, shard: int, sample: int) -> bytes:
        """The bytes of one image, checked against its CRC-32.

        Raises:
            SampleError: short, or not what was packed; names shard, index and key.
        """
        opened = self._shard(shard)
        record = opened.records[sample]
        length, offset = int(record["length"]), int(record["offset"])
        try:
            payload = opened.read(length, offset)
        except OSError as error:
            raise self._sample_error(shard, sample, f"cannot be read ({error.strerror})") from error
        if len(payload) != length:
            raise self._sample_error(shard, sample, f"has {len(payload)} bytes instead of {length}")
        if zlib.crc32(payload) != int(record["crc32"]):
            raise self._sample_error(shard, sample, "was changed since it was packed (its CRC-32 differs)")
        return payload

    def key(self, shard: int, sample: int) -> str:
        """The WebDataset key of a sample, read from the tar; empty where that is damaged too."""
        opened = self._shard(shard)
        try:
            header = opened.read(tarfile.BLOCKSIZE, int(opened.records[sample]["offset"]) - tarfile.BLOCKSIZE)
            return split_name(tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name)[0]
        except (tarfile.TarError, OSError):
            return ""

    def _sample_error(self, shard: int, sample: int, reason: str) -> SampleError:
        return SampleError(self.manifest.shards[shard].name, sample, self.key(shard, sample), reason)

    def _shard(self, shard: int) -> _OpenShard:
        with self._lock:
            opened = self._open.get(shard)
            if opened is not None:
                self._open.move_to_end(shard)
                return opened
        opened = _OpenShard(self.tar_path(shard), self.index_path(shard))
        if len(opened.records) != self.manifest.shards[shard].samples:
            raise ShardError(
                f"index {self.index_path(shard)} holds {len(opened.records)} samples, the manifest says "
                f"{self.manifest.shards[shard].samples}; copy the set again, or pack it again"
            )
        with self._lock:
            self._open[shard] = opened
            while len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
        return opened
