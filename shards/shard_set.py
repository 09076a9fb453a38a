"""A shard set: any image by shard and sample, in one read, checked against its checksum."""

from __future__ import annotations

import tarfile
import threading
import zlib
from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np

from shards.errors import SampleError, ShardError
from shards.index import load_index, parse_index, split_name
from shards.manifest import FILE_NAME, Manifest, ShardEntry
from shards.store import Patience, Store
from shards.tars import RemoteTar, Tar, is_url, open_tar

_OPEN_SHARDS = 200  # each takes two open files; the usual limit is 1024


class _OpenShard:
    """An index and its tar, in use."""

    def __init__(self, records: np.ndarray, tar: Tar) -> None:
        self.records, self.read = records, tar.read


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
    """A shard set: on a local or mounted disk, or under a URL and then read in ranges. Safe to share between threads.

    Attributes:
        path: the set's folder; of a remote set, the empty path.
        manifest: its description.
    """

    def __init__(self, path: Path, manifest: Manifest, store: Store | None = None) -> None:
        self.path, self.manifest = path, manifest
        self._store = store
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: Path | str, patience: Patience | None = None) -> ShardSet:
        """Open a set and, where it is local, check that every file is there with its full length.

        Args:
            path: a folder, or a URL of one.
            patience: how long to try, where it is remote.

        Raises:
            ShardError: no set, not finished, or a file missing or cut short; one line that says what to do.
        """
        if is_url(str(path)):
            store = Store(str(path), patience)
            return cls(Path(), store.load(FILE_NAME, partial(Manifest.parse, path=store.url_of(FILE_NAME))), store)
        path = Path(path)
        shard_set = cls(path, Manifest.load(path))
        for shard, entry in enumerate(shard_set.manifest.shards):
            if is_url(entry.url):
                continue
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
        """The tar of a shard, where that is local."""
        entry = self.manifest.shards[shard]
        return Path(entry.url) if entry.url else self.path / "shards" / entry.name

    def index_path(self, shard: int) -> Path:
        """Our index of a shard, where the set is local."""
        return self.path / "index" / self.manifest.shards[shard].index_name

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
        opened = self._opened(self.manifest.shards[shard])
        with self._lock:
            self._open[shard] = opened
            while len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
        return opened

    def _opened(self, entry: ShardEntry) -> _OpenShard:
        if self._store is None:
            records = load_index(self.path / "index" / entry.index_name).view(np.ndarray)
            tar = open_tar(entry.url or str(self.path / "shards" / entry.name))
        else:
            index = f"index/{entry.index_name}"
            records = self._store.load(index, partial(parse_index, name=self._store.url_of(index)))
            tar = open_tar(entry.url) if entry.url else RemoteTar(self._store, f"shards/{entry.name}")
        if len(records) != entry.samples:
            raise ShardError(
                f"index {entry.index_name} holds {len(records)} samples, the manifest says {entry.samples}; "
                "copy the set again, or pack it again"
            )
        return _OpenShard(records, tar)
