"""A shard set: any image by shard and sample, in one read, checked against its checksum."""

from __future__ import annotations

import copy
import logging
import tarfile
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np

from shards.errors import SampleError, ShardError
from shards.format import images
from shards.format.index import load_index, parse_index, split_name
from shards.format.set_manifest import FILE_NAME, Manifest, ShardEntry
from shards.format.tars import LocalTar, RemoteTar, Tar, is_url
from shards.storage.store import Patience, Store, Traffic

_log = logging.getLogger(__name__)
_OPEN_SHARDS = 200  # of a local set, where each takes two open files; the usual limit is 1024
_INDEX_BYTES = 512 << 20  # of a remote set's indexes, which are held in memory


class OpenShard(Protocol):
    """A shard in use."""

    def records(self) -> np.ndarray:
        """The index records [num_samples of the shard] (``shards.format.index.RECORD``)."""

    def record(self, sample: int) -> np.void:
        """The index record of one sample."""

    def read(self, length: int, offset: int) -> bytes:
        """As ``Tar.read``."""


class _OpenShard:
    """An index and its tar, in use."""

    def __init__(self, records: np.ndarray, tar: Tar) -> None:
        self._records, self.read = records, tar.read

    def records(self) -> np.ndarray:
        return self._records

    def record(self, sample: int) -> np.void:
        return self._records[sample]


@dataclass(frozen=True)
class RemoteShard:
    """What can be copied of a shard that lies in a store."""

    entry: ShardEntry
    tar: RemoteTar
    load_records: Callable[[], np.ndarray]


class Copies(Protocol):
    """Local copies of remote shards, such as a ``ShardCache``."""

    def get(self, shard: int) -> OpenShard | None:
        """The copy of a shard; None where there is none and the original is to be read."""

    def discard(self, shard: int) -> None:
        """The copy of a shard was found to be damaged."""


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
        traffic: what has come over the network.
    """

    def __init__(
        self, path: Path, manifest: Manifest, patience: Patience | None = None, store: Store | None = None
    ) -> None:
        self.path, self.manifest = path, manifest
        self.traffic = store.traffic if store is not None else Traffic()
        self._patience, self._store = patience, store
        self._stores: dict[str, Store] = {}  # of tars that lie elsewhere
        self._copies: Copies | None = None
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
            manifest = store.load(FILE_NAME, partial(Manifest.parse, path=store.url_of(FILE_NAME)))
            return cls(Path(), manifest, patience, store)
        path = Path(path)
        shard_set = cls(path, Manifest.load(path), patience)
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
    def num_shards(self) -> int:
        """Tars of the set."""
        return len(self.manifest.shards)

    @property
    def is_remote(self) -> bool:
        """Whether any of its tars lies in a store."""
        return any(map(self._is_remote, self.manifest.shards))

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

    def remote(self, shard: int) -> RemoteShard | None:
        """What can be copied of a shard; None of one on a local or mounted disk."""
        entry = self.manifest.shards[shard]
        tar = self._remote_tar(entry)
        return None if tar is None else RemoteShard(entry, tar, partial(self._load_records, entry))

    def reading_copies(self, copies: Copies) -> ShardSet:
        """This set, read from local copies where there are any."""
        through = copy.copy(self)
        through._copies = copies
        return through

    def records(self, shard: int) -> np.ndarray:
        """The index records [num_samples of the shard] (``shards.format.index.RECORD``)."""
        return self._shard(shard).records()

    def record(self, shard: int, sample: int) -> np.void:
        """The index record of one sample."""
        return self._shard(shard).record(sample)

    def read(self, shard: int, sample: int) -> bytes:
        """The bytes of one image, checked against its CRC-32.

        Raises:
            SampleError: short, or not what was packed; names shard, index and key.
            ShardError: the shard is gone, or cannot be reached.
        """
        try:
            return self._checked_read(self._shard(shard), shard, sample)
        except SampleError as error:
            if self._copies is None or self.remote(shard) is None:
                raise
            _log.warning("%s; the copy in the cache is given up, and the original read", str(error))
        # not before the error is forgotten, with whose traceback goes the last use of the copy
        self._copies.discard(shard)
        return self._checked_read(self._original(shard), shard, sample)

    def _checked_read(self, opened: OpenShard, shard: int, sample: int) -> bytes:
        record = opened.record(sample)
        length, offset = int(record["length"]), int(record["offset"])
        if length > images.MAX_BYTES or offset + length > self.manifest.shards[shard].bytes:
            raise self._sample_error(shard, sample, f"cannot be {length} bytes at {offset}, as its index says")
        try:
            payload = opened.read(length, offset)
        except FileNotFoundError as error:  # no fault of an image
            raise ShardError(
                f"shard {self.tar_path(shard)} is gone; put it back, and the same command goes on"
            ) from error
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
            header = opened.read(tarfile.BLOCKSIZE, int(opened.record(sample)["offset"]) - tarfile.BLOCKSIZE)
            return split_name(tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name)[0]
        except (tarfile.TarError, OSError, ValueError, OverflowError):
            return ""

    def _sample_error(self, shard: int, sample: int, reason: str) -> SampleError:
        return SampleError(self.manifest.shards[shard].name, sample, self.key(shard, sample), reason)

    def _shard(self, shard: int) -> OpenShard:
        copied = self._copies.get(shard) if self._copies is not None else None
        return self._original(shard) if copied is None else copied

    def _original(self, shard: int) -> OpenShard:
        with self._lock:
            opened = self._open.get(shard)
            if opened is not None:
                self._open.move_to_end(shard)
                return opened
        entry = self.manifest.shards[shard]
        tar = self._remote_tar(entry) or LocalTar(self.tar_path(shard))
        opened = _OpenShard(self._load_records(entry), tar)
        with self._lock:
            self._open[shard] = opened
            while self._holds_too_much():
                self._open.popitem(last=False)
        return opened

    def _holds_too_much(self) -> bool:
        if self._store is None:
            return len(self._open) > _OPEN_SHARDS
        return sum(opened.records().nbytes for opened in self._open.values()) > _INDEX_BYTES

    def _remote_tar(self, entry: ShardEntry) -> RemoteTar | None:
        if not self._is_remote(entry):
            return None
        if entry.url:
            folder, _, name = entry.url.rpartition("/")
            with self._lock:
                if folder not in self._stores:
                    self._stores[folder] = Store(folder, self._patience, self.traffic)
                return RemoteTar(self._stores[folder], name)
        assert self._store is not None
        return RemoteTar(self._store, f"shards/{entry.name}")

    def _is_remote(self, entry: ShardEntry) -> bool:
        return is_url(entry.url) if entry.url else self._store is not None

    def _load_records(self, entry: ShardEntry) -> np.ndarray:
        """The index of a shard.

        Raises:
            ShardError: missing, damaged, or not of this shard.
        """
        if self._store is None:
            records = load_index(self.path / "index" / entry.index_name).view(np.ndarray)
        else:
            index = f"index/{entry.index_name}"
            records = self._store.load(index, partial(parse_index, name=self._store.url_of(index)))
        if len(records) != entry.samples:
            raise ShardError(
                f"index {entry.index_name} holds {len(records)} samples, the manifest says {entry.samples}; "
                "copy the set again, or pack it again"
            )
        return records
